"""A small HTTP door to a server of adapters, in the shape of OpenAI's completions, where `model` names the adapter.

    GET /v1/models         what can be asked for: the base and the adapters
    POST /v1/completions   {"model": …, "prompt": …, "max_tokens": …, "temperature": …, "seed": …, "stream": …}
    GET /figures           what was served so far

Whoever asks needs the token. Every refusal is a 4xx or 503 with its reason in `error.message`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import threading
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Self

from lora_nb.errors import ConfigError, LoraNbError, ServingError
from lora_nb.http_answer import answer, refusal
from lora_nb.http_request import RefusedRequestError, read
from lora_nb.serving import AdapterServer
from lora_nb.tickets import Ticket

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

HOSTS = ["127.0.0.1", "localhost", "[::1]"]  # a page that has another name point here gets no further
MOST_BYTES = 250_000


def door(server: AdapterServer, token: str, base: str = "base", time_limit: float = 300.0) -> Starlette:
    """The application, for any ASGI server.

    Args:
        token: what `Authorization: Bearer …` must say.
        base: the name by which the base without an adapter is asked for.
        time_limit: seconds that a request may take.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    def guarded(handle: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def handled(request: Request) -> Response:
            try:
                _check_token(request, token)
                return await handle(request)
            except LoraNbError as error:
                status, body = refusal(error)
                headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(status, {})
                return JSONResponse(body, status, headers)

        return handled

    async def models(_: Request) -> Response:
        names = [base, *await asyncio.to_thread(server.adapters)]
        return JSONResponse({"object": "list", "data": [{"id": n, "object": "model", "created": 0, "owned_by": "lora_nb"} for n in names]})

    async def figures(_: Request) -> Response:
        return JSONResponse(dataclasses.asdict(server.figures()))

    async def completions(request: Request) -> Response:
        wanted = read(await _body(request))
        adapter = None if wanted.model == base else wanted.model
        tickets: list[Ticket] = []
        try:
            tickets.extend(server.submit(prompt, adapter, time_limit=time_limit, **wanted.settings) for prompt in wanted.prompts)
            return await answer(request, wanted, tickets)
        except BaseException:  # one who hangs up, too: nobody reads the rest
            for ticket in tickets:
                ticket.cancel()
            raise

    routes = [
        Route("/v1/models", guarded(models)),
        Route("/v1/completions", guarded(completions), methods=["POST"]),
        Route("/figures", guarded(figures)),
    ]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)])


def _check_token(request: Request, token: str) -> None:
    given = request.headers.get("authorization", "")
    if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise RefusedRequestError(401, "The token is missing or wrong: send `Authorization: Bearer TOKEN` with the server's token.")


async def _body(request: Request) -> bytes:
    """No more than `MOST_BYTES`, whatever the headers say."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MOST_BYTES:
            raise RefusedRequestError(413, f"The request is longer than {MOST_BYTES:,} bytes: shorten the prompt.")
    return bytes(data)


class Door:
    """The door, open on this machine's loopback address until it is closed.

    Args:
        port: 0 takes a free one.

    Raises:
        ConfigError: uvicorn or starlette are not installed.
        ServingError: the port is taken.
    """

    def __init__(self, server: AdapterServer, token: str, port: int = 0, base: str = "base") -> None:
        try:
            import uvicorn
        except ImportError as error:
            raise ConfigError("The door needs starlette and uvicorn: pip install 'lora-nb[serve]'.") from error
        import socket

        self.server, self._socket = server, socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind(("127.0.0.1", port))
            self._socket.listen(128)  # who comes before uvicorn is ready waits a moment
        except (OSError, OverflowError) as error:
            self._socket.close()
            raise ServingError(f"Port {port} cannot be had: {error}. Choose another with port=…, or 0 for a free one.") from error
        config = uvicorn.Config(
            door(server, token, base), log_level="warning", access_log=False, timeout_graceful_shutdown=5, limit_concurrency=1024
        )
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._uvicorn.run, kwargs={"sockets": [self._socket]}, name="lora_nb door", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"

    def wait(self) -> None:
        """Until it is closed, or the person at the keyboard stops it."""
        while self._thread.is_alive():
            self._thread.join(0.5)

    def close(self) -> None:
        """Shut the door, then close the server."""
        self._uvicorn.should_exit = True
        self._thread.join()
        self._socket.close()
        self.server.close()

    def __repr__(self) -> str:
        return f"{len(self.server.adapters())} adapters at {self.address}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
