"""Exercises of `12_beyond`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_nb.checks.exercises import Mistake, exercise, value_of
from lora_nb.configs import LoraConfig
from lora_nb.memory.estimate import estimate
from lora_nb.memory.report import Estimate

MODELS = ("Qwen/Qwen2.5-0.5B", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B", "Qwen/Qwen2.5-14B", "Qwen/Qwen2.5-32B")


@exercise(
    "12.1",
    "The largest model for a card",
    difficulty=2,
    minutes=10,
    hints=(
        "For each name make the estimate that the text asks for, and ask it .fits(card).",
        "Among those that fit, the largest has the largest .parts['weights'].",
        "max(…, key=…, default='none') takes care of a card that holds none of them.",
    ),
)
def largest_for_a_card(answer: Any) -> str:
    """Most weights among those whose QLoRA step fits."""
    for card in ("RTX 4090", "T4", "A100 80GB"):
        found, right = value_of(answer, list(MODELS), card), _largest(card, quant="nf4")
        if found == right:
            continue
        if found == _largest(card, quant=None):
            raise Mistake(f"on {card} that is the largest in 16 bits; with quant='nf4' a larger one fits.")
        if found == next(name for name in MODELS if _step(name, "nf4").fits(card)):
            raise Mistake(f"on {card} that is the first that fits; a larger one stands further back in the list.")
        if isinstance(found, str) and found in MODELS and not _step(found, "nf4").fits(card):
            raise Mistake(f"{found} does not fit on {card}: ask the estimate with .fits(card).")
        raise Mistake(f"on {card} it is {right}, not {found}.")
    if value_of(answer, list(MODELS[-1:]), "T4") != "none":
        raise Mistake(f"on a T4 there is no room for {MODELS[-1]}: then the answer is 'none', as a text.")
    return f"a card of 24 GB trains {_largest('RTX 4090', quant='nf4')}, one of 80 GB {_largest('A100 80GB', quant='nf4')}."


def _step(name: str, quant: str | None) -> Estimate:
    return estimate(name, LoraConfig(r=16), quant=quant, gradient_checkpointing=True)


def _largest(card: str, quant: str | None) -> str:
    there = {name: made.parts["weights"] for name in MODELS if (made := _step(name, quant)).fits(card)}
    return max(there, key=lambda name: there[name], default="none")


@exercise(
    "12.2",
    "One gradient from several",
    difficulty=2,
    minutes=8,
    hints=(
        "A mean times the number of its tokens is a sum, and sums may be added.",
        "Multiply each gradient by its number of tokens, add them up, divide by the number of all tokens.",
    ),
)
def one_gradient(answer: Any) -> str:
    """Means weighted by tokens."""
    gradients, tokens = [torch.tensor([1.0, 2.0]), torch.tensor([5.0, -2.0]), torch.tensor([0.0, 3.0])], [30, 10, 5]
    found, right = value_of(answer, [g.clone() for g in gradients], list(tokens)), _weighted(gradients, tokens)
    if not isinstance(found, Tensor) or found.shape != right.shape:
        raise Mistake("the result is one tensor of the shape of each gradient.")
    plain = _weighted(gradients, [1, 1, 1])
    mistakes = {
        "that is the plain mean of the means: a process with 5 tokens counts as much as one with 30.": plain,
        "that is the sum of the means: with more processes the steps would be larger.": plain * 3,
        "that is the sum over all tokens; divide it by their number.": right * sum(tokens),
        "the weights are right, but the division is by the number of processes, not of tokens.": right * sum(tokens) / 3,
        "divided by all tokens, but each mean was not first made a sum: multiply it by its own tokens.": plain * 3 / sum(tokens),
    }
    for said, wrong in mistakes.items():
        if torch.allclose(found, wrong, rtol=1e-4):
            raise Mistake(said)
    if not torch.allclose(found, right, rtol=1e-4):
        raise Mistake(f"for {[g.tolist() for g in gradients]} over {tokens} tokens it is {right.tolist()}, not {found.tolist()}.")
    return "weighted by tokens, two processes make the step that one would make."


def _weighted(gradients: list[Tensor], weights: list[int]) -> Tensor:
    return torch.stack([g * n for g, n in zip(gradients, weights, strict=True)]).sum(0) / sum(weights)


@exercise(
    "12.3",
    "The same adapter, plainly",
    difficulty=3,
    minutes=12,
    hints=(
        "Multiply b by the scale: then the reader needs none.",
        "Rows of zeros under a and as many columns of zeros beside b add nothing to the product.",
        "torch.cat([a, a.new_zeros(rank - len(a), a.shape[1])]) adds the rows; for b it is dim=1.",
    ),
)
def plain_pair(answer: Any) -> str:
    """A filled up with rows of zeros, s · B with columns of zeros."""
    for r, rank, scale in ((3, 8, 2.5), (8, 8, 0.5)):
        a, b = (torch.randn(s, generator=torch.Generator().manual_seed(r)) for s in ((r, 5), (4, r)))
        found = value_of(answer, a.clone(), b.clone(), scale, rank)
        if not isinstance(found, tuple | list) or len(found) != 2 or not all(isinstance(t, Tensor) for t in found):
            raise Mistake("return a pair of tensors, (a2, b2).")
        if (shapes := (tuple(found[0].shape), tuple(found[1].shape))) != ((rank, 5), (4, rank)):
            raise Mistake(
                f"for rank {rank} the shapes are ({rank}, inputs) and (outputs, {rank}): here ({rank}, 5) and (4, {rank}), not {shapes}."
            )
        product, right = found[1] @ found[0], scale * b @ a
        for factor, said in (
            (1, "the scale is missing"),
            (scale**2, "the scale is in both; once is enough"),
            (scale * r / rank, "the scale was changed with the rank"),
        ):
            if factor != scale and torch.allclose(product, factor * b @ a, atol=1e-5):
                raise Mistake(f"{said}: b2 @ a2 is {factor:g} · b @ a, and it should be {scale:g} · b @ a.")
        if not torch.allclose(product, right, atol=1e-5):
            raise Mistake("b2 @ a2 is not scale · b @ a; what is added to a and b has to be zeros.")
    return "another rank on paper, no scale, and the same function."
