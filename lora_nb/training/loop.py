"""The training loop: one generator of steps that a cell, a thread or the command line drives.

    blocks → batches → forward → loss → backward → clip → step

The base stays frozen: only what asks for a gradient is stepped. Around the loop stand the order of the data (`sampler.py`), the
loss (`loss.py`), the optimizer and its rates (`optim.py`), 16-bit products (`precision.py`), checkpoints (`state.py`), several
processes (`distributed.py`), and what a run leaves (`run.py`).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from lora_nb.attach import adapters
from lora_nb.blocks import IGNORE, Batch, Block, pack
from lora_nb.configs import TrainConfig
from lora_nb.datasets import Dataset
from lora_nb.errors import OutOfMemoryError
from lora_nb.training import distributed
from lora_nb.training.callbacks import Callback, Watchers
from lora_nb.training.checks import Movement, Path, packed_path, refuse_no_gradient, refuse_not_finite
from lora_nb.training.evaluation import evaluate_blocks
from lora_nb.training.loss import loss_sum
from lora_nb.training.memory_use import explained, forget_peak, in_words, is_out_of_memory, memory_by_part, peak_memory
from lora_nb.training.modes import prepared
from lora_nb.training.optim import make_optimizer, set_rates, trainable
from lora_nb.training.precision import Precision
from lora_nb.training.run import Origin, Run, Step
from lora_nb.training.sampler import Sampler, total_steps
from lora_nb.training.signals import Terminated, heeded, whole
from lora_nb.training.state import Keeper

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Run", "Step", "steps", "train"]


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    config: TrainConfig | None = None,
    *,
    eval_dataset: Dataset | None = None,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Train the active adapters (or, on a model without any, whatever asks for a gradient) and report.

    Interrupting the kernel, SIGTERM and a full memory end the run early and keep what was learnt: `stopped_by` says so. A
    callback gets each `Step`; one that returns True ends the run.

    Raises:
        TrainingError: nothing trains, the loss is no longer a number, B does not move, or a checkpoint is of another run.
        DatasetError: the data cannot fill a batch.
    """
    config = config or TrainConfig()
    trainable(model)  # say at once what would fail after minutes of tokenizing
    held = eval_dataset.encode(tokenizer, config.seq_len) if eval_dataset is not None else []
    work = _prepare(model, dataset.encode(tokenizer, config.seq_len), int(tokenizer.pad_token_id or 0), config)
    run, turns = work.run, _turns(work)
    run.origin = Origin(model, tokenizer, dataset, eval_dataset)

    def look(watchers: Watchers) -> None:
        """Evaluate, unless that was just done at this very step."""
        if held and (not run.eval_losses or run.eval_losses[-1][0] != run.steps):
            with work.precision.autocast():
                run.eval_losses.append((run.steps, evaluate_blocks(model, tokenizer, held).loss))
            watchers.evaluation(*run.eval_losses[-1])

    with heeded(), Watchers(config, run, work.total, callbacks) as watchers:
        try:
            if not run.steps or _due(config, run.steps):  # of a resumed run: one that it was stopped before
                look(watchers)
            for step in turns:
                if _due(config, step.step):
                    look(watchers)
                if reason := _reason_to_stop(work, asked=watchers.step(step)):
                    run.stopped_by = reason
                    break
            else:
                run.stopped_by = "max_steps" if run.steps == config.max_steps else "num_train_epochs"
            turns.close()
            look(watchers)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            run.stopped_by, run.notice = "out_of_memory", in_words(error, work.memory())
            warnings.warn(run.notice, stacklevel=2)
        except KeyboardInterrupt as error:
            run.stopped_by = "sigterm" if isinstance(error, Terminated) else "interrupt"
        finally:
            turns.close()
            run.peak_memory = peak_memory(work.device)
            run.memory = work.memory()
    return run


def steps(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, config: TrainConfig | None = None
) -> Generator[Step, None, None]:
    """The loop itself, one optimizer step a turn; stop asking and it stops. Leaves the model in evaluation mode.

    Raises:
        TrainingError, DatasetError: as for `train`; memory that is full is `errors.OutOfMemoryError` here.
    """
    config = config or TrainConfig()
    trainable(model)
    yield from _turns(_prepare(model, dataset.encode(tokenizer, config.seq_len), int(tokenizer.pad_token_id or 0), config))


def _reason_to_stop(work: Work, *, asked: bool) -> str:
    """After a step; what one process is asked, all heed."""
    if distributed.anywhere(said=asked, device=work.device):
        return "callback"
    patience = work.config.early_stopping_patience
    return "early_stopping" if patience and work.run.stale() >= patience else ""


def _due(config: TrainConfig, step: int) -> bool:
    """Is there to be an evaluation?"""
    return config.eval_every is not None and step % config.eval_every == 0


@dataclass
class Work:
    """What a run works with: made once, or filled from a checkpoint."""

    model: nn.Module
    config: TrainConfig
    run: Run
    total: int
    device: torch.device
    sampler: Sampler
    optimizer: torch.optim.Optimizer
    precision: Precision
    keeper: Keeper
    path: Path  # how packed rows are computed

    def memory(self) -> dict[str, int]:
        """Bytes by part, at the peak so far."""
        return memory_by_part(self.model, self.optimizer, peak_memory(self.device))


def _prepare(model: nn.Module, blocks: list[Block], pad_id: int, config: TrainConfig) -> Work:
    """Everything before the first step."""
    share, device = distributed.start(), next(model.parameters()).device
    path: Path = nullcontext
    if config.packing:
        path = packed_path(model, blocks, by_document=not config.compile)
        blocks = pack(blocks, config.seq_len)
    distributed.same_start(trainable(model))
    forget_peak(device)
    run = Run(", ".join(adapters(model).active) or None, config)
    optimizer, precision = make_optimizer(model, config), Precision(config, model, device)
    keeper = Keeper(model, optimizer, precision, run, blocks)
    sampler = Sampler(blocks, config, pad_id, device, share)
    return Work(model, config, run, total_steps(len(blocks), config), device, sampler, optimizer, precision, keeper, path)


def _turns(work: Work) -> Generator[Step, None, None]:
    """The steps that remain; after each the parameters and the run's record agree, whatever comes in between."""
    model, config, run, optimizer, params = work.model, work.config, work.run, work.optimizer, trainable(work.model)
    movement = Movement(model, run)
    optimizer.zero_grad(set_to_none=True)  # of a backward before this run
    try:
        with prepared(model, config):
            for number in range(run.steps, work.total):
                start = time.perf_counter()
                model.train()  # each time: between two steps the model is the caller's
                rate = set_rates(optimizer, config, number, work.total)
                micro = work.sampler.step(number)
                loss, tokens = _accumulate(work, micro, number)
                norm = _clip(work, params)
                if not (math.isfinite(loss) and work.precision.fits(norm)):
                    refuse_not_finite(number + 1, loss, norm, rate, micro)
                with whole():
                    work.precision.step(optimizer)
                    optimizer.zero_grad(set_to_none=True)
                    step = Step(number + 1, work.total, loss, rate, norm, tokens, time.perf_counter() - start)
                    run.note(step)
                movement.check(step)
                yield step
                work.keeper.save_if_due()
    finally:
        optimizer.zero_grad(set_to_none=True)
        model.eval()
        work.keeper.save()


def _accumulate(work: Work, micro: Sequence[Batch], number: int) -> tuple[float, int]:
    """Gradients of the mean loss over all labelled tokens of the forwards together: k forwards equal one of k times the size.

    Returns:
        that loss (nats), and how many tokens went in; in several processes, of all of them.
    """
    labelled = sum(int((batch.labels[:, 1:] != IGNORE).sum()) for batch in micro)
    count, tokens = distributed.summed([labelled, sum(batch.input_ids.numel() for batch in micro)], work.device)
    total, full = torch.zeros((), device=work.device), ""
    try:
        with work.path(work.model), _drawing(work, number):
            for batch in micro:
                with work.precision.autocast():
                    loss = loss_sum(work.model, batch.input_ids, batch.labels, batch.positions) / max(1, count)
                if loss.requires_grad:
                    work.precision.backward(loss)
                total += loss.detach()
            work.sampler.prefetch(number + 1)  # a GPU is still busy with this one
        mean = distributed.summed([float(total)], work.device)[0]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        full = str(error) or type(error).__name__
    if full:  # here, where the traceback no longer holds what filled the memory
        raise OutOfMemoryError(explained(full, work.model, micro[0], work.config, parts=work.memory(), autocast=work.precision.autocast))
    refuse_no_gradient(work.model, mean)
    return mean, int(tokens)


@contextmanager
def _drawing(work: Work, number: int) -> Iterator[None]:
    """Random numbers (dropout) that follow from seed and step, so that a resumed run draws them again; the caller's are left alone."""
    seed = (work.config.seed * 1_000_003 + number) * work.sampler.share[1] + work.sampler.share[0]
    with torch.random.fork_rng([work.device] if work.device.type == "cuda" else []):
        torch.manual_seed(seed % 2**63)
        yield


def _clip(work: Work, params: Sequence[nn.Parameter]) -> float:
    """The L2 norm of all gradients, which are then scaled down to `max_grad_norm`."""
    distributed.sum_gradients(params)
    work.precision.unscale(work.optimizer)
    limit = work.config.max_grad_norm
    return float(nn.utils.clip_grad_norm_(params, math.inf if limit is None else limit))
