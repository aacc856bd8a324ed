"""Who is served next: the adapter that got least so far.

Each adapter has a counter of the tokens that were computed for it, and the next request is the oldest of the adapter whose counter
is lowest. One that comes back after a pause starts from the lowest counter of those that are there, so that it has saved
nothing up. (The virtual token counter of Sheng et al., 2024, arXiv:2401.00588.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Requests by the adapter that they ask for."""

    def __init__(self) -> None:
        self._waiting: dict[str | None, deque[T]] = {}
        self._served: dict[str | None, float] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[T]:
        return (one for line in list(self._waiting.values()) for one in list(line))

    def push(self, adapter: str | None, one: T, running: Iterable[str | None]) -> None:
        """Put a request at the end of its adapter's line; `running` are the adapters that are being served."""
        there = {*self._waiting, *running}
        if adapter not in there:
            least = min((self._served.get(name, 0.0) for name in there), default=0.0)
            self._served[adapter] = max(self._served.get(adapter, 0.0), least) if there else 0.0
        if not there:
            self._served = {adapter: 0.0}  # an idle server owes nobody anything, and remembers nobody
        self._waiting.setdefault(adapter, deque()).append(one)

    def order(self) -> list[str | None]:
        """Adapters that somebody waits for, the one that got least first."""
        return sorted(self._waiting, key=lambda name: self._served.get(name, 0.0))

    def first(self, adapter: str | None) -> T:
        """The oldest request of an adapter."""
        return self._waiting[adapter][0]

    def pop(self, adapter: str | None) -> T:
        """Take out the oldest request of an adapter."""
        one = self._waiting[adapter].popleft()
        if not self._waiting[adapter]:
            del self._waiting[adapter]
        return one

    def remove_if(self, unwanted: Callable[[T], bool]) -> list[T]:
        """Take out all requests for which that is so."""
        gone = [one for one in self if unwanted(one)]
        kept = {name: deque(one for one in line if not any(one is g for g in gone)) for name, line in self._waiting.items()}
        self._waiting = {name: line for name, line in kept.items() if line}
        return gone

    def charge(self, adapter: str | None, tokens: float) -> None:
        """Note that so many tokens were computed for an adapter."""
        self._served[adapter] = self._served.get(adapter, 0.0) + tokens
