"""A small HTTP door to a server of adapters, in the shape of OpenAI's completions, where `model` names the adapter.

    GET /v1/models         what can be asked for: the base and the adapters
    POST /v1/completions   {"model": …, "prompt": …, "max_tokens": …, "temperature": …, "seed": …, "stream": …}
    GET /figures           what was served so far

Whoever asks needs the token. What a request has that would be passed over in silence is refused instead; every refusal is a 4xx or 503
with its reason in `error.message`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from lora_nb.errors import AdapterError, ConfigError, LoraNbError, QueueFullError, ServingError
from lora_nb.serving import AdapterServer
from lora_nb.tickets import Completion, Pieces, Ticket

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

HOSTS = ["127.0.0.1", "localhost", "[::1]"]  # a page that has another name point here gets no further
MOST_BYTES, MOST_PROMPTS = 250_000, 16
# Settings of OpenAI's that this server has not got, and the values that ask for nothing.
ABSENT: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (),
    "n": (1,),
    "presence_penalty": (0,),
    "stop": ([], ""),
    "suffix": ("",),
    "top_p": (1,),
}
SETTINGS = {"model": str, "prompt": (str, list), "max_tokens": int, "temperature": (int, float), "seed": int, "stream": bool, "user": str}
REASONS = ("stop", "length")


class RefusedRequestError(LoraNbError):
    """A request that gets no text: its status and why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The body of a request, checked."""

    model: str
    prompts: list[str]
    settings: dict[str, Any]
    stream: bool


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

    def answered(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            try:
                _check_token(request, token)
                return await answer(request)
            except LoraNbError as error:
                status = _status(error)
                headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(status, {})
                return JSONResponse(_said(status, str(error)), status, headers)

        return guarded

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
            return await _answer(request, wanted, tickets)
        except BaseException:  # one who hangs up, too: nobody reads the rest
            for ticket in tickets:
                ticket.cancel()
            raise

    routes = [
        Route("/v1/models", answered(models)),
        Route("/v1/completions", answered(completions), methods=["POST"]),
        Route("/figures", answered(figures)),
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


def read(body: bytes) -> Wanted:
    """A request's body, checked as far as that goes without a model.

    Raises:
        RefusedRequestError: what is wrong with it.
    """
    try:
        content = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # no JSON, no text, a number of thousands of digits, nested without end
        raise RefusedRequestError(400, f"The body is not JSON that can be read: {str(error)[:200] or type(error).__name__}.") from error
    if not isinstance(content, dict):
        raise RefusedRequestError(400, f"The body must be a JSON object, not {type(content).__name__}.")
    for key, value in content.items():
        _check_setting(key, value)
    model, prompt = content.get("model"), content.get("prompt")
    if model is None or prompt is None:
        raise RefusedRequestError(400, f"The body needs {'model' if model is None else 'prompt'!r}: the name of an adapter, and a text.")
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if not 1 <= len(prompts) <= MOST_PROMPTS or not all(isinstance(p, str) for p in prompts):
        raise RefusedRequestError(400, f"'prompt' must be a text, or a list of 1 to {MOST_PROMPTS} texts.")
    if not all(_is_text(t) for t in (model, *prompts)):
        raise RefusedRequestError(400, "'model' and 'prompt' must be whole Unicode: one half of a surrogate pair stands alone.")
    names = {"max_tokens": "max_new_tokens", "temperature": "temperature", "seed": "seed"}
    settings = {ours: content[theirs] for theirs, ours in names.items() if content.get(theirs) is not None}
    return Wanted(model, prompts, {"max_new_tokens": 16, **settings}, bool(content.get("stream")))


def _no_constant(word: str) -> object:
    raise ValueError(f"{word} is no number in JSON")


def _check_setting(key: str, value: object) -> None:
    """Known, of its type, and something that this server does."""
    if value is None and key in {*SETTINGS, *ABSENT, "stream_options"}:
        return
    if key in ABSENT:
        if not any(value == idle and isinstance(value, bool) == isinstance(idle, bool) for idle in ABSENT[key]):
            raise RefusedRequestError(400, f"{key!r} is not supported here: leave it out.")
    elif key in SETTINGS:
        kind: Any = SETTINGS[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise RefusedRequestError(400, f"{key!r} is of the type {type(value).__name__}, which it cannot be.")
    elif key != "stream_options":
        raise RefusedRequestError(400, f"There is no setting {key[:80]!r}. There are: {', '.join(SETTINGS)}.")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _status(error: LoraNbError) -> int:
    if isinstance(error, RefusedRequestError):
        return error.status
    kinds = {AdapterError: 404, ConfigError: 400, QueueFullError: 429, ServingError: 503}
    return next((status for kind, status in kinds.items() if isinstance(error, kind)), 422)


def _said(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


async def _answer(request: Request, wanted: Wanted, tickets: list[Ticket]) -> Response:
    from starlette.responses import JSONResponse, StreamingResponse

    changes = Changes(request, tickets)
    if wanted.stream:
        # Until there is something to send the status can still say what is wrong.
        while not any(t.tokens or t.done for t in tickets):
            await changes.next()
        for ticket in tickets:
            if ticket.error is not None:
                raise ticket.error
        return StreamingResponse(_events(wanted, tickets, changes), media_type="text/event-stream")
    while not all(ticket.done for ticket in tickets):
        await changes.next()
    results = [ticket.result(0) for ticket in tickets]
    tokens = sum(r.prompt_tokens for r in results), sum(r.tokens for r in results)
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
    choices = [_choice(i, r.text, _reason(r)) for i, r in enumerate(results)]
    return JSONResponse({**_head(wanted, tickets), "choices": choices, "usage": usage})


class Changes:
    """Wakes whoever waits when one of some tickets changes, from whichever thread; and looks whether anybody still listens."""

    def __init__(self, request: Request, tickets: list[Ticket]) -> None:
        self._request, self._loop, self._event = request, asyncio.get_running_loop(), asyncio.Event()
        self._looked = self._loop.time()
        for ticket in tickets:
            ticket.listener = self._tell
        self._event.set()

    def _tell(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._event.set)
        except RuntimeError:  # the loop is closed: nobody listens any more
            return

    async def next(self) -> None:
        """Wait for a change, or half a second.

        Raises:
            RefusedRequestError: who asked has hung up.
        """
        with suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), 0.5)
        self._event.clear()
        if self._loop.time() - self._looked > 0.4:
            self._looked = self._loop.time()
            if await self._request.is_disconnected():
                raise RefusedRequestError(499, "The client has closed the connection.")


async def _events(wanted: Wanted, tickets: list[Ticket], changes: Changes) -> AsyncIterator[str]:
    pieces = [Pieces(ticket) for ticket in tickets]
    open_ = set(range(len(tickets)))
    try:
        while open_:
            for i in sorted(open_):
                ticket, done = tickets[i], tickets[i].done
                text = pieces[i].next(last=done)
                if done:
                    open_.discard(i)
                if ticket.error is not None:
                    yield f"data: {json.dumps(_said(_status(ticket.error), str(ticket.error)))}\n\n"
                elif text or done:
                    choice = _choice(i, text, _reason(ticket.result(0)) if done else None)
                    yield f"data: {json.dumps({**_head(wanted, tickets), 'choices': [choice]})}\n\n"
            if open_:
                await changes.next()
        yield "data: [DONE]\n\n"
    except RefusedRequestError:  # nobody listens any more
        return
    finally:
        for ticket in tickets:
            ticket.cancel()


def _head(wanted: Wanted, tickets: list[Ticket]) -> dict[str, Any]:
    return {"id": f"cmpl-{id(tickets[0]):x}", "object": "text_completion", "created": int(time.time()), "model": wanted.model}


def _choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def _reason(result: Completion) -> str:
    """OpenAI's word; what the server ended has none."""
    if result.finish_reason not in REASONS:
        why = "it took too long" if result.finish_reason == "time_limit" else "the server was closed"
        raise ServingError(f"The text was not written to its end, as {why}: ask again later.")
    return result.finish_reason


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
