"""What the side panel of JupyterLab asks a kernel: the machine's memory, and the runs that the kernel holds."""

from __future__ import annotations

import base64
import gc
import json
import os
import sys
from collections.abc import Iterator
from math import isfinite
from typing import Any

import torch

from lora_nb.training.run import Run


def state() -> str:
    """Machine and runs as JSON, in base64: a kernel's answer is Python's `repr`, which then needs no reading of Python's escapes."""
    there = {"machine": [*_host(), *_gpus()], "runs": [told(run) for run in runs()]}
    return base64.b64encode(json.dumps(there).encode()).decode()


def runs() -> list[Run]:
    """All runs of this process that something still holds; those that go on first."""
    held = [thing for thing in gc.get_objects() if type(thing) is Run]  # isinstance would ask strangers for attributes, which some warn of
    return sorted(held, key=lambda run: not goes_on(run))


def goes_on(run: Run) -> bool:
    """Whether a thread is inside the loop that fills it. Only the loop knows it by that name."""
    return any(frame.f_locals.get("run") is run for frame in _frames() if frame.f_globals.get("__name__") == "lora_nb.training.loop")


def told(run: Run) -> dict[str, Any]:
    """A run in the words of the side panel."""
    loss = run.losses[-1] if run.losses else float("nan")
    return {
        "adapter": run.adapter or "the whole model",
        "state": "running" if goes_on(run) else f"stopped by {run.stopped_by}",
        "steps": run.steps,
        "loss": loss if isfinite(loss) else None,
    }


def _frames() -> Iterator[Any]:
    for top in sys._current_frames().values():  # noqa: SLF001 - documented: there is no other way to see other threads
        frame: Any = top
        while frame is not None:
            yield frame
            frame = frame.f_back


def _host() -> list[dict[str, Any]]:
    """Main memory, where the system tells it."""
    try:
        page, pages, free = (os.sysconf(name) for name in ("SC_PAGE_SIZE", "SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return []
    return [{"name": "memory", "total": page * pages, "free": _available() or page * free}]


def _available() -> int:
    """What Linux could free for a new program, the disk's cache included; 0 where it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:  # noqa: PTH123 - no file of ours
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0


def _gpus() -> list[dict[str, Any]]:
    """Memory of each GPU; CUDA is not started for it."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):  # type: ignore[no-untyped-call]
        return []
    seen = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        seen.append({"name": torch.cuda.get_device_name(i), "total": total, "free": free})
    return seen
