"""The judges of `03_training` name the likely mistakes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.checks.judging import is_named, is_right


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda means, _: sum(means) / len(means), "mean of the means"),
        (lambda means, _: sum(means), "sum of the means"),
        (lambda means, counts: sum(m * c for m, c in zip(means, counts, strict=True)), "divide it by how many"),
        (lambda means, counts: sum(m * c for m, c in zip(means, counts, strict=True)) / len(means), "number of micro-batches"),
        (lambda *_: 7, "not 7.0000"),
    ],
)
def test_a_mean_over_tokens(answer: Callable[..., float], said: str) -> None:
    is_right("03.1", lambda m, c: sum(a * b for a, b in zip(m, c, strict=True)) / sum(c))
    is_named("03.1", answer, said)


def chunked(head: Any, hidden: Tensor, labels: Tensor, rows: int, reduction: str = "sum") -> Tensor:
    pieces = zip(torch.split(hidden, rows), torch.split(labels, rows), strict=True)
    return torch.stack([F.cross_entropy(head(x), y, reduction=reduction) for x, y in pieces]).sum()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda head, x, y, _: F.cross_entropy(head(x), y, reduction="sum"), "13 tokens at once"),
        (lambda head, x, y, rows: chunked(head, x, y, rows).item(), "this is a float"),
        (lambda head, x, y, rows: chunked(head, x, y, rows) / 13, "that is the mean"),
        (lambda head, x, y, rows: chunked(head, x[:12], y[:12], rows), "saw 12 of 13"),
        (lambda head, x, y, rows: chunked(head, x, y, rows, "mean"), "take reduction='sum'"),
        (lambda head, x, y, rows: chunked(head, x.detach(), y, rows), "no gradient reaches"),
        (lambda _head, x, *_: x.sum(), "never asked"),
    ],
)
def test_a_loss_in_chunks(answer: Callable[..., object], said: str) -> None:
    is_right("03.2", chunked)
    is_named("03.2", answer, said)


@pytest.mark.parametrize(
    ("wrong", "said"), [(2.0**-8, "in the middle"), (2.0**-10, "float16"), (0.5, "there is a smaller one"), (2.0**-9, "is 1 again")]
)
def test_the_smallest_step(wrong: float, said: str) -> None:
    is_right("03.3", 0.0078125)
    is_named("03.3", wrong, said)
