"""What goes back for a request: the texts as OpenAI's JSON, whole or event by event as they grow, and errors with their status."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lora_nb.errors import AdapterError, ConfigError, LoraNbError, QueueFullError, ServingError
from lora_nb.http_request import RefusedRequestError, Wanted
from lora_nb.tickets import Completion, Pieces, Ticket

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

REASONS = ("stop", "length")


def refusal(error: LoraNbError) -> tuple[int, dict[str, Any]]:
    """Status and body of an answer that is an error."""
    kinds = {AdapterError: 404, ConfigError: 400, QueueFullError: 429, ServingError: 503}
    own = error.status if isinstance(error, RefusedRequestError) else None
    status = own or next((status for kind, status in kinds.items() if isinstance(error, kind)), 422)
    kind = "invalid_request_error" if status < 500 else "server_error"
    return status, {"error": {"message": str(error), "type": kind, "param": None, "code": status}}


async def answer(request: Request, wanted: Wanted, tickets: list[Ticket]) -> Response:
    """The texts once they are written, or as a stream of events.

    Raises:
        LoraNbError: why there is none, as long as the status can still say so.
    """
    from starlette.responses import JSONResponse, StreamingResponse

    changes = Changes(request, tickets)
    if wanted.stream:
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
                    yield f"data: {json.dumps(refusal(ticket.error)[1])}\n\n"
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
