"""Exercises of `03_training`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_nb.checks.exercises import Mistake, exercise, value_of


@exercise(
    "03.1",
    "A mean over tokens",
    difficulty=1,
    minutes=5,
    hints=(
        "The sum of a micro-batch's losses is its mean times its count.",
        "Add these sums up, and divide by the sum of the counts.",
    ),
)
def combined(answer: Callable[..., Any]) -> str:
    """Σ mean · count / Σ count."""
    means, counts = [2.0, 3.0, 5.0], [30, 10, 1]
    value = value_of(answer, means, counts)
    right = sum(m * c for m, c in zip(means, counts, strict=True)) / sum(counts)
    likely = {
        sum(means) / 3: "that is the mean of the means: a token of a short text would count for more",
        sum(means): "that is the sum of the means",
        right * sum(counts): "that is the sum over all tokens; divide it by how many there are",
        right * sum(counts) / 3: "divided by the number of micro-batches; divide by the number of tokens",
    }
    if not math.isclose(float(value), right, rel_tol=1e-6):
        said = next((text for wrong, text in likely.items() if math.isclose(float(value), wrong, rel_tol=1e-6)), None)
        raise Mistake((said or f"for means {means} and counts {counts} it is {right:.4f}, not {float(value):.4f}") + ".")
    return f"means {means} of {counts} tokens are {right:.3f} together; the mean of the means would be {sum(means) / 3:.3f}."


@exercise(
    "03.2",
    "A loss in chunks",
    difficulty=3,
    minutes=15,
    hints=(
        "torch.split(hidden, rows) gives the chunks, the last one perhaps shorter; split the labels in the same way.",
        "For each pair (x, y) of chunks add F.cross_entropy(head(x), y, reduction='sum').",
    ),
)
def chunked_loss(answer: Callable[..., Any]) -> str:
    """The plain loss, no call of the head above `rows`."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(13, 6, generator=generator), torch.randn(11, 6, generator=generator)
    labels, asked = torch.randint(11, (13,), generator=generator), list[int]()

    def head(x: Tensor) -> Tensor:
        asked.append(len(x))
        return x @ weight.T

    hidden.requires_grad_()
    value = value_of(answer, head, hidden, labels, 4)
    right = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    if not isinstance(value, Tensor):
        raise Mistake(f"give back the loss as a tensor, so that it has a gradient; this is a {type(value).__name__}.")
    if max(asked, default=0) > 4:
        raise Mistake(f"`head` was asked for {max(asked)} tokens at once; at most 4 were allowed.")
    if not asked:
        raise Mistake("`head` was never asked.")
    if not torch.allclose(value, right):
        raise Mistake(_off(float(value.detach()), float(right.detach()), sum(asked)))
    if not value.requires_grad:
        raise Mistake("the value is right, but no gradient reaches the hidden states: is there a detach, item or no_grad?")
    return f"the plain loss, from {len(asked)} calls of at most {max(asked)} tokens."


def _off(value: float, right: float, seen: int) -> str:
    if math.isclose(value, right / 13, rel_tol=1e-5):
        return "that is the mean; the sum was asked for."
    if seen < 13:
        return f"`head` saw {seen} of 13 tokens: the last chunk is shorter than the others, and belongs to it."
    return f"the loss is {right:.4f}, yours {value:.4f}: take reduction='sum' in each chunk, since chunks differ in size."


@exercise(
    "03.3",
    "The smallest step in bfloat16",
    difficulty=2,
    minutes=8,
    hints=(
        "one = torch.tensor(1.0).bfloat16(); is one + 2.0**-k equal to one? Try k = 1, 2, 3, …",
        "bfloat16 has 7 binary digits after the point; half of the last is rounded to the even neighbour, which is 1.",
    ),
)
def smallest_step(answer: Any) -> str:
    """2⁻⁷."""
    if not isinstance(answer, int | float) or isinstance(answer, bool):
        raise Mistake(f"the answer is a number here, such as 2.0**-3, and {type(answer).__name__} is none.")
    likely = {
        2.0**-8: "1 + 2⁻⁸ lies in the middle between two numbers, and is rounded to 1",
        2.0**-10: "that is float16, which has 10 binary digits after the point",
        2.0**-23: "that is float32",
        7.0: "that is the number of digits; the step is a power of two",
    }
    if answer != 2.0**-7:
        said = likely.get(float(answer))
        kept = bool(torch.tensor(1.0).bfloat16() + answer == 1)
        raise Mistake((said or (f"1 + {answer:g} is 1 again" if kept else f"1 + {answer:g} is not 1, but there is a smaller one")) + ".")
    return "1 + 1/128 is the next number after 1: a step of less than 1/256 of a weight is lost."
