"""Time on a GPU by CUDA's own events, of what no cache flatters; on a CPU, where a script is only tried, by the clock."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from measure import Line, Times, interleaved

Run = Callable[[], object]
NEEDED = 60  # seconds that a section takes at least


class Late(Exception):  # noqa: N818 - not a failure
    """The time was over in the midst of a measurement."""


@contextmanager
def until(deadline: float) -> Iterator[None]:
    """Within, `Late` is raised when that time has come, and again every few seconds should someone swallow it."""

    def ring(*_: object) -> None:
        raise Late("the time was over")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, deadline - time.monotonic()), 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Stopwatch:
    """Seconds, as the device counts them; waits for what was started before."""

    def __init__(self, device: str) -> None:
        self.device, self.passed = device, 0.0
        self.last = mark() if device == "cuda" else None

    def __call__(self) -> float:
        if self.last is None:
            return time.perf_counter()
        now = mark()
        now.synchronize()
        self.passed += self.last.elapsed_time(now) / 1000  # from mark to mark: CUDA's 32 bits would hold a minute to 4 µs
        self.last = now
        return self.passed


def mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def kept(runs: Sequence[Callable[[], object]]) -> list[Run]:
    """The same runs, each of which keeps its last result, so that its next one lies elsewhere than the others'."""
    results: list[object] = [None] * len(runs)

    def keeping(i: int) -> Run:
        def run() -> None:
            results[i] = runs[i]()

        return run

    return [keeping(i) for i in range(len(runs))]


def at_once(runs: Sequence[Run], device: str) -> Run:
    """All runs in one call: on a GPU as a CUDA graph, so that its time is measured and not Python's."""

    def every() -> None:
        for run in runs:
            run()

    if device != "cuda":
        return every
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        every()
        every()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        every()
    return graph.replay


def measured(variants: Mapping[str, Sequence[Run]], device: str, *, rounds: int, repeat: int = 5) -> Times:
    """Seconds of one run. The runs of a variant are alike but for their tensors, of which there are more than a cache holds."""
    calls = {name: at_once(runs, device) for name, runs in variants.items()}
    times = interleaved(calls, rounds=rounds, repeat=repeat, clock=Stopwatch(device))
    return Times({name: [s / len(variants[name]) for s in seconds] for name, seconds in times.seconds.items()})


@dataclass
class Bench:
    """Where it runs, how long it may, and what was found."""

    on: str
    deadline: float
    lines: list[Line] = field(default_factory=list)
    cases: list[dict[str, Any]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return torch.empty(0, device=self.on).device

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on == "cuda" else torch.float32

    def size(self, full: Any, small: Any) -> Any:
        return full if self.on == "cuda" else small

    def is_late(self) -> bool:
        return time.monotonic() > self.deadline - NEEDED

    def add(self, measure: str, value: float | None, target: str = "", note: str = "") -> None:
        """A line of the table; on a CPU, where sizes are tiny, without a target."""
        row = Line(measure, None, value, self.size(target, ""), note)
        self.lines.append(row)
        said = "" if value is None else f"{value:,.3f}"
        print(f"| {measure} | {said} | {row.target} | {row.met} | {note} |", flush=True)

    def times(self, variants: dict[str, list[Run]]) -> Times:
        return measured(variants, self.on, rounds=self.size(20, 2), repeat=self.size(5, 1))


def spread(times: Times, name: str, peer: str) -> str:
    """Of the ratios, in words."""
    low, high = times.spread(name, peer)
    return f"middle half {low:.3f} to {high:.3f}"


def free(on: str) -> None:
    """What nobody holds goes back to the device."""
    gc.collect()
    if on == "cuda":
        with suppress(RuntimeError):  # a kernel that went astray leaves a device that does nothing any more
            torch.cuda.empty_cache()
