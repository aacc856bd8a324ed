"""Live charts in a notebook: a run's loss, memory by part, ‖ΔW‖ by layer and module, adapters side by side.

Each is a widget without a server and without the network, written in TypeScript (`widgets/src/charts`) and compiled to
`static/`. Beside the widget stands a still picture, which a saved notebook and `nbconvert` show. Names of adapters, modules
and bases become text in the page, never markup.
"""

from __future__ import annotations

import re
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, Self

import anywidget
import traitlets
from torch import nn

from lora_nb.conflicts import inner, places
from lora_nb.factors import updates
from lora_nb.jupyter.watched import beside
from lora_nb.render import Cell, format_bytes, html_table, svg_curve, svg_heatmap, text_table
from lora_nb.training.run import Run

STATIC = Path(__file__).parent / "static"
STYLE = (STATIC / "charts.css").read_text(encoding="utf-8")
Named = Mapping[str, float]


def module(*names: str) -> str:
    """One module of several of ours, the last of which is the chart: anywidget takes a single text, where none can import."""
    text = "\n".join((STATIC / f"{name}.js").read_text(encoding="utf-8") for name in names)
    return re.sub(r"^import .*\n|^export (?!default)", "", text, flags=re.MULTILINE)


class Chart(anywidget.AnyWidget):
    """What all charts share: one style sheet, and a still picture beside the widget."""

    _css = STYLE

    def _repr_html_(self) -> str:
        raise NotImplementedError

    def __repr__(self) -> str:
        raise NotImplementedError

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return beside(super()._repr_mimebundle_(**kwargs), self._repr_html_(), repr(self))


class LossChart(Chart):
    """A run's loss, live.

        chart = LossChart()
        display(chart)
        ln.train(model, tokenizer, data, callbacks=[chart])

    Losses go to the browser as float32s, at most five times a second.
    """

    _esm = module("dom", "format", "curve", "loss")
    losses = traitlets.Bytes().tag(sync=True)
    held_out: traitlets.List[Any] = traitlets.List(help="(step, loss)").tag(sync=True)

    def __init__(self, losses: Iterable[float] = (), held_out: Iterable[tuple[int, float]] = ()) -> None:
        self._floats = array("f", losses)
        self._sent = 0.0
        super().__init__(losses=self._floats.tobytes(), held_out=[[step, _known(loss)] for step, loss in held_out])

    @classmethod
    def of(cls, run: Run) -> Self:
        """The chart of a run that is over."""
        return cls(run.losses, run.eval_losses)

    def __call__(self, step: Any) -> None:
        """A callback of `train`: adds the loss of a `Step`. A resumed run's first step leaves a gap before it."""
        self.add(step.step, step.loss)
        if step.step >= step.total:
            self.flush()

    def add(self, step: int, loss: float) -> None:
        """The loss of a step, counted from 1; what was there from that step on gives way."""
        del self._floats[step - 1 :]
        self._floats.extend([float("nan")] * (step - 1 - len(self._floats)))
        self._floats.append(loss)
        if time.monotonic() - self._sent >= 0.2:
            self.flush()

    def add_held_out(self, step: int, loss: float) -> None:
        """A held-out loss after a step."""
        points = {**dict(self.held_out), step: _known(loss)}
        self.held_out = [[at, points[at]] for at in sorted(points)]  # a resumed run says its first ones again

    def flush(self) -> None:
        """Send what waits."""
        self._sent = time.monotonic()
        self.losses = self._floats.tobytes()

    def _rows(self) -> list[tuple[str, Cell]]:
        there = [(i, loss) for i, loss in enumerate(self._floats, 1) if isfinite(loss)]
        rows: list[tuple[str, Cell]] = [("steps", len(self._floats))]
        rows += [(f"loss, step {i}", loss) for i, loss in dict.fromkeys((*there[:1], *there[-1:]))]
        return rows + [(f"held-out loss, step {i}", "–" if loss is None else loss) for i, loss in self.held_out]

    def _repr_html_(self) -> str:
        return svg_curve(self._floats, "training loss") + html_table(["loss", ""], self._rows())

    def __repr__(self) -> str:
        return text_table(["loss", ""], self._rows())


class MemoryChart(Chart):
    """Bytes by part as one stacked bar, with lines for cards: `MemoryChart(estimate.parts, {"T4": 16e9})`."""

    _esm = module("dom", "format", "memory")
    parts: traitlets.List[Any] = traitlets.List(help="(name, bytes)").tag(sync=True)
    cards: traitlets.List[Any] = traitlets.List(help="(name, bytes)").tag(sync=True)

    def __init__(self, parts: Named, cards: Named | None = None) -> None:
        super().__init__(parts=_pairs(parts), cards=_pairs(cards or {}))

    def update(self, parts: Named) -> None:
        """Other bytes on the same cards."""
        self.parts = _pairs(parts)

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return float(sum(size for _, size in self.parts))

    def _rows(self) -> list[tuple[str, str]]:
        parts = [(name, format_bytes(size)) for name, size in [*self.parts, ["in all", self.total]]]
        return parts + [(name, f"{format_bytes(size)}: {'fits' if size >= self.total else 'too small'}") for name, size in self.cards]

    def _repr_html_(self) -> str:
        total = self.total or 1.0
        starts = [sum(size for _, size in self.parts[:i]) for i in range(len(self.parts))]
        bar = "".join(
            f'<rect x="{420 * start / total:.1f}" width="{420 * size / total:.1f}" height="24" fill="currentColor" '
            f'fill-opacity="{0.25 + 0.5 * (i % 2)}"/>'
            for i, (start, (_, size)) in enumerate(zip(starts, self.parts, strict=True))
        )
        label = f"memory by part, {format_bytes(self.total)} in all"
        return f'<svg role="img" aria-label="{label}" width="420" height="24">{bar}</svg>' + html_table(["memory", ""], self._rows())

    def __repr__(self) -> str:
        return text_table(["memory", ""], self._rows())


class HeatMap(Chart):
    """A number for each module of each layer, of an adapter ‖ΔW‖: `HeatMap.of(model, "tone")`."""

    _esm = module("dom", "format", "heatmap")
    rows = traitlets.List(traitlets.Unicode()).tag(sync=True)
    columns = traitlets.List(traitlets.Unicode()).tag(sync=True)
    values: traitlets.List[Any] = traitlets.List(help="by row; None where there is nothing").tag(sync=True)
    label = traitlets.Unicode().tag(sync=True)

    def __init__(self, values: Named, label: str = "‖ΔW‖ by module and layer") -> None:
        """Args: values: by the module's path."""
        self.by_path = dict(values)
        super().__init__(label=label, **_grid(self.by_path))

    @classmethod
    def of(cls, model: nn.Module, name: str = "default") -> Self:
        """Of an attached adapter, without making ΔW.

        Raises:
            AdapterError: no such adapter, or one that does more than add B A to weights.
        """
        return cls(norms(model, name), f"‖ΔW‖ of {name}, by module and layer")

    def update(self, values: Named) -> None:
        """Other values, such as those of a later step."""
        self.by_path = dict(values)
        with self.hold_sync():
            for trait, value in _grid(self.by_path).items():
                setattr(self, trait, value)

    def _repr_html_(self) -> str:
        most = max(self.by_path.values(), default=0.0) or 1.0
        by = {(row, column): v / most for (row, column), v in self._cells().items()}
        return svg_heatmap(self.rows, self.columns, by, f"{self.label}, as a share of the largest, {most:.4g}")

    def _cells(self) -> dict[tuple[str, str], float]:
        by_path = places(list(self.by_path)) if self.by_path else {}
        return {by_path[path]: value for path, value in self.by_path.items()}

    def __repr__(self) -> str:
        return text_table(["module", "‖ΔW‖"], list(self.by_path.items()))


class AdapterCompare(Chart):
    """Adapters side by side: facts by adapter, `AdapterCompare({"tone": {"rank": 8}, "topics": {"rank": 4}})`."""

    _esm = module("dom", "format", "adapters")
    adapters = traitlets.List(traitlets.Unicode()).tag(sync=True)
    facts: traitlets.List[Any] = traitlets.List(help="(name, a value for each adapter)").tag(sync=True)
    label = traitlets.Unicode("Adapters side by side").tag(sync=True)

    def __init__(self, adapters: Mapping[str, Mapping[str, Cell]], label: str = "Adapters side by side") -> None:
        names = dict.fromkeys(fact for facts in adapters.values() for fact in facts)
        rows = [[name, [facts.get(name) for facts in adapters.values()]] for name in names]
        super().__init__(adapters=list(adapters), facts=rows, label=label)

    def _rows(self) -> list[Sequence[Cell]]:
        return [[name, *("–" if value is None else value for value in values)] for name, values in self.facts]

    def _repr_html_(self) -> str:
        return html_table(["", *self.adapters], self._rows(), self.label)

    def __repr__(self) -> str:
        return text_table(["", *self.adapters], self._rows())


def norms(model: nn.Module, name: str) -> dict[str, float]:
    """‖ΔW‖ (Frobenius) by the module's path: s √⟨BA, BA⟩, from products of r × r."""
    return {path: abs(f.scaling) * float(inner(f, f).clamp(min=0).sqrt()) for path, f in updates(model, name).items()}


def _pairs(sizes: Named) -> list[list[str | float]]:
    return [[name, size] for name, size in sizes.items()]


def _known(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if isfinite(value) else None


def _grid(by_path: Named) -> dict[str, Any]:
    """Rows, columns and values of the map."""
    at = places(list(by_path)) if by_path else {}
    rows, columns = (list(dict.fromkeys(place[i] for place in at.values())) for i in (0, 1))
    cells = {at[path]: _known(value) for path, value in by_path.items()}
    return {"rows": rows, "columns": columns, "values": [[cells.get((row, column)) for column in columns] for row in rows]}
