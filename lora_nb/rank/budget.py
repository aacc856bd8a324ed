"""Ranks for each module out of one budget of parameters: directions of all modules compete, the weightiest for its cost first.

AdaLoRA (Zhang et al., 2023, arXiv:2303.10512) does so while it trains; here it is done once, on what was trained.
"""

from __future__ import annotations

from collections.abc import Mapping

from lora_nb.rank.directions import Directions

NOTHING = 1e-6  # of a module's largest value: rounding


def budget(found: Mapping[str, Directions], rank: int) -> int:
    """Parameters that the adapter has at one rank for all."""
    return sum(d.cost * min(rank, d.rank) for d in found.values())


def allocate(found: Mapping[str, Directions], parameters: int) -> dict[str, int]:
    """Module → rank, at least 1, of no more than `parameters` in all (but for these first ones).

    A direction weighs what it adds to its module's output power, over the square root of that power: halfway between absolute (in
    which modules of large outputs take all) and relative. On the embedded base this lost the least.
    """
    ranks = dict.fromkeys(found, 1)
    left = parameters - sum(d.cost for d in found.values())
    weight = {path: 1 / (d.cost * max(d.power, 1e-30) ** 0.5) for path, d in found.items()}
    waiting = [(weight[path] * v * v, path) for path, d in found.items() for v in d.values.tolist()[1:] if v > NOTHING * float(d.values[0])]
    full: set[str] = set()
    for _, path in sorted(waiting, reverse=True):
        # Once a module's next direction finds no room, its later ones must not either: ranks are cut from the end.
        if path in full or found[path].cost > left:
            full.add(path)
            continue
        ranks[path] += 1
        left -= found[path].cost
    return ranks
