"""Exercises of `09_many_adapters`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_nb.checks.exercises import Mistake, exercise, value_of

# Inputs and outputs of a layer of Llama 3.1 8B: q, k, v, o, gate, up, down.
LLAMA_8B = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)] * 32


@exercise(
    "09.1",
    "The bytes of an adapter",
    difficulty=1,
    minutes=8,
    hints=(
        "Of one layer: A has r rows of as many numbers as there are inputs, B has r columns of as many as there are outputs.",
        "So r × (inputs + outputs) numbers a layer. Add the layers up, and multiply by the bytes of a number.",
    ),
)
def bytes_of_an_adapter(answer: Any) -> str:
    """Σ r (inputs + outputs) × bytes of a number."""
    for r, layers, size in ((3, [(5, 7)], 4), (8, [(256, 256), (256, 576)], 2), (16, LLAMA_8B, 2)):
        found, pairs = value_of(answer, r, layers, size), sum(i + o for i, o in layers)
        right = r * pairs * size
        if found == r * sum(i * o for i, o in layers) * size:
            raise Mistake("that is r × inputs × outputs; A and B are two thin matrices, so the two sizes add up instead.")
        if found == r * pairs and size > 1:
            raise Mistake("that is how many numbers there are; each of them takes bytes_per_number bytes.")
        if found == r * sum(layers[0]) * size and len(layers) > 1:
            raise Mistake("that is the first layer alone; add all of them up.")
        if found == pairs * size:
            raise Mistake("the rank is missing: A has r rows, B has r columns.")
        if found != right:
            raise Mistake(f"for r={r} and {len(layers)} layers with {size} bytes a number it is {right:,} bytes, not {found}.")
    return f"for all linear layers of Llama 3.1 8B at rank 16, in 16 bits, that is {right / 1e6:.1f} MB."


@exercise(
    "09.2",
    "A layer for a mixed batch",
    difficulty=3,
    minutes=12,
    hints=(
        "Begin with what is the same for all rows: y = x @ w.T.",
        "Go through the rows; for a row i with adapter g = whose[i] add scale[g] · b[g] @ (a[g] @ x[i]) to y[i].",
        "A row whose number is −1 gets nothing. In Python a[-1] is not an error: it is the last adapter, so test for it.",
    ),
)
def mixed_batch(answer: Any) -> str:
    """W x for all rows, and s · B A x of each row's own adapter."""
    made = [
        torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate([(5, 6), (4, 6), (3, 2, 6), (3, 4, 2)])
    ]
    x, layer = made[0], tuple(made[1:])
    scale, whose, count_up = torch.tensor([0.5, 2.0, 3.0]), [1, 0, -1, 1, 2], [0, 1, 2, 0, 1]
    found, right = value_of(answer, x.clone(), *layer, scale, list(whose)), _mixed(x, layer, whose, scale[whose])
    if not isinstance(found, Tensor) or found.shape != right.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise Mistake(f"the result is a tensor of one row of outputs for each row of x, (5, 4) here, not {shape}.")
    last, alone = [g % 3 for g in whose], x @ layer[0].T
    mistakes = {
        "the rows of the base (−1) got the last adapter: Python counts −1 from the end.": _mixed(x, layer, last, scale[last]),
        "the factor `scale` is missing.": _mixed(x, layer, whose, torch.ones(5)),
        "that is the adapters' part alone; W x has to be in it.": right - alone,
        "that is W x alone: no row got its adapter's part.": alone,
        "all rows went through the first adapter.": _mixed(x, layer, [0] * 5, scale[[0] * 5]),
        "row i went through adapter i; `whose` says which one is row i's.": _mixed(x, layer, count_up, scale[count_up]),
        "each row got the factor of another adapter: it is scale[whose[i]].": _mixed(x, layer, whose, scale[count_up]),
    }
    for said, wrong in mistakes.items():
        if torch.allclose(found, wrong, atol=1e-4):
            raise Mistake(said)
    if not torch.allclose(found, right, atol=1e-4):
        rows = [i for i in range(5) if not torch.allclose(found[i], right[i], atol=1e-4)]
        raise Mistake(f"with whose={whose} the rows {rows} are not W x + s · B A x of their own adapter.")
    return "every row has its own adapter, the base's row has none, and W x was computed for all at once."


def _mixed(x: Tensor, layer: tuple[Tensor, ...], whose: Sequence[int], factors: Tensor) -> Tensor:
    """Row i through adapter whose[i] of a layer (W, A, B), times its factor; −1: through W alone."""
    w, a, b = layer
    y = x @ w.T
    for i, g in enumerate(whose):
        if g >= 0:
            y[i] += factors[i] * (b[g] @ (a[g] @ x[i]))
    return y


@exercise(
    "09.3",
    "Steps, together or one after another",
    difficulty=2,
    minutes=12,
    hints=(
        "Together: cut the list into batches of so many places. A batch takes as many steps as its longest request.",
        "At once: note for each place when it is free again, 0 at first. The next request takes the place that is free first.",
        "A request that wants n tokens makes its place free n steps later; the last place to be free gives the answer.",
    ),
)
def steps_of_two_ways(answer: Any) -> str:
    """Batches that end together against places that are filled at once."""
    for lengths, places in (([2, 12, 2, 2, 2, 2, 12, 2], 4), ([3, 1, 4, 1, 5, 9, 2, 6], 3), ([7], 2), ([5, 5, 5], 1)):
        found, right = value_of(answer, list(lengths), places), _steps(lengths, places)
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise Mistake("return a pair: steps of batches that end together, and steps if a free place is filled at once.")
        together, at_once = found
        if (at_once, together) == right and at_once != together:
            raise Mistake("the two numbers stand in the wrong order: first the batches, then the places that are filled at once.")
        if together == sum(lengths) != right[0]:
            raise Mistake("the first number adds up all lengths; the requests of a batch run at the same time.")
        if together == max(lengths) and together != right[0]:
            raise Mistake("the first number is the longest request of all; each batch has a longest of its own, and they add up.")
        if at_once == -(-sum(lengths) // places) and at_once != right[1]:
            raise Mistake("the second number shares the tokens out evenly; a request cannot be divided among places.")
        if tuple(found) != right:
            raise Mistake(f"for lengths={list(lengths)} and {places} places the pair is {right}, not {tuple(found)}.")
    return "the eight requests of above take 24 steps in batches and 14 if free places are filled at once."


def _steps(lengths: Sequence[int], places: int) -> tuple[int, int]:
    together = sum(max(lengths[i : i + places]) for i in range(0, len(lengths), places))
    free = [0] * places
    for n in lengths:
        free[free.index(min(free))] += n
    return together, max(free)


@exercise(
    "09.4",
    "Who has to be read again?",
    difficulty=2,
    minutes=10,
    hints=(
        "Keep a list of the names in memory, the one used longest ago first.",
        "A name that is there moves to the end of the list: it was just used. That is no read.",
        "A name that is not there is a read; if the list has `slots` names, drop the first before you add it at the end.",
    ),
)
def reads_from_disk(answer: Any) -> str:
    """Misses of a cache that drops what was used longest ago."""
    for letters, slots in (("aaaa", 1), ("abcabc", 3), ("abacab", 2), ("abcadaeafabcde", 3), ("abcabcabc", 2)):
        requests = list(letters)
        found, right = value_of(answer, list(requests), slots), _reads(requests, slots, by_use=True)
        if found == right:
            continue
        if found == _reads(requests, slots, by_use=False):
            raise Mistake("memory drops what was *read* longest ago; a name that is used again has to count as new.")
        if found == len(requests) - right:
            raise Mistake("that counts the names that were found in memory; count the others.")
        if found == len(set(requests)):
            raise Mistake("that is how many different names there are; one that was dropped has to be read again.")
        raise Mistake(f"for the requests {letters!r} and {slots} slots there are {right} reads, not {found}.")
    return "used again means kept; that is why a few popular adapters cost next to no reads."


def _reads(requests: Sequence[str], slots: int, *, by_use: bool) -> int:
    memory: OrderedDict[str, None] = OrderedDict()
    reads = 0
    for name in requests:
        if name not in memory:
            reads += 1
            if len(memory) == slots:
                memory.popitem(last=False)
            memory[name] = None
        elif by_use:
            memory.move_to_end(name)
    return reads
