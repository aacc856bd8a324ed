"""Checkpoints of a run: written whole or not at all, and enough to go on from to the bit.

A checkpoint is one safetensors file: what trains, the optimizer's state, and as JSON in its header the losses so far, the loss
scale, and what it was made with. Order of the data and random numbers follow from the seed and the step's number, so the number
is all that is kept of them. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from lora_nb.adapter_files import digest, sync_folder
from lora_nb.attach import adapters
from lora_nb.bases import fingerprint
from lora_nb.blocks import Block
from lora_nb.configs import TrainConfig
from lora_nb.errors import TrainingError
from lora_nb.training.distributed import first
from lora_nb.training.optim import named_trainable
from lora_nb.training.precision import Precision
from lora_nb.training.run import Run
from lora_nb.version import __version__

KEPT = 2  # checkpoints: should the newest be damaged by a failing disk, there is another
# A run may be made longer, be watched in another way, or computed with less memory; everything else would make it another run.
FREE = (
    *("max_steps", "num_train_epochs", "eval_every", "early_stopping_patience", "checkpoint_dir", "checkpoint_every", "resume"),
    *("log_file", "tensorboard_dir", "gradient_checkpointing", "compile"),
)


class Keeper:
    """Keeps a run: fills it from the newest checkpoint if the config says resume, and writes one when it is due.

    A disk that is full ends the keeping with a warning, not the run; the checkpoints before stay.

    Raises:
        TrainingError: the checkpoint is of another run, or each one there is damaged.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, precision: Precision, run: Run, blocks: Sequence[Block]) -> None:
        self.model, self.optimizer, self.precision, self.run = model, optimizer, precision, run
        config = run.config
        self.folder = Path(config.checkpoint_dir) if config.checkpoint_dir else None
        self.every = config.checkpoint_every or 100
        self.identity = identity(model, blocks, config) if self.folder else {}
        if self.folder and config.resume and (found := read(self.folder)):
            tensors, facts = found
            refuse_another(self.identity, facts["identity"], self.folder)
            put_back(model, optimizer, tensors, facts)
            precision.load(facts["scaler"])
            run.continue_from(facts["run"])
        self.saved = run.steps

    def save_if_due(self) -> None:
        if self.run.steps % self.every == 0:
            self.save()

    def save(self) -> None:
        """Unless that was done at this step, or by another process."""
        if not self.folder or self.saved == self.run.steps or not first():
            return
        tensors, facts = gather(self.model, self.optimizer)
        facts |= {"identity": self.identity, "scaler": self.precision.state(), "run": self.run.history()}
        try:
            write(self.folder, self.run.steps, tensors, facts)
        except TrainingError as error:
            self.run.notice = str(error)
            warnings.warn(f"{error} The run goes on.", stacklevel=3)
        self.saved = self.run.steps


def write(folder: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """A checkpoint under its own name first, synced; then renamed, which needs no space; then older ones go.

    Raises:
        TrainingError: it cannot be written; those that were there are untouched.
    """
    goal = folder / f"step-{step:08d}.safetensors"
    made = folder / f".{goal.name}.{os.getpid()}.tmp"
    data = to_safetensors(tensors, {"facts": json.dumps(facts), "sha256": digest(tensors), "lora_nb_version": __version__})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with made.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        made.replace(goal)
        sync_folder(folder)
        for old in _checkpoints(folder)[KEPT:]:
            old.unlink()
        for left in folder.glob(".step-*.tmp"):  # of a run that was killed while writing
            left.unlink()
    except OSError as error:
        with suppress(OSError):
            made.unlink()
        raise TrainingError(
            f"The checkpoint of step {step} cannot be written in {str(folder)!r}: {error.strerror or error}. Those before it are whole. "
            "Make room there, or choose another checkpoint_dir."
        ) from error


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest whole checkpoint: its tensors, and the facts in its header; None where there is none yet.

    Raises:
        TrainingError: there are some, and each is damaged.
    """
    wrong = ""
    for file in _checkpoints(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                about = opened.metadata() or {}
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a dict
            if about.get("sha256") == digest(tensors):
                return tensors, dict(json.loads(about["facts"]))
            wrong = f"{str(file)!r} holds other values than were written"
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            wrong = f"{str(file)!r} cannot be read ({error})"
        warnings.warn(f"{wrong}; the one before it is tried.", stacklevel=4)
    if wrong:
        raise TrainingError(f"No checkpoint is whole: {wrong}. Start anew in another checkpoint_dir, or without resume.")
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """The newest first."""
    return sorted(folder.glob("step-*.safetensors"), reverse=True)


def carried(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint keeps of the model, by name: what trains, and counts such as BatchNorm's beside it."""
    buffers = {n: b for n, b in model.named_buffers() if ".adapters." in f".{n}" or not adapters(model).reports}
    kept = model.state_dict(keep_vars=True).keys()
    return {**named_trainable(model), **{n: b for n, b in buffers.items() if n in kept}}


def gather(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors under keys of one file, on the CPU; the optimizer's other numbers beside them."""
    state = optimizer.state_dict()["state"]
    tensors = {f"model.{name}": t for name, t in carried(model).items()}
    tensors |= {f"optimizer.{i}.{key}": t for i, values in state.items() for key, t in values.items() if isinstance(t, Tensor)}
    numbers = {str(i): {key: v for key, v in values.items() if not isinstance(v, Tensor)} for i, values in state.items()}
    # A file takes no two names for one memory: each gets a copy.
    return {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}, {"optimizer": numbers}


@torch.no_grad()
def put_back(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """What `gather` took.

    Raises:
        TrainingError: the checkpoint is of other parameters.
    """
    here = {f"model.{name}": t for name, t in carried(model).items()}
    there = {key: t for key, t in tensors.items() if key.startswith("model.")}
    odd = sorted(key for key in here.keys() | there.keys() if key not in here or key not in there or here[key].shape != there[key].shape)
    if odd:
        raise TrainingError(
            f"The checkpoint is of another adapter: {len(odd)} parameters differ in name or shape, such as {odd[0][6:]!r}. Attach with the "
            "config that the run began with, or start anew in another checkpoint_dir."
        )
    for key, t in here.items():
        t.copy_(there[key])
    state: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in facts["optimizer"].items()}
    for key, t in tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".", 2)
            state[int(i)][name] = t
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def identity(model: nn.Module, blocks: Sequence[Block], config: TrainConfig) -> dict[str, Any]:
    """What must be the same for a run to go on as if it had not been interrupted."""
    settings = {key: value for key, value in asdict(config).items() if key not in FREE}
    base = fingerprint(model) if adapters(model).reports else ""  # without adapters the base itself is what changes
    return {"settings": settings, "data": _checksum(blocks), "base": base}


def refuse_another(here: dict[str, Any], there: dict[str, Any], folder: Path) -> None:
    """Raise unless the checkpoint is of the run that is asked for."""
    odd = [f"{k}={v!r} (there {there['settings'].get(k)!r})" for k, v in here["settings"].items() if there["settings"].get(k) != v]
    odd += [f"the {what}" for what in ("data", "base") if here[what] != there[what]]
    if odd:
        raise TrainingError(
            f"The run in {str(folder)!r} cannot be resumed as this one: {', '.join(odd)} differ{'' if len(odd) > 1 else 's'}. Give what it "
            "was started with, or another checkpoint_dir."
        )


def _checksum(blocks: Iterable[Block]) -> int:
    """Of all tokens and labels, in their order."""
    found = 0
    for block in blocks:
        for numbers in (block.input_ids, block.labels):
            found = zlib.crc32(array("q", numbers), found)
    return found
