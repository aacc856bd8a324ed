"""Exercises of `06_quantization`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_nb.checks.exercises import Mistake, exercise, value_of
from lora_nb.layers.quantized import nf4_levels


@exercise(
    "06.1",
    "Round a block to sixteen levels",
    difficulty=2,
    minutes=10,
    hints=(
        "The scale is the block's largest absolute value: block.abs().max(). Divide by it, and everything lies between −1 and 1.",
        "Distances of every weight to every level: (scaled[:, None] - levels).abs(), and argmin(1) is the index of the nearest.",
        "levels[index] are the rounded values, still between −1 and 1: multiply them by the scale again.",
    ),
)
def rounded(answer: Any) -> str:
    """levels[argmin |w / absmax − level|] · absmax."""
    levels = torch.tensor([-1.0, -0.5, -0.1, 0.0, 0.2, 0.6, 1.0])
    block = torch.tensor([0.03, -0.8, 0.4, 0.1, -0.05, 0.55, 0.2, -0.31])
    scale = block.abs().max()
    index = (block[:, None] / scale - levels).abs().argmin(1)
    found = value_of(answer, block.clone(), levels)
    if not isinstance(found, Tensor) or found.shape != block.shape:
        raise Mistake(f"8 weights should come back as 8 numbers, and {tuple(getattr(found, 'shape', ()))} did.")
    wrong = (
        (index.to(block.dtype), "these are the indices of the levels; look the levels up, and multiply them by the scale."),
        (levels[index], "these lie between −1 and 1: multiply by the scale again, to get weights."),
        (block, "nothing was rounded."),
        (
            _nearest(block, levels, block.max()),
            "the scale is the largest absolute value; the largest number that you took has the other sign.",
        ),
        (_nearest(block, levels, torch.tensor(1.0)), "the weights were not divided by the scale first, so that most levels went unused."),
    )
    for value, why in wrong:
        if torch.allclose(found.double(), value.double(), atol=1e-6):
            raise Mistake(why)
    if not torch.allclose(found.double(), (levels[index] * scale).double(), atol=1e-6):
        raise Mistake(f"of {block.tolist()} it makes {[round(v, 3) for v in found.tolist()]}; one of them is not the nearest level.")
    return "a weight is now an index of four bits, and the block one scale: that is all of 4-bit quantization but for the levels."


def _nearest(block: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    return levels[(block[:, None] / scale - levels).abs().argmin(1)] * scale


@exercise(
    "06.2",
    "Derive the NF4 code book",
    difficulty=4,
    minutes=20,
    hints=(
        "Positive side: torch.linspace(OUTERMOST, 0.5, 9)[:-1] are eight shares; torch.special.ndtri makes quantiles of them.",
        "Negative side: the same with 8 instead of 9, which gives seven, with a minus before them.",
        "Put the two and a zero together with torch.cat, sort, and divide by the largest.",
    ),
)
def code_book(answer: Any) -> str:
    """The sixteen published levels."""
    found, right = value_of(answer), nf4_levels().double()
    if not isinstance(found, Tensor) or found.ndim != 1:
        raise Mistake("the answer is a tensor of one dimension, (16,).")
    found = found.double()
    if not found.isfinite().all():
        raise Mistake("one of them is infinite: the quantile of the share 0 or 1. The outermost share is OUTERMOST, not 1.")
    if found.shape != right.shape:
        raise Mistake(f"sixteen levels are needed and yours are {len(found)}: seven, zero, and eight; leave the share 1/2 out.")
    if not found.eq(0).any() and not (found.abs() < 1e-9).any():
        raise Mistake("zero is not among them, so a weight of zero would not stay one: seven below, zero, eight above.")
    if torch.allclose(found.sort().values, right, atol=1e-5) and not torch.allclose(found, right, atol=1e-5):
        raise Mistake("these are the levels, but not in order: sort them, from low to high.")
    if abs(float(found.max()) - 1) > 1e-6:
        raise Mistake(f"the largest is {float(found.max()):.4g}: divide all of them by it, since scaled weights end at 1.")
    if torch.allclose(-found.flip(0), right, atol=1e-5):
        raise Mistake("the sides are exchanged: the eight levels are above zero and the seven below.")
    worst = int((found - right).abs().argmax())
    if not torch.allclose(found, right, atol=1e-5):
        raise Mistake(
            f"level {worst} is {float(found[worst]):.4f} and should be {float(right[worst]):.4f}: the steps between shares are equal."
        )
    return "these are the sixteen numbers of the paper's appendix E, to six digits."


@exercise(
    "06.3",
    "How many bits is a weight?",
    difficulty=2,
    minutes=10,
    hints=(
        "A weight has 4 bits of its own, and shares a scale with the others of its block: scale bits / block.",
        "Without double quantization a scale has 32 bits. With it, 8 bits, and 256 scales share one of 32 bits.",
        "With it: 4 + 8 / block + 32 / (block · 256).",
    ),
)
def bits(answer: Any) -> str:
    """4 + 32 / block, or 4 + 8 / block + 32 / (256 block)."""
    for block, double in ((64, False), (64, True), (128, True), (32, False)):
        right = 4 + (8 / block + 32 / (block * 256) if double else 32 / block)
        found = value_of(answer, block, double)
        if abs(found - right) < 1e-9:
            continue
        case = f"block {block}, double_quant={double}"
        if abs(found - right + 4) < 1e-9:
            raise Mistake(f"{case}: that is what the scales take; the weight's own 4 bits are missing.")
        if double and abs(found - 4 - 8 / block) < 1e-9:
            raise Mistake(f"{case}: the scales of the scales are missing: one of 32 bits for 256 scales.")
        if double and abs(found - 4 - 32 / block) < 1e-9:
            raise Mistake(f"{case}: the scales still have 32 bits there; double quantization gives them 8.")
        if double and abs(found - 4 - 8 / block - 32 / 256) < 1e-9:
            raise Mistake(f"{case}: 256 scales share one of 32 bits, and each of them stands for a whole block of weights.")
        if abs(found - 4 - 4 / block) < 1e-9:
            raise Mistake(f"{case}: 4 bytes are 32 bits.")
        raise Mistake(f"{case}: {found:.4g} bits, and {right:.4g} is right.")
    return "4.5 bits with blocks of 64, and 4.127 with double quantization."


@exercise(
    "06.4",
    "A code book of three bits",
    difficulty=3,
    minutes=15,
    hints=(
        "As with NF4: quantiles of shares, divided by the largest. Three bits tell eight levels apart, so use all eight.",
        "The middles of eight equal shares are 1/16, 3/16, … 15/16.",
        "levels = torch.special.ndtri(torch.linspace(1 / 16, 15 / 16, 8)), then divide by levels.max().",
    ),
)
def three_bits(answer: Any) -> str:
    """At most eight levels that beat even ones on normal weights."""
    levels = value_of(answer)
    if not isinstance(levels, Tensor) or levels.ndim != 1:
        raise Mistake("the answer is a tensor of one dimension.")
    levels = levels.float()
    if len(levels) > 8:
        raise Mistake(f"three bits tell eight levels apart, and yours are {len(levels)}.")
    if not levels.isfinite().all() or float(levels.abs().max()) > 1 + 1e-4:
        raise Mistake("scaled weights lie between −1 and 1, and so should the levels: divide by the largest, and leave infinity out.")
    weights = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    even, yours = _error(weights, torch.linspace(-1, 1, 8)), _error(weights, levels)
    if yours >= even * 0.999:
        few = f" You use {len(levels)} levels; the eighth is free." if len(levels) < 8 else ""
        raise Mistake(f"on normal weights the relative error is {yours:.3f}, and that of eight even levels {even:.3f}.{few}")
    return f"relative error {yours:.3f}, where eight even levels have {even:.3f}. The best eight, found by Lloyd's algorithm, have 0.178."


def _error(weights: Tensor, levels: Tensor) -> float:
    levels, scale = levels.sort().values, weights.abs().amax(1, keepdim=True)
    index = torch.bucketize(weights / scale, (levels[1:] + levels[:-1]) / 2)
    return float((levels[index] * scale - weights).norm() / weights.norm())
