"""What `find_rank` found, and an adapter cut to it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from lora_nb.attach import adapters, attach, only_name, weights
from lora_nb.attach_report import AttachReport
from lora_nb.configs import LoraConfig
from lora_nb.rank.choice import Score
from lora_nb.rank.directions import Directions
from lora_nb.render import html_table, text_table

COLUMNS = ["rank", "held-out loss", "above the lowest", "± standard error", ""]


@dataclass(frozen=True)
class RankReport:
    """The smallest rank that is as good as any up to that of the run, and what speaks for it.

    `scores` are held-out losses by rank; `interval` is where the choice falls in nine of ten draws of the held-out examples.
    `rank_pattern` has the modules for which another rank than `rank` does as well, with `saving` as the share of the parameters
    that goes; it is empty where none could be saved. `examples` and `seconds` say what it took, `share` of the run's time;
    `base_loss` is the loss of the base alone, `directions` are the updates taken apart; `adapter` is the cut and polished adapter, if
    one was asked for, and `polished` its loss.
    """

    name: str
    rank: int
    interval: tuple[int, int]
    scores: dict[int, Score]
    ranks: dict[str, int]
    saving: float
    pattern_loss: float
    tolerance: float
    examples: int
    seconds: float
    share: float | None
    directions: dict[str, Directions] = field(repr=False)
    base_loss: float
    notes: tuple[str, ...] = ()
    adapter: str | None = None
    polished: float | None = None

    @property
    def rank_pattern(self) -> dict[str, int]:
        """For `LoraConfig(r=report.rank, rank_pattern=report.rank_pattern)`."""
        return {path: r for path, r in self.ranks.items() if r != self.rank}

    def _title(self) -> str:
        low, high = self.interval
        return f"rank {self.rank} is enough for adapter {self.name!r} (between {low} and {high} for other held-out examples)"

    def _said(self) -> list[str]:
        spent = "" if self.share is None else f", {self.share:.1%} of the run's time"
        saved = f"With ranks of their own the modules need {self.saving:.0%} fewer parameters for the same loss, {self.pattern_loss:.4f}."
        none = "No module could do with fewer ranks for the same loss."
        said = [saved if self.saving > 0 else none, f"Scored on {self.examples} held-out examples in {self.seconds:.1f} s{spent}."]
        if self.polished is not None:
            said.append(f"Cut to these ranks and trained on, as adapter {self.adapter!r}, it has the held-out loss {self.polished:.4f}.")
        return [*said, *self.notes]

    def _rows(self) -> list[tuple[str | int, ...]]:
        return [
            (r, f"{s.loss:.4f}", f"{s.above:.4f}", f"{s.error:.4f}", "chosen" if r == self.rank else "") for r, s in self.scores.items()
        ]

    def __repr__(self) -> str:
        return "\n".join([self._title(), *self._said(), text_table(COLUMNS, self._rows())])

    def _repr_html_(self) -> str:
        return html_table(COLUMNS, self._rows(), " ".join([f"{self._title()}.", *self._said()]))


def shrink(model: nn.Module, report: RankReport, name: str | None = None) -> AttachReport:
    """Add the adapter of the report once more, cut to the ranks that it found, and make that the active one.

    Args:
        name: of the new adapter. Default: `NAME-rK`.

    Raises:
        AdapterError: the name is taken, or the report's adapter is no longer there.
    """
    old = adapters(model).reports[only_name(model, report.name)]
    scaling = {path: part.scaling for path, part in weights(model, report.name).items()}
    assert isinstance(old.config, LoraConfig)  # find_rank refuses others
    made = attach(model, _config(old.config, report.ranks, scaling), name or f"{report.name}-r{report.rank}")
    with torch.no_grad():
        for path, part in weights(model, made.name).items():
            d, k = report.directions[path], report.ranks[path]
            # A and B of like size in each direction, as training would have them.
            size = d.right[:k].norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
            part.lora_A.copy_((d.right[:k] / size[:, None]).view_as(part.lora_A))
            part.lora_B.copy_((d.left[:, :k] * size).view_as(part.lora_B))
    return made


def _config(old: LoraConfig, ranks: Mapping[str, int], scaling: Mapping[str, float]) -> LoraConfig:
    """The old settings with these ranks, each module's scale as it was."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alphas = {path: s * (ranks[path] ** 0.5 if old.use_rslora else ranks[path]) for path, s in scaling.items()}
    alpha = Counter(a for path, a in alphas.items() if ranks[path] == rank).most_common(1)[0][0]
    return replace(
        old,
        r=rank,
        lora_alpha=alpha,
        rank_pattern={"^" + re.escape(path): r for path, r in ranks.items() if r != rank},
        alpha_pattern={"^" + re.escape(path): a for path, a in alphas.items() if a != alpha},
    )
