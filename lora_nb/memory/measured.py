"""What a piece of code takes, measured: for estimates to be held against."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def rise(step: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes by which allocated memory rises at most while `step` runs: what `torch.cuda.max_memory_allocated()` says, on a CPU as well.

    There torch's profiler notes each allocation and each release, and this is their running sum at its highest. The process'
    resident memory would have freed pages in it, and miss what lives for a moment only.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with _quietly(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


@contextmanager
def _quietly() -> Iterator[None]:
    """The profiler's C++ writes to the process' standard error, whatever the level of logging."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
