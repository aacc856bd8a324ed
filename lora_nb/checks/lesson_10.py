"""Exercises of `10_combining`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lora_nb.checks.exercises import Mistake, exercise, value_of


@exercise(
    "10.1",
    "Side by side",
    difficulty=3,
    minutes=10,
    hints=(
        "The rows of A belong to the columns of B: the first r rows of the new A are A1, the first r columns of the new B are B1.",
        "Join the A's below each other (dim 0) and the B's side by side (dim 1). Each weight and scale must come in exactly once.",
        "`torch.cat([w1 * s1 * A1, w2 * s2 * A2], 0), torch.cat([B1, B2], 1)`",
    ),
)
def side_by_side(answer: Any) -> str:
    """Two adapters of different ranks, scales and weights, one of these negative."""
    random = torch.Generator().manual_seed(0)
    A1, B1, A2, B2 = (torch.randn(*size, generator=random) for size in ((2, 7), (5, 2), (3, 7), (5, 3)))
    found = value_of(answer, A1.clone(), B1.clone(), 1.5, 0.5, A2.clone(), B2.clone(), 2.0, -0.25)
    if not isinstance(found, tuple | list) or len(found) != 2 or not all(isinstance(m, torch.Tensor) for m in found):
        raise Mistake("the answer is a pair of matrices, (A, B).")
    A, B = found
    if (A.shape, B.shape) == ((5, 5), (5, 7)):
        raise Mistake("these are (B, A); give A first.")
    if A.shape != (5, 7) or B.shape != (5, 5):
        raise Mistake(f"the ranks 2 and 3 add up to 5: A is (5, 7) and B is (5, 5), yours are {tuple(A.shape)} and {tuple(B.shape)}.")
    one, two, made = B1 @ A1, B2 @ A2, B @ A
    for wrong, value in {
        "neither weights nor scales are in it.": one + two,
        "the weights are missing.": 1.5 * one + 2.0 * two,
        "the scales s1 and s2 are missing.": 0.5 * one - 0.25 * two,
        "weight and scale are in A and in B, so they count twice: put them on one of the two.": 0.75**2 * one + 0.5**2 * two,
    }.items():
        if torch.allclose(made, value, atol=1e-5):
            raise Mistake(wrong)
    if not torch.allclose(made, 0.75 * one - 0.5 * two, atol=1e-5):
        raise Mistake("the shapes are right, the product is not the weighted sum. (One weight of the test is negative: it has no root.)")
    return "the exact sum, and the ranks add up: 2 and 3 give 5."


@exercise(
    "10.2",
    "What the cut loses",
    difficulty=3,
    minutes=8,
    hints=(
        "What is cut off are the directions from number `rank` on, counted from 0: `S[rank:]`.",
        "Its norm is the root of the sum of the squares; divide by the norm of all.",
        "`float((S[rank:].square().sum() / S.square().sum()).sqrt())`",
    ),
)
def cut_error(answer: Any) -> str:
    """√(Σ_{i>r} Sᵢ² / Σ Sᵢ²)."""
    S = torch.tensor([4.0, 3.0, 2.0, 1.0])
    found = float(value_of(answer, S.clone(), 2))
    for wrong, value in {
        "that is the share of the squares; take the root.": 5 / 30,
        "that is what is kept, not what is lost.": (25 / 30) ** 0.5,
        "the singular values have to be squared before they are added.": 3 / 10,
        "the squares add up, then comes the root; and it is relative, so divide by the norm of all.": 5**0.5,
        "one too many is kept: `S[rank:]` begins with the first that is cut off.": (1 / 30) ** 0.5,
        "one too few is kept: `S[rank:]` begins with the first that is cut off.": (14 / 30) ** 0.5,
    }.items():
        if abs(found - value) < 1e-5:
            raise Mistake(wrong)
    if abs(found - (5 / 30) ** 0.5) > 1e-5:
        raise Mistake(f"for the values 4, 3, 2, 1 cut at rank 2 the error is {(5 / 30) ** 0.5:.3f}; yours is {found:.3f}.")
    if abs(float(value_of(answer, S.clone(), 4))) > 1e-6:
        raise Mistake("with all four directions kept nothing is lost: 0.")
    return "the root of the share of the squares that are cut off: 0 with all of them, 1 with none."


@exercise(
    "10.3",
    "The vote",
    difficulty=4,
    minutes=15,
    hints=(
        "The winning sign of each column: `torch.where(kept.sum(0) >= 0, 1, -1)`.",
        "Which entries have won? `won = kept.sign() == winner`; the sign of 0 is 0 and never wins.",
        "Sum what has won and divide by how many these are, at least 1: `(kept * won).sum(0) / won.sum(0).clamp(min=1)`.",
    ),
)
def elect_and_merge(answer: Any) -> str:
    """Three adapters of six entries; each column tells one mistake from the others."""
    kept = torch.tensor([[3.0, 2.0, 0.0, 1.0, 0.0, 1.0], [-1.0, 4.0, 0.0, 1.0, -2.0, -1.0], [0.0, 0.0, 0.0, -5.0, -6.0, 0.0]])
    right = torch.tensor([3.0, 3.0, 0.0, -5.0, -4.0, 1.0])
    found = value_of(answer, kept.clone())
    if not isinstance(found, torch.Tensor) or found.shape != right.shape:
        shape = f"a tensor of {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise Mistake(f"one number for each column is asked for, here (6,); yours is {shape}.")
    won = kept.sign() == right.sign()
    for wrong, value in {
        "that is the plain mean: entries of the losing sign and zeros count in it.": kept.mean(0),
        "that is the plain sum: nobody was elected.": kept.sum(0),
        "the winners are added; TIES takes their mean.": (kept * won).sum(0),
        "zeros count as members of the mean: divide by the number of winners only.": (kept * won).sum(0) / 3,
    }.items():
        if torch.allclose(found, value):
            raise Mistake(wrong)
    if bool(found.isnan().any()):
        raise Mistake("a column without any entry gives 0/0: divide by 1 at least.")
    if float(found[3]) == 1:
        raise Mistake("in [1, 1, −5] the sign with more weight wins, not the one with more votes: the sum is negative.")
    if float(found[5]) in {0.0, -1.0}:
        raise Mistake("in [1, −1, 0] the sum is zero, and then plus wins.")
    if not torch.allclose(found, right):
        at = int((found - right).abs().argmax())
        raise Mistake(f"the column {kept[:, at].tolist()} gives {float(right[at]):g}; yours is {float(found[at]):g}.")
    return "the weightier sign wins each entry, and only its supporters are in the mean."


@exercise(
    "10.4",
    "Which order is free?",
    difficulty=3,
    minutes=6,
    hints=(
        "Write y for what comes from beneath. LoRA gives y + u, with u from the layer's input x, which both see alike.",
        "Houlsby gives y + f(y). Put one into the other: is y + f(y) + g(y + f(y)) the same as y + g(y) + f(y + g(y))?",
        "DoRA gives m · (y + v), with m for each entry. With LoRA beneath, u is multiplied by m; with LoRA above it is not.",
    ),
)
def order_is_free(answer: Any) -> str:
    """LoRA with LoRA alone."""
    right = {"LoRA and LoRA": True, "Houlsby and Houlsby": False, "LoRA and DoRA": False}
    if not isinstance(answer, Mapping) or set(answer) != set(right):
        raise Mistake(f"the answer is a dict with these keys: {', '.join(right)}.")
    for pair, said in answer.items():
        if said is ...:
            raise Mistake(f"{pair!r} has no answer yet.")
        if isinstance(said, str):
            raise Mistake(f"{pair!r} has a text; write True or False without quotation marks.")
        if bool(said) != right[pair]:
            raise Mistake(ORDERS[pair])
    return "y + u₁ + u₂ in any order; what reads y, or multiplies it, has to know what came before."


ORDERS = {
    "LoRA and LoRA": "both add to y something that does not depend on y: y + u₁ + u₂ is the same in either order.",
    "Houlsby and Houlsby": "the second reads what the first has written, through a bend: f(y + g(y)) is not f(y).",
    "LoRA and DoRA": "DoRA multiplies what it gets: with LoRA beneath it the LoRA part is multiplied, too, with LoRA above it is not.",
}
