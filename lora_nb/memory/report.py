"""What a step or a run takes, part by part, and where it fits."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lora_nb.memory.cards import AS_OF, CARDS, Card, card
from lora_nb.render import format_bytes, html_table, text_table

ROOM = 1.05  # what the allocator loses by fragments: 2 to 10 %, by pattern of sizes
MOST = 8  # cards named in a report
BESIDE = ("CUDA context",)  # of the card, but not of torch's allocator


@dataclass(frozen=True)
class Change:
    """One thing to do otherwise, what it leads to, and what it costs."""

    what: str
    total: int
    price: str = ""


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak, part by part.

    Args:
        what: model and method in words.
        parts: name → bytes, at the moment when most is there.
        formula: name → how they come about, also of parts that are not there at the peak.
        assumptions: what the numbers rest on.
        timeline: (moment, bytes part by part) over the step, in order.
        modules: bytes by module at the peak; of `trace_memory` only.
    """

    what: str
    parts: Mapping[str, int]
    formula: Mapping[str, str]
    assumptions: tuple[str, ...]
    timeline: tuple[tuple[str, Mapping[str, int]], ...] = ()
    modules: Mapping[str, int] = field(default_factory=dict)
    changes: Callable[[], list[Change]] = field(default=list, repr=False, compare=False)

    @property
    def total(self) -> int:
        """Bytes of the card that are taken at the peak."""
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """Of these, what `torch.cuda.max_memory_allocated()` would say."""
        return sum(count for name, count in self.parts.items() if name not in BESIDE)

    def fits(self, on: str | Card) -> bool:
        """Whether a card holds it, with 5 % left for fragments.

        Raises:
            ConfigError: there is no such card in the table.
        """
        return self.total * ROOM <= card(on).bytes

    def cards(self) -> list[Card]:
        """The cards that hold it, the smallest first."""
        return sorted((c for c in CARDS.values() if self.fits(c)), key=lambda c: c.mib)

    def advice(self, on: str | Card) -> list[Change]:
        """What to change for it to fit on a card: nothing, the first single change that does, or all up to the one that does.

        The changes are ordered by how little they touch: first those that leave the result as it is.

        Raises:
            ConfigError: there is no such card in the table.
        """
        limit = card(on).bytes
        if self.fits(on):
            return []
        single = [change for change in self.changes() if not change.what.startswith("and ")]
        enough = next((change for change in single if change.total * ROOM <= limit), None)
        if enough:
            return [enough]
        together = [change for change in self.changes() if change.what.startswith("and ")]
        upto = next((i for i, change in enumerate(together) if change.total * ROOM <= limit), len(together) - 1)
        return together[: upto + 1]

    def _title(self) -> str:
        return f"{self.what}: {format_bytes(self.total)}"

    def _rows(self) -> list[tuple[str, str, str]]:
        return [(name, format_bytes(count), self.formula.get(name, "")) for name, count in self.parts.items()]

    def _fit(self) -> str:
        there = [c.name for c in self.cards()]
        more = f", … and {len(there) - MOST} larger" if len(there) > MOST else ""
        return f"fits on (table of {AS_OF}): {', '.join(there[:MOST]) + more if there else 'none of the cards known here'}"

    def __repr__(self) -> str:
        rows = text_table(["part", "at the peak", "formula"], self._rows())
        return "\n".join([self._title(), rows, self._fit(), *(f"- {a}" for a in self.assumptions)])

    def _repr_html_(self) -> str:
        listed = "".join(f"<li>{html.escape(a, quote=False)}</li>" for a in self.assumptions)
        table = html_table(["part", "at the peak", "formula"], self._rows())
        fit = html.escape(self._fit(), quote=False)
        title = html.escape(self._title(), quote=False)
        return f"<b>{title}</b>{_bar(self.parts)}{table}<p>{fit}</p><details><summary>assumptions</summary><ul>{listed}</ul></details>"


COLOURS = {
    "weights": "#4c78a8",
    "adapters": "#72b7b2",
    "gradients": "#eeca3b",
    "optimizer": "#b279a2",
    "activations": "#f58518",
    "logits": "#e45756",
    "workspace": "#ff9da6",
    "KV cache": "#54a24b",
    "CUDA context": "#9d9d9d",
}


def _bar(parts: Mapping[str, int]) -> str:
    """One bar, each part with its name and size in a tooltip."""
    total = sum(parts.values()) or 1
    cells = "".join(
        f'<div title="{html.escape(name)}: {format_bytes(count)}" style="background:{COLOURS.get(name, "#888")};'
        f'width:{100 * count / total:.2f}%"></div>'
        for name, count in parts.items()
    )
    said = html.escape(", ".join(f"{name} {format_bytes(count)}" for name, count in parts.items()))
    return f'<div role="img" aria-label="{said}" style="display:flex;height:14px;max-width:640px">{cells}</div>'
