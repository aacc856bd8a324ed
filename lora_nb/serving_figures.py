"""What a server of adapters has to say of its work."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from lora_nb.render import Cell, format_bytes, html_table, text_table
from lora_nb.tickets import Ticket

COLUMNS = ["adapter", "requests", "done", "cancelled", "late", "failed", "tokens", "waited s", "first token s", "loads"]


@dataclass
class AdapterFigures:
    """Of one adapter: requests by how they ended, tokens written, seconds that requests waited and had to their first token, in all."""

    done: int = 0
    cancelled: int = 0
    late: int = 0
    failed: int = 0
    tokens: int = 0
    waited: float = 0.0
    first: float = 0.0
    started: int = 0

    @property
    def requests(self) -> int:
        """All that have ended."""
        return self.done + self.cancelled + self.late + self.failed

    def ended(self, ticket: Ticket) -> None:
        """Count a request in."""
        field = {"cancelled": "cancelled", "time_limit": "late", "error": "failed"}.get(str(ticket.finish_reason), "done")
        setattr(self, field, getattr(self, field) + 1)
        if ticket.ended is not None:
            self.waited += (ticket.begun or ticket.ended) - ticket.made
        if ticket.first is not None:
            self.first += ticket.first - ticket.made
            self.started += 1

    def copy(self) -> AdapterFigures:
        """As it is now."""
        return replace(self)


@dataclass(frozen=True)
class ServerFigures:
    """Figures by adapter, and the state of the server: seconds open, steps made, requests running and waiting, adapters by tier.

    `loads` counts how often an adapter was read from disk; `kept_bytes` is the memory of keys and values.
    """

    adapters: dict[str, AdapterFigures]
    seconds: float
    steps: int
    running: int
    waiting: int
    in_slots: list[str]
    in_host: list[str]
    loads: dict[str, int] = field(default_factory=dict)
    kept_bytes: int = 0

    @property
    def tokens(self) -> int:
        return sum(f.tokens for f in self.adapters.values())

    def _rows(self) -> list[list[Cell]]:
        return [
            [
                name,
                f.requests,
                f.done,
                f.cancelled,
                f.late,
                f.failed,
                f.tokens,
                f.waited / max(1, f.requests),
                f.first / max(1, f.started),
                self.loads.get(name, 0),
            ]
            for name, f in sorted(self.adapters.items(), key=lambda pair: -pair[1].tokens)
        ]

    def _title(self) -> str:
        return (
            f"{self.tokens:,} tokens in {self.steps:,} steps and {self.seconds:.1f} s; {self.running} running, {self.waiting} "
            f"waiting; {len(self.in_slots)} adapters in slots, {len(self.in_host)} in host memory; "
            f"{format_bytes(self.kept_bytes)} of keys and values"
        )

    def __repr__(self) -> str:
        return self._title() + "\n" + text_table(COLUMNS, self._rows())

    def _repr_html_(self) -> str:
        return html_table(COLUMNS, self._rows(), self._title())
