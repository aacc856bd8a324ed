"""Exercises of `00_start`."""

from __future__ import annotations

from typing import Any

from lora_nb.checks.exercises import Mistake, exercise


@exercise(
    "00.1",
    "How many numbers train?",
    difficulty=1,
    minutes=5,
    hints=(
        "One matrix A has r rows and as many columns as the layer has inputs; B has a row for each output and r columns.",
        "For one layer that is r × (inputs + outputs). Here r = 16, inputs = 256 and outputs = 256.",
    ),
)
def numbers_that_train(answer: Any) -> str:
    """r × (inputs + outputs)."""
    if isinstance(answer, str):
        raise Mistake("that is a text; write the number, or a product such as 2 * 3, without quotation marks.")
    if answer == 16 * 256 * 256:
        raise Mistake("that is r × inputs × outputs; A and B are two thin matrices, so the sizes of the two add up instead.")
    if answer == 256 * 256:
        raise Mistake("that is the layer's own weight, which stays frozen.")
    if answer != 16 * (256 + 256):
        raise Mistake(f"A has 16 × 256 numbers and B has 256 × 16: together not {answer}.")
    return "A has 16 × 256 numbers and B as many, 8,192 together; the layer's own weight has 65,536."
