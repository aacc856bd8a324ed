"""Training beside serving: a few rows of one adapter's training in each forward that others are served by.

    one forward over serving rows and training rows → tokens for those, a loss for these → backward → now and then a step

The frozen weights are read once for both, and a short batch of single tokens costs next to nothing beside rows of hundreds. What is
served does not change by a row that trains beside it, nor the gradient by rows that are served: no token sees another row's.
(FlexLLM, Oliaro et al., 2024, arXiv:2402.18789.)
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_nb.attach import parameters, parts
from lora_nb.blocks import IGNORE, Block
from lora_nb.configs import TrainConfig
from lora_nb.datasets import Dataset
from lora_nb.errors import ConfigError, LoraNbError, TrainingError
from lora_nb.packed import Row
from lora_nb.training.loop import Run
from lora_nb.training.optim import make_optimizer, set_rates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


DEFAULT_STEPS = 200  # as TrainConfig says
# What the loop of `train` has, and a training that shares its forwards has not.
IDLE = (
    "packing",
    "gradient_checkpointing",
    "compile",
    "eval_every",
    "early_stopping_patience",
    "checkpoint_dir",
    "checkpoint_every",
    "resume",
    "log_file",
    "tensorboard_dir",
)


class Beside:
    """The training of one adapter, handed out a few rows at a time.

    Args:
        name: an adapter that the model carries.
        config: `batch_size` rows make a step, `gradient_accumulation_steps` times as many if that is above 1.
        rows_at_once: how many of them go into one forward; the fewer, the less those who are served wait.

    Raises:
        ConfigError: a setting of `train` that has no place here.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        dataset: Dataset,
        config: TrainConfig,
        *,
        rows_at_once: int = 1,
    ) -> None:
        _refuse_idle(config)
        self.name, self.config, self.run = name, config, Run(name, config)
        self.error: LoraNbError | None = None
        self.stopped = threading.Event()
        self.unwanted = False
        self._blocks = dataset.encode(tokenizer, config.seq_len)
        self._parameters = [p for p in parameters(model, name).values() if p.is_floating_point()]
        self._parts = list(parts(model, name).values())
        for part in self._parts:
            part.requires_grad_(requires_grad=True).train()
        self._optimizer = make_optimizer(model, config)
        self._turns = self._batches(rows_at_once)
        self._total = self._steps_asked()
        self._begun = time.perf_counter()
        self._loss, self._last, self._now = 0.0, False, list[Block]()
        self._count = 1

    def _steps_asked(self) -> int:
        """By steps, by epochs, or whichever is fewer."""
        if self.config.num_train_epochs is None:
            return self.config.max_steps or DEFAULT_STEPS
        wanted = max(1, math.ceil(len(self._blocks) * self.config.num_train_epochs / self._rows_a_step))
        return min(wanted, self.config.max_steps or wanted)

    @property
    def _rows_a_step(self) -> int:
        return self.config.batch_size * self.config.gradient_accumulation_steps

    def rows(self) -> list[Row]:
        """Training rows for the next forward."""
        self._now, self._count, self._last = next(self._turns)
        return [Row(self.name, block.input_ids, wanted=[i for i, _ in _goals(block)]) for block in self._now]

    def loss(self, logits: Sequence[Tensor]) -> Tensor:
        """Their part of the mean loss over the labelled tokens of the whole step, from the logits of these rows."""
        goals = [torch.tensor([goal for _, goal in _goals(block)], device=z.device) for block, z in zip(self._now, logits, strict=True)]
        return F.cross_entropy(torch.cat(list(logits)).float(), torch.cat(goals), reduction="sum") / self._count

    def learn(self, logits: Sequence[Tensor]) -> None:
        """Backward, and a step where the last rows of one are through; after the last step it is `stopped`."""
        loss = self.loss(logits)
        self._loss += float(loss.detach())
        self.run.tokens += sum(len(block.input_ids) for block in self._now)
        if math.isfinite(self._loss):
            loss.backward()  # type: ignore[no-untyped-call]
        if not self._last:
            return
        self._step()
        if self.run.steps >= self._total or self.unwanted:
            self.end("max_steps" if self.run.steps >= self._total else "callback")

    def _step(self) -> None:
        limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
        norm = float(nn.utils.clip_grad_norm_(self._parameters, limit)) if math.isfinite(self._loss) else math.nan
        if not math.isfinite(norm):
            raise TrainingError(
                f"Step {self.run.steps + 1} has loss {self._loss:g} and gradient norm {norm:g}: the parameters of the step before are "
                "kept. The usual cause is a learning rate that is too high."
            )
        set_rates(self._optimizer, self.config, self.run.steps, self._total)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.run.losses.append(self._loss)
        self._loss = 0.0

    def end(self, reason: str, error: LoraNbError | None = None) -> None:
        """No more rows."""
        if self.stopped.is_set():
            return
        self._optimizer.zero_grad(set_to_none=True)
        for part in self._parts:
            part.requires_grad_(requires_grad=False).eval()
        self.run.stopped_by, self.run.seconds, self.error = reason, time.perf_counter() - self._begun, error
        self.stopped.set()

    def stop(self) -> None:
        """Stop after the step under way."""
        self.unwanted = True

    def result(self, timeout: float | None = None) -> Run:
        """Wait for the end.

        Raises:
            TimeoutError: it has not ended in so many seconds; it goes on.
            LoraNbError: what went wrong.
        """
        if not self.stopped.wait(timeout):
            raise TimeoutError(f"The training has not ended in {timeout:g} s: wait longer, or stop() it.")
        if self.error is not None:
            raise self.error
        return self.run

    def _batches(self, size: int) -> Iterator[tuple[list[Block], int, bool]]:
        """Rows of one forward, labelled tokens of their whole step, and whether they are its last."""
        for step in self._steps():
            count = max(1, sum(len(_goals(block)) for block in step))
            for i in range(0, len(step), size):
                yield step[i : i + size], count, i + size >= len(step)

    def _steps(self) -> Iterator[list[Block]]:
        """Rows of one step; each epoch in a new order by seed."""
        epoch = 0
        while True:
            order = list(self._blocks)
            random.Random(self.config.seed * 1_000_003 + epoch).shuffle(order)
            for i in range(0, len(order), self._rows_a_step):
                yield order[i : i + self._rows_a_step]
            epoch += 1


def _goals(block: Block) -> list[tuple[int, int]]:
    """Tokens that predict a labelled one, and that label."""
    return [(i, label) for i, label in enumerate(block.labels[1:]) if label != IGNORE]


def _refuse_idle(config: TrainConfig) -> None:
    """What would be passed over in silence."""
    idle = [name for name in IDLE if getattr(config, name)]
    idle += ["precision"] if config.precision not in {None, "fp32"} else []
    if idle:
        raise ConfigError(f"{idle[0]}={getattr(config, idle[0])!r} has no place in training beside serving: leave it out, or use train().")
