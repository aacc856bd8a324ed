"""The training loop: one generator of steps that a cell, a thread or the command line drives.

    blocks → batches → forward → loss → backward → clip → step

The base stays frozen: only what asks for a gradient is stepped.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from lora_nb.attach import adapters
from lora_nb.blocks import IGNORE, Block, batches
from lora_nb.configs import TrainConfig
from lora_nb.datasets import Dataset
from lora_nb.errors import TrainingError
from lora_nb.render import format_bytes, html_table, svg_curve, text_table
from lora_nb.training.evaluation import evaluate_blocks
from lora_nb.training.loss import loss_sum
from lora_nb.training.optim import learning_rate, make_optimizer, trainable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Callback = Callable[["Step"], bool | None]


@dataclass(frozen=True)
class Step:
    """One optimizer step: mean loss over its labelled tokens (nats), rate, gradient norm before clipping, tokens in, seconds."""

    step: int
    total: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float

    def _repr_html_(self) -> str:
        row = (f"{self.step} of {self.total}", self.loss, self.learning_rate, self.grad_norm, self.tokens, self.seconds)
        return html_table(["step", "loss", "learning rate", "gradient norm", "tokens", "seconds"], [row])


@dataclass
class Run:
    """What a training run did: losses by step, evaluations as (step, loss), and what it took.

    `tokens_per_second` counts every token that went through the model; `peak_memory` is bytes, of the GPU if there is one,
    else the process' high-water mark; `stopped_by` is `"max_steps"`, `"num_train_epochs"`, `"interrupt"` or `"callback"`.
    """

    adapter: str | None
    config: TrainConfig
    losses: list[float] = field(default_factory=list)
    eval_losses: list[tuple[int, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    stopped_by: str = "max_steps"

    @property
    def steps(self) -> int:
        return len(self.losses)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def _rows(self) -> list[tuple[str, str]]:
        rows = [
            ("trained", f"adapter {self.adapter!r}" if self.adapter else "the whole model"),
            ("steps", f"{self.steps}, stopped by {self.stopped_by}"),
            ("loss, first and last", f"{self.losses[0]:.3f} → {self.losses[-1]:.3f}" if self.losses else "no step was made"),
            ("time", f"{self.seconds:.1f} s, {self.tokens_per_second:,.0f} tokens/s"),
            ("peak memory", format_bytes(self.peak_memory)),
        ]
        if self.eval_losses:
            rows.insert(3, ("held-out loss", " → ".join(f"{loss:.3f}" for _, loss in self.eval_losses)))
        return rows

    def __repr__(self) -> str:
        return text_table(["run", ""], self._rows())

    def _repr_html_(self) -> str:
        return svg_curve(self.losses, "training loss") + html_table(["run", ""], self._rows())


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    config: TrainConfig | None = None,
    *,
    eval_dataset: Dataset | None = None,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Train the active adapters (or, on a model without any, the whole model) and report.

    Interrupting the kernel ends the run early and keeps what was learnt. A callback gets each `Step`; one that returns True
    ends the run.

    Raises:
        TrainingError: nothing trains, or the loss is no longer a number.
        DatasetError: the data cannot fill a batch.
    """
    from tqdm.auto import tqdm

    trainable(model)  # before the evaluation that comes first
    config = config or TrainConfig()
    run = Run(", ".join(adapters(model).active) or None, config)
    held = eval_dataset.encode(tokenizer, config.seq_len) if eval_dataset is not None else []

    def look() -> None:
        """Evaluate, unless that was just done at this very step."""
        if held and (not run.eval_losses or run.eval_losses[-1][0] != run.steps):
            run.eval_losses.append((run.steps, evaluate_blocks(model, tokenizer, held).loss))

    turns = steps(model, tokenizer, dataset, config)
    with tqdm(desc="training", unit="step") as bar:
        try:
            look()
            for step in turns:
                bar.total = step.total
                _note(run, step)
                bar.set_postfix(loss=f"{step.loss:.3f}", refresh=False)
                bar.update()
                if config.eval_every and step.step % config.eval_every == 0:
                    look()
                asked = [callback(step) for callback in callbacks]  # all of them, whatever the first says
                if any(asked):
                    run.stopped_by = "callback"
                    break
            else:
                run.stopped_by = "max_steps" if run.steps == config.max_steps else "num_train_epochs"
            look()
        except KeyboardInterrupt:
            run.stopped_by = "interrupt"
        finally:
            turns.close()
    run.peak_memory = peak_memory(model)
    return run


def steps(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, config: TrainConfig | None = None
) -> Generator[Step, None, None]:
    """The loop itself, one optimizer step a turn; stop asking and it stops. Leaves the model in evaluation mode.

    Raises:
        TrainingError, DatasetError: as for `train`.
    """
    config = config or TrainConfig()
    trainable(model)  # say at once what would fail after minutes of tokenizing
    blocks = dataset.encode(tokenizer, config.seq_len)
    optimizer = make_optimizer(model, config)
    forwards = _forwards(blocks, int(tokenizer.pad_token_id or 0), config)
    total = _total(len(blocks), config)
    torch.manual_seed(config.seed)
    optimizer.zero_grad(set_to_none=True)  # of a backward before this run
    try:
        for step in range(total):
            start = time.perf_counter()
            model.train()  # each time: between two steps the model is the caller's
            rate = learning_rate(config, step, total)
            for group in optimizer.param_groups:
                group["lr"] = rate
            micro = [next(forwards) for _ in range(config.gradient_accumulation_steps)]
            loss = _accumulate(model, micro)
            norm = _clip(model, config.max_grad_norm) if math.isfinite(loss) else math.nan
            if not math.isfinite(norm):
                raise TrainingError(
                    f"Step {step + 1} has loss {loss:g} and gradient norm {norm:g}: the parameters of step {step} are kept. The usual "
                    f"cause is a learning rate that is too high (here {rate:g}); attach anew and try a tenth of it."
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens = sum(ids.numel() for ids, _ in micro)
            yield Step(step + 1, total, loss, rate, norm, tokens, time.perf_counter() - start)
    finally:
        optimizer.zero_grad(set_to_none=True)
        model.eval()


def _accumulate(model: nn.Module, micro: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Gradients of the mean loss over all labelled tokens of the forwards together: k forwards equal one of k times the size."""
    device = next(model.parameters()).device
    count = max(1, sum(int((labels[:, 1:] != IGNORE).sum()) for _, labels in micro))
    total = 0.0
    for ids, labels in micro:
        loss = loss_sum(model, ids.to(device), labels) / count
        total += float(loss.detach())
        if math.isfinite(total) and loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
    if math.isfinite(total) and all(p.grad is None for p in trainable(model)):
        raise TrainingError("No gradient reaches what trains, so nothing would be learnt: train outside of disabled(model) and no_grad().")
    return total


def _clip(model: nn.Module, limit: float | None) -> float:
    """The L2 norm of all gradients, which are then scaled down to `limit`."""
    return float(nn.utils.clip_grad_norm_(trainable(model), math.inf if limit is None else limit))


def _forwards(blocks: Sequence[Block], pad_id: int, config: TrainConfig) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches without end: each epoch a new order by seed, rows of like length together so that little is padding."""
    epoch = 0
    while True:
        yield from batches(blocks, config.batch_size, pad_id, _order(blocks, config, epoch))
        epoch += 1


def _order(blocks: Sequence[Block], config: TrainConfig, epoch: int) -> list[int]:
    """Shuffled; then sorted by length within windows of 16 batches, and the batches of a window shuffled again."""
    rng = random.Random(config.seed * 1_000_003 + epoch)
    order = list(range(len(blocks)))
    rng.shuffle(order)
    size, window, out = config.batch_size, 16 * config.batch_size, []
    for i in range(0, len(order), window):
        near = sorted(order[i : i + window], key=lambda j: len(blocks[j].input_ids))
        rows = [near[k : k + size] for k in range(0, len(near), size)]
        rng.shuffle(rows)
        out += [j for row in rows for j in row]
    return out


def _total(blocks: int, config: TrainConfig) -> int:
    """Optimizer steps of the run."""
    if config.num_train_epochs is None:
        return config.max_steps or 1
    forwards = math.ceil(blocks / config.batch_size) * config.num_train_epochs
    wanted = max(1, math.ceil(forwards / config.gradient_accumulation_steps))
    return min(wanted, config.max_steps or wanted)


def _note(run: Run, step: Step) -> None:
    run.losses.append(step.loss)
    run.tokens += step.tokens
    run.seconds += step.seconds


def peak_memory(model: nn.Module) -> int:
    """Bytes at the highest: of the model's GPU, or of this process; 0 where the system does not say."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":  # Python there has no `resource`
        return 0
    import resource

    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
