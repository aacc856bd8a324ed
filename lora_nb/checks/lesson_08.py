"""Exercises of `08_latency`."""

from __future__ import annotations

import math
from statistics import fmean, median
from typing import Any

from torch import Tensor

from lora_nb.checks.exercises import Mistake, exercise, value_of

# Rounds of a machine that is slow now and then: ours takes 1.2 times as long throughout, and one round hit only ours.
THEIRS = [1.0, 1.1, 5.0, 1.0, 0.9, 1.0, 4.0]
OURS = [1.2, 1.32, 6.0, 1.2, 1.08, 3.0, 4.8]


@exercise(
    "08.1",
    "A fair ratio",
    difficulty=2,
    minutes=8,
    hints=(
        "In each round both had the same moment of the machine: so first a ratio for each round, then one number from all of these.",
        "Which kind of average is not moved by a single round in which something else was running?",
        "`median(a / b for a, b in zip(ours, theirs))`",
    ),
)
def fair_ratio(answer: Any) -> str:
    """The median over rounds of the ratio within a round."""
    found = float(value_of(answer, list(OURS), list(THEIRS)))
    ratios = [a / b for a, b in zip(OURS, THEIRS, strict=True)]
    for wrong, value in {
        "that is theirs over ours: turn it round.": 1 / median(ratios),
        "that is the mean of the ratios, which one bad round moves: take the median.": fmean(ratios),
        "that is the ratio of the means: a slow moment counts more than all others together.": fmean(OURS) / fmean(THEIRS),
        "that is the ratio of the medians, which may come from different rounds: first the ratios, then their median.": median(OURS)
        / median(THEIRS),
    }.items():
        if abs(found - value) < 1e-6:
            raise Mistake(wrong)
    # The ratio of the two best rounds comes to 1.2 above as well.
    if abs(found - 1.2) < 1e-6 and abs(float(value_of(answer, [8.0, 16.0, 9.0], [4.0, 8.0, 1.0])) - 2.0) > 1e-6:
        raise Mistake("that compares different rounds with each other, such as the best of each: first the ratios, then their median.")
    if abs(found - 1.2) > 1e-6:
        raise Mistake(f"ours takes 1.2 times as long in every round but one; you found {found:.3g}.")
    return "a ratio for each round, and the median of these: neither a slow moment of the machine nor one bad round moves it."


@exercise(
    "08.2",
    "How much more work?",
    difficulty=2,
    minutes=6,
    hints=(
        "A has r × fan_in entries and B fan_out × r; each is multiplied once for a token.",
        "Add the two and divide by the layer's own fan_out × fan_in.",
        "`r * (fan_in + fan_out) / (fan_in * fan_out)`",
    ),
)
def extra_work(answer: Any) -> str:
    """r (in + out) / (in · out)."""
    found = float(value_of(answer, 256, 576, 8))
    expected = 8 * (256 + 576) / (256 * 576)
    for wrong, value in {
        "that is a number of multiplications; divide it by the layer's own.": 8.0 * (256 + 576),
        "that is the whole work over the base's; the question is how much more, so take 1 away.": 1 + expected,
        "A alone is counted; B multiplies as well.": 8 / 576,
        "B alone is counted; A multiplies as well.": 8 / 256,
        "the product B A is not formed; x goes through A and then through B, so the sizes add up.": 8.0,
    }.items():
        if abs(found - value) < 1e-9:
            raise Mistake(wrong)
    if abs(found - expected) > 1e-9:
        raise Mistake(f"for a layer of 576 × 256 and r = 8 it is {expected:.4f}; yours gives {found:.4g}.")
    if abs(float(value_of(answer, 4096, 4096, 8)) - 16 / 4096) > 1e-9:
        raise Mistake("right for one layer, but not for one of 4096 × 4096: use the arguments, not fixed sizes.")
    return "6.25 % for a layer of 256 × 256 and 0.4 % for one of 4096 × 4096, at rank 8: the wider, the less."


@exercise(
    "08.3",
    "The crossover",
    difficulty=4,
    minutes=15,
    hints=(
        "Write down the condition: c' + n·w' ≤ limit · (c + n·w), and bring everything with n to one side.",
        "n · (limit·w − w') ≥ c' − limit·c. If the bracket is positive, divide by it and round up, to 1 at least.",
        "If the bracket is zero or negative, more rows do not help: 1 if one row already fulfils the condition for ever, else infinity.",
    ),
)
def crossover(answer: Any) -> str:
    """Against trying one number of rows after the other."""
    for case in CASES:
        expected, found = _tried(*case), value_of(answer, *case)
        if isinstance(found, Tensor) and not found.ndim:
            found = found.item()
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise Mistake(f"the answer is a number of rows; {case} gives {type(found).__name__}.")
        if found == expected:
            continue
        said = f"start={case[0]}, row={case[1]}, extra_start={case[2]}, extra_row={case[3]}, limit={case[4]}"
        if math.isinf(expected):
            raise Mistake(f"with {said} each row's own extra work is above the limit, so no number of rows is enough: infinity.")
        if isinstance(found, float) and math.ceil(found) == expected:
            raise Mistake(f"with {said} it is a whole number, {expected}: round up.")
        if found < 1:
            raise Mistake(f"with {said} you have {found}: at least one row is needed.")
        if found == expected - 1:
            raise Mistake(f"with {said} {found} rows are not quite enough: round up, not down.")
        raise Mistake(f"with {said} it is {expected}; you have {found}.")
    return "the calls fade with more rows; the work does not, and where it alone is above the limit nothing helps."


# c, w, c', w', limit, as sums of powers of two, which no rounding touches.
CASES = (
    (4.0, 1.0, 1.0, 0.0, 0.125),
    (4.0, 1.0, 1.125, 0.03125, 0.125),
    (4.0, 1.0, 1.0, 0.25, 0.125),
    (4.0, 1.0, 0.25, 0.0, 0.125),
    (4.0, 1.0, 0.25, 0.25, 0.125),  # one row would do, two would not
    (4.0, 1.0, 0.25, 0.125, 0.125),
    (4.0, 1.0, 1.0, 0.125, 0.125),
    (1.0, 1.0, 4.0, 0.25, 0.5),
)


def _tried(start: float, row: float, extra_start: float, extra_row: float, limit: float) -> float:
    if limit * row < extra_row:
        return math.inf
    rows = range(1, 10_000)
    return next((n for n in rows if extra_start + n * extra_row <= limit * (start + n * row) + 1e-12), math.inf)


@exercise(
    "08.4",
    "Free once merged",
    difficulty=1,
    minutes=3,
    hints=(
        "Merging puts one matrix in the place of a weight. Which methods are one matrix in the end?",
        "Look at which names `ln.variants` gave a merged twin.",
    ),
)
def free_once_merged(answer: Any) -> str:
    """LoRA and DoRA."""
    if isinstance(answer, str) or not hasattr(answer, "__iter__"):
        raise Mistake('the answer is a set of names, such as {"LoRA"}.')
    said = set(answer)
    if unknown := said - {"LoRA", "DoRA", "Houlsby", "Pfeiffer", "parallel"}:
        raise Mistake(f"{min(map(str, unknown))!r} is none of the names.")
    if bent := said & {"Houlsby", "Pfeiffer", "parallel"}:
        raise Mistake(f"{min(bent)!r} bends its input in the middle (ReLU or swish): no matrix does the same.")
    if absent := {"LoRA", "DoRA"} - said:
        why = {"LoRA": "its two matrices multiply to one", "DoRA": "it scales the rows of a matrix, which is a matrix again"}
        raise Mistake(f"{min(absent)!r} is missing: {why[min(absent)]}.")
    return "LoRA and DoRA end in one matrix for each layer; a bottleneck has a bend in the middle."
