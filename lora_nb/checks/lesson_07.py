"""Exercises of `07_merging`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lora_nb.checks.exercises import Mistake, exercise, value_of

TARGETS = ("dequantized", "original", "requantized", "beside")


@exercise(
    "07.1",
    "Merge by hand",
    difficulty=2,
    minutes=5,
    hints=(
        "The product of the two thin matrices must have the shape of W, out × in: which of them comes first?",
        "The update is scaled by α/r before it is added.",
        "`W + alpha / r * (B @ A)`; `@` is the product of matrices.",
    ),
)
def merged_weight(answer: Any) -> str:
    """W + (α/r) B A, on a layer whose sizes all differ."""
    random = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(*size, generator=random) for size in ((5, 7), (3, 7), (5, 3)))
    found, update = value_of(answer, W.clone(), A, B, 6.0, 3), B @ A
    if not isinstance(found, torch.Tensor) or found.shape != W.shape:
        shape = f"a tensor of {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise Mistake(f"the merged weight has the shape of W, here (5, 7); yours is {shape}.")
    for wrong, value in {
        "the scale α/r is missing.": W + update,
        "the update is scaled by α alone; divide it by r.": W + 6.0 * update,
        "that is the update without the weight it is added to.": 2.0 * update,
        "the update is subtracted; it is added to W.": W - 2.0 * update,
        "that is rsLoRA's scale α/√r; plain LoRA has α/r.": W + 6.0 / 3**0.5 * update,
    }.items():
        if torch.allclose(found, value, atol=1e-5):
            raise Mistake(wrong)
    if not torch.allclose(found, W + 2.0 * update, atol=1e-5):
        raise Mistake("the shape is right, the numbers are not: it is W plus α/r times the product of B and A.")
    return "W + (α/r) B A: one matrix that does what the layer and its adapter did."


@exercise(
    "07.2",
    "How small an update does bfloat16 lose?",
    difficulty=2,
    minutes=5,
    hints=(
        "The neighbour of 1 is 1 + the spacing. A sum that is nearer to 1 than to the neighbour becomes 1 again.",
        "The middle between the two is half a spacing away, and what lies exactly there becomes 1, too.",
        "Half of 2⁻⁷ is 2⁻⁸; in Python `2**-8`.",
    ),
)
def largest_lost_update(answer: Any) -> str:
    """Half the spacing, 2⁻⁸."""
    if isinstance(answer, bool) or not isinstance(answer, int | float):
        raise Mistake(f"the answer is a number, not {type(answer).__name__}.")
    if answer == 2**-7:
        raise Mistake("that is the whole spacing: 1 + 2⁻⁷ is the next number, so that update arrives.")
    if answer in {2**-11, 2**-12}:
        raise Mistake("that is float16's, which keeps three digits more.")
    if abs(answer - 2**-8) > 1e-9:
        arrives = bool(torch.tensor(1.0 + float(answer)).bfloat16() > 1)
        raise Mistake(
            f"1 + {answer:.4g} {'is rounded to a number above 1, so it arrives' if arrives else 'becomes 1, but a larger one does so too'}."
        )
    return "half a spacing, 2⁻⁸ or 0.4 % of the weight: at most that is what one merge into bfloat16 may lose of each weight."


@exercise(
    "07.3",
    "What is left of an update",
    difficulty=3,
    minutes=10,
    hints=(
        "Two differences matter: what should have been added, `wanted - before`, and what was, `arrived - before`.",
        "The projection of v onto u is ⟨v, u⟩ / ⟨u, u⟩, with ⟨v, u⟩ the sum of the products of the entries.",
        "With `u = wanted - before`: `((arrived - before) * u).sum() / (u * u).sum()`.",
    ),
)
def update_left(answer: Any) -> str:
    """⟨arrived − before, wanted − before⟩ / ‖wanted − before‖²."""
    random = torch.Generator().manual_seed(0)
    before, update, stray = (torch.randn(6, 4, generator=random) for _ in range(3))
    stray = stray - (stray * update).sum() / update.square().sum() * update  # at right angles
    arrived = before + 0.25 * update + stray

    def of(what: torch.Tensor) -> float:
        return float(value_of(answer, before.clone(), before + update, what))

    found = of(arrived)
    moved = arrived - before
    for wrong, value in {
        "that is the cosine: it says in which direction, not how much arrived.": (moved * update).sum() / (moved.norm() * update.norm()),
        "that compares sizes, ‖arrived − before‖ over ‖wanted − before‖, so noise counts as update.": moved.norm() / update.norm(),
        "take `before` away from both: the share is of the update, not of the weight.": (arrived * (before + update)).sum()
        / (before + update).square().sum(),
        "divide by the size of what was wanted, squared, not of what arrived.": (moved * update).sum() / moved.square().sum(),
    }.items():
        if abs(found - float(value)) < 1e-4:
            raise Mistake(wrong)
    for name, what, expected in [
        ("all of it arrived", before + update, 1.0),
        ("nothing arrived", before, 0.0),
        ("a quarter arrived, with noise", arrived, 0.25),
    ]:
        if abs(of(what) - expected) > 1e-4:
            raise Mistake(f"when {name}, the share is {expected:g}; yours is {of(what):.3g}.")
    return "1 for all, 0 for nothing, and 0.25 for a quarter, whatever noise comes along."


@exercise(
    "07.4",
    "Where should it go?",
    difficulty=3,
    minutes=5,
    hints=(
        "First ask whether the adapter may stay beside the weights; then how much memory there is; then how much of the update is left.",
        "What training saw was the rounded weight: only one of the targets gives back exactly that plus the update.",
        "In section 6, an update of 1 % of the weight did not survive rounding to four bits.",
    ),
)
def where(answer: Any) -> str:
    """Ana dequantized, Ben beside, Chloé requantized."""
    if not isinstance(answer, Mapping) or not {"Ana", "Ben", "Chloé"} <= set(answer):
        raise Mistake("the answer is a dict with an entry for each of Ana, Ben and Chloé.")
    for name, said in answer.items():
        if said not in TARGETS:
            raise Mistake(f"for {name} you say {said!r}; the choices are {', '.join(TARGETS)}.")
    wrong = [why for (name, said), why in REASONS.items() if answer[name] == said]
    if wrong:
        raise Mistake(wrong[0])
    return "what training saw, where there is room; beside it, where rounding would erase it; into four bits only where that was measured."


REASONS = {
    ("Ana", "original"): "Ana's adapter made up for the rounding of the NF4 base; in the original weights there is nothing to make up for.",
    ("Ana", "requantized"): "Ana has 16 bits to serve in, so there is no need to round her update again.",
    ("Ana", "beside"): "Ana's engine knows no adapters: hers has to go into the weights.",
    ("Ben", "requantized"): "an update of 1 % does not survive rounding to four bits: hardly anything of Ben's would be left.",
    ("Ben", "dequantized"): "Ben's card has no room for the dequantized weights.",
    ("Ben", "original"): "Ben's card has no room for the original weights.",
    ("Chloé", "beside"): "Chloé's engine knows no adapters: hers has to go into the weights.",
    ("Chloé", "dequantized"): "Chloé's card has no room for the dequantized weights.",
    ("Chloé", "original"): "Chloé's card has no room for the original weights.",
}
