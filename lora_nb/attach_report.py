"""What `attach` says that it did: each module that matched, and how much there is to train."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lora_nb.configs import BottleneckConfig, LoraConfig
from lora_nb.render import html_table, text_table
from lora_nb.targets import Target, base_modules

COLUMNS = ["module", "method", "out × in", "rank", "scale", "parameters"]


@dataclass(frozen=True)
class MatchedModule:
    """One adapted module: shape (out, in) of its weight as a linear map, rank, scale, parameters added, and by which method.

    The rank is 0 for what is trained whole; `by_module` is False where parameters were named, not the module.
    """

    shape: tuple[int, int]
    rank: int
    scale: float
    parameters: int
    method: str = "LoRA"
    by_module: bool = True


@dataclass(frozen=True)
class AttachReport:
    """What `attach` did: the modules that matched, and how much there is to train."""

    name: str
    config: LoraConfig | BottleneckConfig
    matched: dict[str, MatchedModule]
    trainable: int
    total: int
    notes: tuple[str, ...] = ()

    def _title(self) -> str:
        share = 100 * self.trainable / self.total
        return f"adapter {self.name!r}: {len(self.matched)} modules, {self.trainable:,} of {self.total:,} parameters train ({share:.2f} %)"

    def _rows(self) -> list[tuple[str | int | float, ...]]:
        return [
            (n, m.method, f"{m.shape[0]} × {m.shape[1]}", m.rank or "–", m.scale if m.rank else "–", m.parameters)
            for n, m in self.matched.items()
        ]

    def __repr__(self) -> str:
        return "\n".join([self._title(), *self.notes, text_table(COLUMNS, self._rows())])

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{html.escape(note, quote=False)}</p>" for note in self.notes)
        title = html.escape(self._title(), quote=False)
        return f"<details open><summary><b>{title}</b></summary>{notes}{html_table(COLUMNS, self._rows())}</details>"


def report_of(model: nn.Module, name: str, config: LoraConfig | BottleneckConfig, targets: Sequence[Target]) -> AttachReport:
    """The report of an adapter that lies on these targets."""
    targets = [t for t in targets if t.parameters or t.shares]  # a tap has nothing to train
    matched = {t.name: MatchedModule(t.shape, t.r, t.scaling, t.parameters, t.what, by_module=bool(t.r) and not t.inside) for t in targets}
    total = sum(p.numel() for p in model.parameters())
    return AttachReport(name, config, matched, sum(t.parameters for t in targets), total, _ties(model, targets))


def _ties(model: nn.Module, targets: Sequence[Target]) -> tuple[str, ...]:
    """Where an adapter parts what the base ties together: it is what was asked for, but nobody should be surprised."""
    chosen = {t.name: t for t in targets}
    notes = []
    for path, module in base_modules(model):
        for t in targets:
            weight = t.module._parameters.get("weight")
            apart = path != t.name and not (path in chosen and (chosen[path].shares or t.shares))
            if apart and weight is not None and module._parameters.get("weight") is weight and t.what != "bias":
                notes.append(f"{t.name} shares its weight with {path} in the base; this adapter changes it for {t.name} alone.")
    return tuple(notes)
