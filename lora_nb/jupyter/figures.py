"""What the panel says of its settings at once: what trains, what it weighs, how long a step takes."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lora_nb.errors import TrainingError
from lora_nb.jupyter.settings import LOW_RANK, Settings
from lora_nb.memory.cards import CARDS

SHOWN_CARDS = ("RTX 3060", "T4", "RTX 4090", "RTX A6000", "H100 80GB")
PROBE = 128  # tokens of the forward that tells how fast this machine is
# A step of an adapter: forward, and a backward that carries gradients to the inputs only, about as long as the forward;
# with all weights training there is a third product for these.
STEP_IN_FORWARDS = {"adapter": 2.2, "full": 3.2}


@dataclass(frozen=True)
class Speed:
    """Seconds for a token, and where they come from."""

    seconds: float
    source: str


@torch.no_grad()
def probe(model: nn.Module) -> Speed:
    """Of a forward through the model as it is, in training steps' tokens."""
    device = next(model.parameters()).device
    ids = torch.zeros(1, PROBE, dtype=torch.long, device=device)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return Speed(min(times) / PROBE, "from a forward pass of the base")


def step_seconds(speed: Speed, settings: Settings) -> float:
    """Of one optimizer step with full rows; a measured speed is of steps already."""
    factor = STEP_IN_FORWARDS["full" if settings.method == "full" else "adapter"] if "forward" in speed.source else 1.0
    return speed.seconds * factor * settings.batch_size * settings.seq_len


def lines() -> dict[str, float]:
    """What there is to hold the bar against: some cards, and this machine."""
    here = machine_memory()
    shown: dict[str, float] = {name: CARDS[name].bytes for name in SHOWN_CARDS}
    return {"this machine": float(here), **shown} if here else shown


def machine_memory() -> int:
    """Bytes of this machine: of the GPU if there is one, else of the system; 0 where it does not say."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def scale_said(settings: Settings) -> str:
    """The factor that the update counts with."""
    return f"scale α / r = {settings.lora_alpha / settings.r:.4g}" if settings.method in LOW_RANK else ""


def run_folder(data: str) -> Path:
    """A new folder for a run's log and checkpoints; made here, so that a second notebook takes another.

    It lies below the notebook or, where that may not be written, among the system's temporary ones.

    Raises:
        TrainingError: none of them may be written.
    """
    stem = "".join(c if c.isalnum() else "-" for c in Path(data).stem)[:40] or "run"
    name, number = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}", 1
    folder = Path("runs") / name
    while True:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
            folder = folder.with_name(f"{name}-{number}")
        except OSError as error:
            return _temporary(f"lora_nb-{name}-", error)
        else:
            return folder


def _temporary(prefix: str, reason: OSError) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=prefix))
    except OSError:
        raise TrainingError(
            f"The run has no place for its log: 'runs' cannot be made beside the notebook ({reason.strerror}), nor a temporary folder. "
            "Move the notebook to a folder that you may write to, on a disk with room."
        ) from reason
