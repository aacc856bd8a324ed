"""How a run hears that it is to stop: the keyboard's or the notebook's interrupt, SIGTERM, a Stop from another thread."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

Handler = Any  # what signal.signal takes and gives


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception that the loop catches as it catches an interrupt."""


@contextmanager
def heeded() -> Iterator[None]:
    """SIGTERM raises `Terminated` within; what the process did about it before is put back."""

    def stop(_number: int, _frame: FrameType | None) -> NoReturn:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # only there can signals be caught
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        _put_back({signal.SIGTERM: before})


@contextmanager
def whole() -> Iterator[None]:
    """What stands within is done whole: a signal that comes meanwhile takes effect after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    before: dict[int, Handler] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda n, _frame: caught.append(n))
        yield
    finally:
        _put_back(before)
        for came in dict.fromkeys(caught):
            signal.raise_signal(came)


def _put_back(handlers: dict[int, Handler]) -> None:
    for number, handler in handlers.items():
        if handler is not None:  # None: set from outside of Python, which cannot be put back
            signal.signal(number, handler)
