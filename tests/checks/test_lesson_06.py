"""The judges of `06_quantization` name the likely mistakes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checks.judging import is_named, is_right

OUTERMOST = 0.9677083


def nearest(block: Tensor, levels: Tensor, scale: Any = None) -> Tensor:
    scale = block.abs().max() if scale is None else scale
    return levels[(block[:, None] / scale - levels).abs().argmin(1)] * scale


def book(above: int = 9, below: int = 8, outermost: float = OUTERMOST, change: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    up = torch.special.ndtri(torch.linspace(outermost, 0.5, above, dtype=torch.float64)[:-1])
    down = -torch.special.ndtri(torch.linspace(outermost, 0.5, below, dtype=torch.float64)[:-1])
    levels = torch.cat([down, torch.zeros(1), up]).sort().values
    return change(levels / levels.max())


def bits(block: int, double: bool) -> float:
    return 4 + (8 / block + 32 / (block * 256) if double else 32 / block)


def normal_3() -> Tensor:
    levels = torch.special.ndtri(torch.linspace(1 / 16, 15 / 16, 8))
    return levels / levels.max()


@pytest.mark.parametrize(("number", "answer"), [("06.1", nearest), ("06.2", book), ("06.3", bits), ("06.4", normal_3)])
def test_right(number: str, answer: Any) -> None:
    is_right(number, answer)


@pytest.mark.parametrize(
    ("number", "answer", "said"),
    [
        ("06.1", lambda b, q: (b[:, None] / b.abs().max() - q).abs().argmin(1).float(), "indices"),
        ("06.1", lambda b, q: nearest(b, q) / b.abs().max(), "by the scale again"),
        ("06.1", lambda b, _q: b, "nothing was rounded"),
        ("06.1", lambda b, q: nearest(b, q, b.max()), "absolute value"),
        ("06.1", lambda b, q: nearest(b, q, 1.0), "most levels went unused"),
        ("06.1", lambda b, _q: b[:3], "8 numbers"),
        ("06.1", lambda b, _q: b * 2, "not the nearest"),
        ("06.2", lambda: [1.0], "of one dimension"),
        ("06.2", lambda: book(outermost=1.0), "infinite"),
        ("06.2", lambda: book(9, 9), "sixteen levels"),
        ("06.2", lambda: book(change=lambda x: x + 0.01), "zero is not among"),
        ("06.2", lambda: book(change=lambda x: x.flip(0)), "not in order"),
        ("06.2", lambda: book(change=lambda x: x * 1.848), "divide all of them"),
        ("06.2", lambda: book(change=lambda x: -x.flip(0)), "exchanged"),
        ("06.2", lambda: book(outermost=0.99), "should be"),
        ("06.3", lambda b, d: bits(b, d) - 4, "own 4 bits"),
        ("06.3", lambda b, d: 4 + (8 if d else 32) / b, "scales of the scales"),
        ("06.3", lambda b, _d: 4 + 32 / b, "gives them 8"),
        ("06.3", lambda b, d: 4 + (8 / b + 32 / 256 if d else 32 / b), "whole block"),
        ("06.3", lambda b, _d: 4 + 4 / b, "4 bytes"),
        ("06.3", lambda _b, _d: 16.0, "is right"),
        ("06.4", lambda: 3.0, "of one dimension"),
        ("06.4", lambda: torch.linspace(-1, 1, 16), "eight levels"),
        ("06.4", lambda: torch.linspace(-3, 3, 8), "between −1 and 1"),
        ("06.4", lambda: torch.linspace(-1, 1, 8), "eight even levels"),
        ("06.4", lambda: torch.linspace(-1, 1, 7), "the eighth is free"),
    ],
)
def test_mistakes(number: str, answer: Any, said: str) -> None:
    is_named(number, answer, said)
