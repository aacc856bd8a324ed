"""One measurement in a process of its own, and how far its memory rose."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def alone(function: Callable[..., Result], *args: Any) -> Result:
    """`function(*args)` in a new process that has imported the libraries and done nothing else."""
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    context.set_forkserver_preload(["torch", "transformers", "peft", "lora_nb", "lora_nb.training.loop"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def rise(run: Callable[[], object], device: str) -> tuple[int, int]:
    """Bytes by which memory rose above where it stood, at most, while `run()`; and the most it held.

    On CUDA those of torch's allocator. Else those of the process: Linux keeps the highest, and forgets it when asked to.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        peak = torch.cuda.max_memory_allocated()
        return peak - before, peak
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    peak = _status("VmHWM")
    return peak - before, peak


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])
