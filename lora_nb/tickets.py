"""A request to a server of adapters, as the one who asked sees it: a ticket that fills with text."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_nb.errors import LoraNbError
from lora_nb.render import html_table, text_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Completion:
    """What came of a request.

    `finish_reason` is `"stop"` (the text ended), `"length"` (`max_new_tokens`), `"cancelled"` or `"time_limit"`; times in seconds:
    waiting for a place in the batch, to the first token, and in all.
    """

    text: str
    adapter: str | None
    prompt_tokens: int
    tokens: int
    finish_reason: str
    waited: float
    first_token: float | None
    seconds: float

    def _rows(self) -> list[tuple[str, str]]:
        first = "–" if self.first_token is None else f"{self.first_token:.3f} s"
        return [
            ("text", self.text),
            ("adapter", self.adapter or "none: the base"),
            ("tokens", f"{self.prompt_tokens} in, {self.tokens} out, ended by {self.finish_reason}"),
            ("time", f"{self.waited:.3f} s waiting, {first} to the first token, {self.seconds:.3f} s in all"),
        ]

    def __repr__(self) -> str:
        return text_table(["completion", ""], self._rows())

    def _repr_html_(self) -> str:
        return html_table(["completion", ""], self._rows())


@dataclass(frozen=True)
class Asked:
    """The settings of a request, checked."""

    adapter: str | None
    prompt_ids: Sequence[int]
    max_new_tokens: int
    temperature: float
    seed: int
    deadline: float | None


@dataclass(eq=False)
class Ticket:
    """A request under way: iterate over it for the text as it comes, or ask for the `result`.

    `kept` is for how many tokens the server keeps keys and values.

    The server's thread calls `put` and `finish`; everything else may be called from anywhere.
    """

    asked: Asked
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    tokens: list[int] = field(default_factory=list)
    made: float = field(default_factory=time.monotonic)
    begun: float | None = None
    first: float | None = None
    ended: float | None = None
    finish_reason: str | None = None
    error: LoraNbError | None = None
    unwanted: bool = False
    kept: int = 0
    listener: Callable[[], None] | None = field(default=None, repr=False)
    _changed: threading.Condition = field(default_factory=threading.Condition, repr=False)

    @property
    def adapter(self) -> str | None:
        return self.asked.adapter

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    def cancel(self) -> None:
        """Stop as soon as the step under way is done; what was written until then is kept."""
        self.unwanted = True

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end.

        Raises:
            TimeoutError: it has not ended in so many seconds; it goes on.
            LoraNbError: what went wrong with the adapter or the server.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"The request has not ended in {timeout:g} s: wait longer, or cancel() it.")
        if self.error is not None:
            raise self.error
        assert self.ended is not None
        assert self.finish_reason is not None
        return Completion(
            self.text(),
            self.adapter,
            len(self.asked.prompt_ids),
            len(self.tokens),
            self.finish_reason,
            (self.begun or self.ended) - self.made,
            None if self.first is None else self.first - self.made,
            self.ended - self.made,
        )

    def text(self) -> str:
        """What there is so far."""
        return str(self.tokenizer.decode(self.tokens, skip_special_tokens=True))

    def __iter__(self) -> Iterator[str]:
        """The text piece by piece; a character of several tokens comes when it is whole."""
        pieces, seen = Pieces(self), 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda seen=seen: self.done or len(self.tokens) > seen)  # type: ignore[misc]
                seen, done = len(self.tokens), self.done
            if piece := pieces.next(last=done):
                yield piece
            if done:
                break
        if self.error is not None:
            raise self.error

    def put(self, token: int) -> None:
        """One more token."""
        with self._changed:
            self.tokens.append(token)
            self.first = self.first or time.monotonic()
            self._changed.notify_all()
        if self.listener is not None:
            self.listener()

    def finish(self, reason: str, error: LoraNbError | None = None) -> None:
        """No more tokens; the first reason stands."""
        with self._changed:
            if self.done:
                return
            self.finish_reason, self.error, self.ended = reason, error, time.monotonic()
            self._changed.notify_all()
        if self.listener is not None:
            self.listener()


class Pieces:
    """The text of a ticket since it was last asked for."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket, self.before, self.read = ticket, 0, 0

    def next(self, *, last: bool) -> str:
        """What is new, once it cannot change any more; `last`: all there is."""
        tokens, decode = self.ticket.tokens[:], self.ticket.tokenizer.decode
        # Decoded from a few tokens back: some tokenizers write a token differently at the start of a text.
        old = str(decode(tokens[self.before : self.read], skip_special_tokens=True))
        new = str(decode(tokens[self.before :], skip_special_tokens=True))
        if len(new) <= len(old) or (new.endswith("\ufffd") and not last):
            return ""
        self.before, self.read = self.read, len(tokens)
        return new[len(old) :]
