"""The exercises on merging: each likely mistake is named."""

# ruff: noqa: ARG005 - a wrong answer leaves something out

from typing import Any

import pytest
import torch

from tests.checks.judging import is_named, is_right

RIGHT = {"Ana": "dequantized", "Ben": "beside", "Chloé": "requantized"}


def product(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum())


@pytest.mark.parametrize(
    ("number", "wrong", "said"),
    [
        ("07.1", lambda W, A, B, alpha, r: W + B @ A, "scale α/r is missing"),
        ("07.1", lambda W, A, B, alpha, r: W + alpha * (B @ A), "divide it by r"),
        ("07.1", lambda W, A, B, alpha, r: alpha / r * (B @ A), "without the weight"),
        ("07.1", lambda W, A, B, alpha, r: W - alpha / r * (B @ A), "subtracted"),
        ("07.1", lambda W, A, B, alpha, r: W + alpha / r**0.5 * (B @ A), "rsLoRA"),
        ("07.1", lambda W, A, B, alpha, r: A @ B, "RuntimeError"),
        ("07.1", lambda W, A, B, alpha, r: A, "shape of W"),
        ("07.1", lambda W, A, B, alpha, r: 2 * W + B @ A, "the numbers are not"),
        ("07.2", 2**-7, "whole spacing"),
        ("07.2", 2**-11, "float16"),
        ("07.2", 2**-9, "a larger one does so too"),
        ("07.2", 0.005, "so it arrives"),
        ("07.2", "half", "is a number"),
        ("07.3", lambda b, w, a: product(a - b, w - b) / float((a - b).norm() * (w - b).norm()), "cosine"),
        ("07.3", lambda b, w, a: float((a - b).norm() / (w - b).norm()), "noise counts"),
        ("07.3", lambda b, w, a: product(a, w) / product(w, w), "take `before` away"),
        ("07.3", lambda b, w, a: product(a - b, w - b) / product(a - b, a - b), "of what was wanted, squared"),
        ("07.3", lambda b, w, a: 0.5, "the share is 1"),
        ("07.4", RIGHT | {"Ana": "original"}, "made up for the rounding"),
        ("07.4", RIGHT | {"Ben": "requantized"}, "does not survive"),
        ("07.4", RIGHT | {"Chloé": "beside"}, "knows no adapters"),
        ("07.4", RIGHT | {"Ben": "nowhere"}, "the choices are"),
        ("07.4", {"Ana": "dequantized"}, "an entry for each"),
    ],
)
def test_mistakes_are_named(number: str, wrong: Any, said: str) -> None:
    is_named(number, wrong, said)


@pytest.mark.parametrize(
    ("number", "right"),
    [
        ("07.1", lambda W, A, B, alpha, r: torch.addmm(W, B, A, alpha=alpha / r)),
        ("07.2", 0.00390625),
        ("07.3", lambda b, w, a: product(a - b, w - b) / product(w - b, w - b)),
        ("07.4", RIGHT),
    ],
)
def test_right_answers_pass(number: str, right: Any) -> None:
    is_right(number, right)
