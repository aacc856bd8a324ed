"""The exercises on latency: each likely mistake is named."""

# ruff: noqa: ARG005 - a wrong answer leaves something out

import math
from statistics import fmean, median
from typing import Any

import pytest

from tests.checks.judging import is_named, is_right


def crossover(start: float, row: float, extra_start: float, extra_row: float, limit: float) -> float:
    if limit * start >= extra_start and limit * row >= extra_row:
        return 1
    return math.inf if limit * row <= extra_row else max(1, math.ceil((extra_start - limit * start) / (limit * row - extra_row)))


def unrounded(start: float, row: float, extra_start: float, extra_row: float, limit: float) -> float:
    return (extra_start - limit * start) / (limit * row - extra_row)


@pytest.mark.parametrize(
    ("number", "wrong", "said"),
    [
        ("08.1", lambda a, b: fmean(x / y for x, y in zip(a, b, strict=True)), "the mean of the ratios"),
        ("08.1", lambda a, b: fmean(a) / fmean(b), "ratio of the means"),
        ("08.1", lambda a, b: median(a) / median(b), "ratio of the medians"),
        ("08.1", lambda a, b: min(a) / min(b), "different rounds"),
        ("08.1", lambda a, b: median(y / x for x, y in zip(a, b, strict=True)), "turn it round"),
        ("08.1", lambda a, b: 7.0, "1.2 times as long"),
        ("08.2", lambda i, o, r: r * (i + o), "divide it"),
        ("08.2", lambda i, o, r: 1 + r * (i + o) / (i * o), "take 1 away"),
        ("08.2", lambda i, o, r: r / o, "A alone"),
        ("08.2", lambda i, o, r: r / i, "B alone"),
        ("08.2", lambda i, o, r: r, "not formed"),
        ("08.2", lambda i, o, r: 8 * (256 + 576) / (256 * 576), "not fixed sizes"),
        ("08.3", lambda *case: 3, "not quite enough"),
        ("08.3", lambda *case: 4, "it is 7"),
        ("08.3", lambda *case: crossover(*case) if crossover(*case) < math.inf else 10**6, "no number of rows is enough"),
        ("08.3", unrounded, "round up"),
        ("08.3", lambda *case: crossover(*case) if crossover(*case) > 1 else 0, "at least one row"),
        ("08.3", lambda *case: "many", "a number of rows"),
        ("08.4", {"LoRA"}, "'DoRA' is missing"),
        ("08.4", {"LoRA", "DoRA", "Pfeiffer"}, "bends"),
        ("08.4", "LoRA", "a set of names"),
        ("08.4", {"NF4"}, "none of the names"),
    ],
)
def test_mistakes_are_named(number: str, wrong: Any, said: str) -> None:
    is_named(number, wrong, said)


@pytest.mark.parametrize(
    ("number", "right"),
    [
        ("08.1", lambda a, b: median(x / y for x, y in zip(a, b, strict=True))),
        ("08.2", lambda i, o, r: r / i + r / o),
        ("08.3", crossover),
        ("08.4", ["DoRA", "LoRA"]),
    ],
)
def test_right_answers_pass(number: str, right: Any) -> None:
    is_right(number, right)
