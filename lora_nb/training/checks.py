"""What would make a run worthless, said as soon as it shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import nn

from lora_nb.blocks import IGNORE, Batch, Block
from lora_nb.errors import TrainingError
from lora_nb.training.loss import predictions
from lora_nb.training.optim import named_trainable, trainable
from lora_nb.training.packing import apart
from lora_nb.training.run import Run, Step

Path = Callable[[Any], AbstractContextManager[None]]


def refuse_no_gradient(model: nn.Module, loss: float) -> None:
    """Raise where the backward pass reached nothing that trains."""
    if math.isfinite(loss) and all(p.grad is None for p in trainable(model)):
        raise TrainingError("No gradient reaches what trains, so nothing would be learnt: train outside of disabled(model) and no_grad().")


def refuse_not_finite(step: int, loss: float, norm: float, rate: float, micro: Sequence[Batch]) -> NoReturn:
    """Say which step and which rows; nothing has been stepped with them."""
    rows = ", ".join(str(row) for batch in micro for row in batch.rows)
    raise TrainingError(
        f"Step {step} has loss {loss:g} and gradient norm {norm:g}: the parameters of step {step - 1} are kept. The usual "
        f"cause is a learning rate that is too high (here {rate:g}); attach anew and try a tenth of it. Else look at the rows of this "
        f"step, in the data's order as encoded: {rows}."
    )


class Movement:
    """Has each B moved after two steps? It starts at zero, and while it stays there A has no gradient either."""

    def __init__(self, model: nn.Module, run: Run) -> None:
        fresh = run.steps == 0
        self.params = {name: p for name, p in named_trainable(model).items() if "lora_B" in name and fresh}
        self.before, self.taken = self._sums(), 0

    def _sums(self) -> list[float]:
        # Two numbers a matrix instead of a copy: the sum alone could stay by chance.
        if not self.params:
            return []
        sums = [torch.stack([p.detach().double().sum(), p.detach().double().abs().sum()]) for p in self.params.values()]
        return [float(v) for v in torch.stack(sums).flatten()]

    def check(self, step: Step) -> None:
        """Raise after the second step that had something to learn, if one has not moved."""
        if not self.params or not math.isfinite(step.grad_norm) or step.loss == 0:
            return
        self.taken += 1
        if self.taken < 2:
            return
        now = self._sums()
        stuck = [name for i, name in enumerate(self.params) if now[2 * i : 2 * i + 2] == self.before[2 * i : 2 * i + 2]]
        total, self.params = len(self.params), {}
        if stuck:
            cause = (
                "Usually the graph is cut before the adapters: checkpointing in the reentrant way over frozen embeddings (use "
                "TrainConfig(gradient_checkpointing=True) instead), a forward under no_grad, or a learning rate too small for the type of B"
                if len(stuck) == total
                else "Usually the data does not run through these modules (a part for images, an expert, a layer that takes another's "
                "keys): leave them out with exclude_modules"
            )
            raise TrainingError(
                f"After two steps B has not moved in {len(stuck)} of {total} modules, such as {stuck[0]!r}, so they learn nothing. {cause}."
            )


def packed_path(model: nn.Module, blocks: Sequence[Block], *, by_document: bool) -> Path:
    """The way to compute packed rows on which no document sees another: attention by documents, or else a mask by positions.

    Each is tried on two short documents: packed, each loss must be what it is apart.

    Raises:
        TrainingError: on neither way.
    """
    leak = ""
    ways: tuple[Path, ...] = (apart, nullcontext) if by_document else (nullcontext,)
    for way in ways:
        if not (leak := _leak(model, blocks, way)):
            return way
    raise TrainingError(
        f"packing=True: in {type(model).__name__} the documents of a packed row see each other ({leak}). Set packing=False; rows of "
        "like length share a batch all the same."
    )


@torch.no_grad()
def _leak(model: nn.Module, blocks: Sequence[Block], way: Path) -> str:
    """What goes wrong on this way; empty if nothing does. What it takes for wrong is set by what seeing each other would change."""
    device, training, size = next(model.parameters()).device, model.training, 6
    tokens = [t for b in (blocks[0], blocks[-1]) for t in (*b.input_ids, *b.input_ids * size)[:size]]
    alone = torch.tensor(tokens, device=device).view(2, size)
    labels = alone.clone()
    labels[:, 0] = IGNORE  # what comes before it differs
    row, goals, places = alone.view(1, -1), labels.view(1, -1), torch.arange(size, device=device).repeat(1, 2)
    model.eval()
    try:
        expected, mixed = predictions(model, alone, labels)[0], predictions(model, row, goals)[0]
        with way(model):
            packed = predictions(model, row, goals, places)[0]
    except (TypeError, KeyError) as error:  # positions are not taken, or do not reach attention
        return f"it takes no position_ids: {error}"
    finally:
        model.train(training)
    leak, effect = (packed - expected).abs().max(), (mixed - expected).abs().max()
    return f"losses differ by up to {float(leak):.2g}" if leak > 1e-5 and leak > 0.5 * effect else ""
