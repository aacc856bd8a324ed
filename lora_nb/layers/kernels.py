"""Which Triton kernels work on this machine: those that were seen to give what PyTorch's operators give.

A kernel lies in a file `*_triton.py` beside its twin in plain PyTorch, with a function `agrees(device)` that tries the two against each
other at odd sizes. Where Triton is missing, where a GPU is not one that a kernel fits, or where results differ, the twin does the work, as
it does on a CPU.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

TRIED: dict[tuple[str, torch.device], tuple[Any, str]] = {}  # the module; or None, and why not
QUICKER: dict[tuple[torch.device, Hashable], bool] = {}
MARGIN = 0.95  # of its twin's time is the most that a kernel may take: with less to gain, chance would choose


def kernel(name: str, device: torch.device) -> Any:
    """The module `lora_nb.layers.NAME` if its kernel may be used on tensors of that device, else None. The first call tries it."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return None
    if (name, device) not in TRIED:
        with torch.cuda.device(device):  # which may not be the current one, as in a model that is spread over several
            if torch.cuda.is_current_stream_capturing():  # a CUDA graph cannot hold a trial, which waits for its outcome
                return None
            try:
                TRIED[name, device] = tried(name, device)
            except torch.OutOfMemoryError:  # too full to try it in, now
                return None
    return TRIED[name, device][0]


def tried(name: str, device: torch.device) -> tuple[Any, str]:
    """The module, or None and why. On a GPU that is the current one."""
    if find_spec("triton") is None:
        return None, "Triton is not installed"
    try:
        module = import_module(f"lora_nb.layers.{name}")
        drawing = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with drawing, torch.no_grad(), torch.autocast(device.type, enabled=False):
            seed(device)
            same = module.agrees(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a compiler or a driver raises on hardware that it does not know
        return None, f"{type(error).__name__}: {error}"
    if not same:
        warnings.warn(f"{name} gives other results on {device} than PyTorch does: it is not used. Please report this.", stacklevel=2)
        return None, "its results differ from PyTorch's"
    return module, ""


def launching_at(t: Tensor) -> torch.cuda.device:
    """Within, the GPU that `t` lies on is the current one: on that one Triton launches, whatever its arguments lie on."""
    return torch.cuda.device_of(t)  # type: ignore[no-untyped-call]


def seed(device: torch.device) -> None:
    """Of that device alone: `torch.manual_seed` would begin anew on every other GPU."""
    if device.type == "cuda":
        torch.cuda.manual_seed(0)  # the current one's
    else:
        torch.default_generator.manual_seed(0)


def quicker(device: torch.device, key: Hashable, ours: Callable[[], object], theirs: Callable[[], object]) -> bool:
    """Whether `ours` is quicker than `theirs` on that GPU; measured once for each key.

    As with cuDNN's benchmark mode, another process may measure otherwise, and then rounds otherwise. So
    `torch.use_deterministic_algorithms(True)` leaves it at `theirs`.
    """
    if torch.are_deterministic_algorithms_enabled():
        return False
    if (device, key) not in QUICKER:
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return False
            try:
                QUICKER[device, key] = milliseconds(ours) < MARGIN * milliseconds(theirs)
            except torch.OutOfMemoryError:  # too full to measure in, now
                return False
    return QUICKER[device, key]


def milliseconds(run: Callable[[], object], repeat: int = 5, rounds: int = 3) -> float:
    """The least mean time of some runs in a row, after one that may compile."""
    run()
    best = math.inf
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(repeat):
            run()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / repeat)
    return best
