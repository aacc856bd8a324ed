"""Ranks out of one budget, on directions made by hand."""

import torch

from lora_nb.rank.budget import allocate, budget
from lora_nb.rank.directions import Directions


def module(values: list[float], out: int = 4, fan_in: int = 6, power: float = 1.0) -> Directions:
    r = len(values)
    return Directions(torch.zeros(out, r), torch.zeros(r, fan_in), torch.tensor(values), power)


def test_the_weightiest_directions_win() -> None:
    found = {"a": module([9.0, 8.0, 7.0, 0.1]), "b": module([5.0, 0.3, 0.2, 0.1])}
    assert budget(found, 2) == 2 * 2 * 10
    assert allocate(found, budget(found, 2)) == {"a": 3, "b": 1}


def test_each_keeps_one_and_no_budget_is_overdrawn() -> None:
    found = {"a": module([9.0, 8.0]), "b": module([0.0, 0.0]), "c": module([1.0, 0.9], out=40)}
    assert allocate(found, 0) == {"a": 1, "b": 1, "c": 1}
    for parameters in range(66, 200, 7):
        ranks = allocate(found, parameters)
        assert sum(found[p].cost * r for p, r in ranks.items()) <= parameters


def test_large_directions_pay_for_their_size_and_loud_modules_for_their_loudness() -> None:
    found = {"small": module([2.0, 1.0]), "large": module([2.0, 1.0], out=14, fan_in=6)}
    assert allocate(found, 30 + 10) == {"small": 2, "large": 1}
    found = {"quiet": module([2.0, 1.0], power=1.0), "loud": module([2.0, 1.9], power=100.0)}
    assert allocate(found, 20 + 10) == {"quiet": 2, "loud": 1}  # 1/1 against 3.61/10


def test_ranks_are_cut_from_the_end() -> None:
    """A dear module's second direction finds no room, so its third, however it ranks, gets none."""
    found = {"dear": module([3.0, 2.9, 2.8], out=90), "cheap": module([1.0, 0.5, 0.4])}
    assert allocate(found, 96 + 10 + 20) == {"dear": 1, "cheap": 3}


def test_a_module_of_lower_rank_counts_with_what_it_has() -> None:
    assert budget({"a": module([1.0] * 4), "b": module([1.0] * 2)}, 3) == 10 * (3 + 2)
