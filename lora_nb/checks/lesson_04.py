"""Exercises of `04_rank`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_nb.checks.exercises import Mistake, exercise, value_of

NEAR = 1e-4  # rounding, and no more


def _is_near(found: Tensor, expected: Tensor) -> bool:
    return bool(found.shape == expected.shape and torch.allclose(found.double(), expected.double(), atol=NEAR))


@exercise(
    "04.1",
    "The nearest matrix of a given rank",
    difficulty=2,
    minutes=10,
    hints=(
        "torch.linalg.svd(matrix, full_matrices=False) gives U, S and Vᵀ, and matrix = U · diag(S) · Vᵀ, the largest values first.",
        "Keep the first k columns of U, the first k values and the first k rows of Vᵀ, and multiply them again.",
        "u[:, :k] * s[:k] scales column i of U by value i; then @ vt[:k].",
    ),
)
def nearest_of_rank(answer: Any) -> str:
    """The first k terms of the singular value decomposition."""
    matrix = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    for k in (2, 1, 4):
        found, right = value_of(answer, matrix.clone(), k), u[:, :k] * s[:k] @ vt[:k]
        if not isinstance(found, Tensor):
            raise Mistake(f"the answer is a matrix, and your function gave a {type(found).__name__}: multiply the three parts again.")
        if _is_near(found, right):
            continue
        if found.shape != matrix.shape:
            raise Mistake(f"a matrix of 7 × 5 should come back as 7 × 5, and yours is {tuple(found.shape)}: multiply the cut parts again.")
        if _is_near(found, u[:, :k] @ vt[:k]):
            raise Mistake("the directions are right, but each has length 1: the singular values that stretch them are missing.")
        if _is_near(found, u[:, -k:] * s[-k:] @ vt[-k:]):
            raise Mistake("these are the last k directions, the weakest; the strongest come first.")
        if _is_near(found, matrix):
            raise Mistake("that is the whole matrix: nothing was cut off.")
        raise Mistake(f"with k = {k} it has rank {int(torch.linalg.matrix_rank(found.float()))} and is not the nearest one.")
    return "no other matrix of that rank is nearer (Eckart and Young, 1936)."


@exercise(
    "04.2",
    "When is low rank no longer low?",
    difficulty=1,
    minutes=5,
    hints=(
        "An adapter has r × (inputs + outputs) numbers, the layer inputs × outputs.",
        "Set the two equal and solve for r; then round down.",
    ),
)
def break_even(answer: Any) -> str:
    """in · out / (in + out)."""
    for inputs, outputs in ((256, 256), (256, 576), (4096, 11008)):
        found, right = value_of(answer, inputs, outputs), inputs * outputs / (inputs + outputs)
        if found in (min(inputs, outputs), max(inputs, outputs)):
            raise Mistake("that is a size of the layer, the largest rank that its weight can have; an adapter costs as much long before.")
        if found == inputs * outputs:
            raise Mistake("that is how many numbers the layer has; divide by what one rank costs.")
        if abs(found - 2 * right) < 1:
            raise Mistake("twice too much: A has r × inputs numbers and B has outputs × r, so one rank costs inputs + outputs.")
        if found % 1 and right - 1 < found <= right:
            raise Mistake(f"a rank is a whole number, and {found:.4g} is none: round down.")
        if not right - 1 < found <= right:
            low = "Below" if found < right else "Above"
            cost, whole = found * (inputs + outputs), inputs * outputs
            raise Mistake(f"{low} the mark: at rank {found} an adapter of a {inputs} × {outputs} layer has {cost:,} numbers of {whole:,}.")
    return "a square layer breaks even at half its width: 128 for 256."


@exercise(
    "04.3",
    "Choose a rank from a sweep",
    difficulty=2,
    minutes=10,
    hints=(
        "Find the lowest loss first: min(losses.values()).",
        "A loss is as good if it is at most (1 + tolerance) times the lowest.",
        "Of all ranks whose loss is as good, take the smallest: min(r for r, loss in losses.items() if …).",
    ),
)
def choice(answer: Any) -> str:
    """The smallest rank within the tolerance of the lowest loss."""
    tables = (
        ({1: 2.1, 2: 1.6, 4: 1.104, 8: 1.1, 16: 1.102, 32: 1.3}, 0.005, 4),
        ({16: 3.01, 2: 9.0, 4: 3.1, 8: 3.0}, 0.01, 8),
        ({1: 0.52, 2: 0.51, 4: 0.5, 8: 0.53}, 0.03, 2),
    )
    for losses, tolerance, right in tables:
        found = value_of(answer, dict(losses), tolerance)
        if found == right:
            continue
        lowest = min(losses, key=lambda r: losses[r])
        if found == lowest:
            raise Mistake(f"rank {lowest} has the lowest loss, but rank {right} is as good within {tolerance:.1%} and costs less.")
        if found == min(losses):
            raise Mistake(f"rank {found} is the smallest of all, but its loss {losses[found]} is not within {tolerance:.1%} of the lowest.")
        if found in losses.values():
            raise Mistake("that is a loss; the answer is the rank that has it.")
        if found in losses:
            raise Mistake(
                f"of {losses} with a tolerance of {tolerance:.1%} your function takes rank {found}, and {right} is right. "
                "A tolerance is a share of the lowest loss, not a number of its own; ranks may come in any order."
            )
        raise Mistake(f"{found!r} is none of the ranks {sorted(losses)}.")
    return "this is the rule that find_rank uses, with one addition: a loss within one standard error is as good, too."


@exercise(
    "04.4",
    "The same training with another α",
    difficulty=3,
    minutes=10,
    hints=(
        "The update is (α/r) · B · A. With α four times as large, B must be a quarter for the same update.",
        "Adam moves each number by about its learning rate, however large the gradient is.",
        "So B's rate is divided by what α was multiplied with.",
    ),
)
def rate_of_b(answer: Any) -> str:
    """0.01 · 16 / 64."""
    right = 0.01 * 16 / 64
    if not isinstance(answer, int | float):
        raise Mistake(f"a learning rate is a number, not a {type(answer).__name__}.")
    wrong = {
        0.04: "multiplied where it should be divided: the scale is larger, so B has to move less.",
        0.01: "with the old rate B grows as before, and the update becomes four times as large.",
        0.005: "that would be right for α/√r scaled by its root; the update is proportional to α itself.",
        0.01 / 16: "16 is the square of what α grew by: the gradient grows as well, but Adam divides by its size.",
    }
    for value, why in wrong.items():
        if abs(answer - value) < 1e-9:
            raise Mistake(why)
    if abs(answer - right) > 1e-9:
        raise Mistake(f"α grew fourfold, so with a rate of {answer} the update would be {answer / right:.3g} times as large.")
    return "0.0025: α is a learning rate of B by another name."
