"""The smallest rank that is as good as any, from held-out losses of the same examples at several ranks.

The losses of two ranks are compared example by example: examples differ far more from each other than an example does between
ranks, and in the difference what makes an example hard falls out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 1000
COVERED = 0.9  # of the resamples lie in the interval


@dataclass(frozen=True)
class Losses:
    """Held-out loss of each example at one rank: its sum (n,), and the number of tokens in it (n,)."""

    sums: Tensor
    tokens: Tensor

    @property
    def mean(self) -> float:
        return float(self.sums.sum() / self.tokens.sum())


@dataclass(frozen=True)
class Score:
    """Held-out loss at one rank, how far it is above the lowest of all ranks, and the standard error of that difference."""

    loss: float
    above: float
    error: float


def search(losses: Callable[[int], Losses], most: int, tolerance: float) -> tuple[int, dict[int, Losses]]:
    """The smallest rank up to `most` that is as good as the best, and the losses at all ranks that were tried on the way.

    First ranks twice as large from one to the next, then the gap below the choice is halved until it is closed.
    """
    table = {r: losses(r) for r in ladder(most)}
    while True:
        chosen = choose(table, tolerance)
        below = max((r for r in table if r < chosen), default=0)
        if chosen - below <= 1:
            return chosen, dict(sorted(table.items()))
        middle = (below + chosen) // 2
        table[middle] = losses(middle)


def ladder(most: int) -> list[int]:
    """1, 2, 4, 8, … and `most` itself."""
    return [2**i for i in range((most - 1).bit_length())] + [most]


def scores(table: Mapping[int, Losses]) -> dict[int, Score]:
    """Each rank against the one with the lowest loss."""
    best = min(table, key=lambda r: table[r].mean)
    return {r: compared(found, table[best]) for r, found in sorted(table.items())}


def as_good(score: Score, lowest: float, tolerance: float) -> bool:
    """Whether a loss is within one standard error, or within the share `tolerance`, of the lowest."""
    return score.above <= max(score.error, tolerance * abs(lowest))


def choose(table: Mapping[int, Losses], tolerance: float) -> int:
    """The smallest rank that is as good as the best."""
    found = scores(table)
    lowest = min(s.loss for s in found.values())
    return min(r for r, s in found.items() if as_good(s, lowest, tolerance))


def interval(table: Mapping[int, Losses], tolerance: float, chosen: int) -> tuple[int, int]:
    """Between which ranks the choice falls in nine of ten draws of as many held-out examples, with replacement, from these."""
    ranks = sorted(table)
    sums, tokens = torch.stack([table[r].sums for r in ranks]).double(), table[ranks[0]].tokens.double()  # (ranks, n), (n,)
    n = len(tokens)
    drawn = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(0))
    times = torch.zeros(RESAMPLES, n, dtype=torch.double).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.double))
    means = (times @ sums.T) / (times @ tokens)[:, None]  # (resamples, ranks)
    found = scores(table)
    room = torch.tensor([max(found[r].error, tolerance * abs(found[r].loss - found[r].above)) for r in ranks], dtype=torch.double)
    fits = means - means.min(1, keepdim=True).values <= room
    picks = torch.tensor(ranks, dtype=torch.double)[fits.int().argmax(1)]
    tail = (1 - COVERED) / 2
    low, high = torch.quantile(picks, torch.tensor([tail, 1 - tail], dtype=torch.double), interpolation="nearest").int().tolist()
    return min(low, chosen), max(high, chosen)


def compared(found: Losses, best: Losses) -> Score:
    """A loss against another on the same examples."""
    tokens, total = found.tokens.double(), float(found.tokens.sum())
    difference = found.sums.double() - best.sums.double()
    above = float(difference.sum()) / total
    # Of a ratio of sums, Σ dᵢ / Σ nᵢ, by its usual linearisation.
    n = len(tokens)
    error = float((difference - above * tokens).square().sum() * n / (n - 1)) ** 0.5 / total if n > 1 else 0.0
    return Score(found.mean, above, error)
