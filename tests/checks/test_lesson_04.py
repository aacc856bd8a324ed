"""The judges of `04_rank` name the likely mistakes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checks.judging import is_named, is_right


def cut(matrix: Tensor, k: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :k] * s[:k] @ vt[:k]


def unscaled(matrix: Tensor, k: int) -> Tensor:
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :k] @ vt[:k]


def weakest(matrix: Tensor, k: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, -k:] * s[-k:] @ vt[-k:]


def smallest_as_good(losses: dict[int, float], tolerance: float) -> int:
    return min(r for r, loss in losses.items() if loss <= min(losses.values()) * (1 + tolerance))


RIGHT = {
    "04.1": cut,
    "04.2": lambda i, o: i * o // (i + o),
    "04.3": smallest_as_good,
    "04.4": 0.0025,
}


@pytest.mark.parametrize("number", RIGHT)
def test_right(number: str) -> None:
    is_right(number, RIGHT[number])


@pytest.mark.parametrize(
    ("number", "answer", "said"),
    [
        ("04.1", unscaled, "singular values"),
        ("04.1", weakest, "weakest"),
        ("04.1", lambda m, _: m, "nothing was cut off"),
        ("04.1", lambda m, k: m[:, :k], "multiply the cut parts"),
        ("04.1", lambda m, _k: torch.linalg.svd(m), "is a matrix"),
        ("04.1", lambda m, _k: m * 0, "rank 0"),
        ("04.2", lambda i, o: i * o / (i + o), "round down"),
        ("04.2", min, "long before"),
        ("04.2", lambda i, o: i * o, "what one rank costs"),
        ("04.2", lambda i, o: 2 * i * o // (i + o), "size of the layer"),
        ("04.2", lambda _i, _o: 100, "Below"),
        ("04.3", lambda losses, _t: min(losses, key=losses.get), "as good within"),
        ("04.3", lambda losses, _t: min(losses), "smallest of all"),
        ("04.3", lambda losses, _t: min(losses.values()), "that is a loss"),
        ("04.3", lambda _losses, _t: 16, "share of the lowest"),
        ("04.3", lambda _losses, _t: 99, "none of the ranks"),
        ("04.4", 0.04, "divided"),
        ("04.4", 0.01, "four times"),
        ("04.4", 0.1, "40 times"),
        ("04.4", "half", "a number"),
    ],
)
def test_mistakes(number: str, answer: Any, said: str) -> None:
    is_named(number, answer, said)
