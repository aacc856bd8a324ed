"""Exercises of `11_claims`."""

from __future__ import annotations

from typing import Any

from lora_nb.checks.exercises import Mistake, exercise, value_of


@exercise(
    "11.1",
    "A file of 30 megabytes",
    difficulty=2,
    minutes=8,
    hints=(
        "A layer with 4,096 inputs and outputs gets r × (4,096 + 4,096) numbers, and there are two such layers in each of 32 blocks.",
        "Each rank costs 32 × 2 × 8,192 numbers of 2 bytes: divide 30,000,000 by that, and round down.",
    ),
)
def rank_of_a_file(answer: Any) -> str:
    """The largest r with r × 32 × 2 × (4096 + 4096) × 2 bytes ≤ 30 MB."""
    if answer == 14:
        raise Mistake("that is with 4 bytes a number; 16 bits are 2 bytes.")
    if answer == 57:
        raise Mistake("that is with one projection in each block; query and value are two.")
    if answer in (28.6, 29):
        raise Mistake("that one is already above 30 MB: round down.")
    if answer != 28:
        raise Mistake(f"count r × 32 blocks × 2 projections × (4,096 + 4,096) numbers × 2 bytes; with r = {answer} that is not it.")
    return "28 ranks of 1,048,576 bytes are 29.4 MB; the next would be 30.4 MB."


@exercise(
    "11.2",
    "The most that LoRA can save",
    difficulty=2,
    minutes=10,
    hints=(
        "Of full fine-tuning each parameter takes its weight, its gradient and the optimizer's state.",
        "With LoRA of a rank near zero, nothing but the frozen weights is left: divide by the bytes of a weight alone.",
    ),
)
def most_saved(answer: Any) -> str:
    """(weight + gradient + optimizer) / weight."""
    given = float(value_of(answer, 2, 2, 8))
    if given == 10:
        raise Mistake("that leaves the weights out; they stay with LoRA, and full fine-tuning has them as well.")
    if given == 5:
        raise Mistake("that divides gradient and optimizer alone by the weight: full fine-tuning holds its weights, too.")
    if given != 6:
        raise Mistake(f"for 2 bytes of weight, 2 of gradient and 8 of optimizer the most is 6, not {given:g}.")
    if float(value_of(answer, 4, 4, 8)) != 4:
        raise Mistake("right for 2, 2 and 8 bytes, but not for 4, 4 and 8: use the arguments.")
    return "12 bytes against 2 are a factor of 6, whatever the model: far from 50."


@exercise(
    "11.3",
    "Do two methods differ?",
    difficulty=3,
    minutes=12,
    hints=(
        "Three seeds give three results each. Take the lowest and the highest of both.",
        "They differ if the whole of one lies above the whole of the other: min(a) > max(b), or the other way round.",
    ),
)
def methods_differ(answer: Any) -> str:
    """Whether the ranges over the seeds are apart."""
    if bool(value_of(answer, [2.40, 2.44, 2.42], [2.43, 2.41, 2.45])):
        raise Mistake("[2.40, 2.44, 2.42] and [2.43, 2.41, 2.45] have different means, but other seeds would change their order.")
    if not bool(value_of(answer, [2.10, 2.12, 2.11], [2.40, 2.44, 2.42])):
        raise Mistake("[2.10, 2.12, 2.11] lies wholly below [2.40, 2.44, 2.42].")
    if not bool(value_of(answer, [2.40, 2.44, 2.42], [2.10, 2.12, 2.11])):
        raise Mistake("it works when the first is lower; the first may also be the higher one.")
    return "ranges that overlap say that three seeds cannot tell the two apart."
