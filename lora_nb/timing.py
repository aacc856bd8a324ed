"""Fair timing: variants in turn, from another starting point each round, and ratios within a round.

On a machine that does other things as well, two times that were taken one after the other say little about each other: a slow
moment of the machine is in one of them. Taken within a round it is in both, and their ratio stays.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Seconds of each variant, round by round."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Over the rounds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, peer: str) -> float:
        """The median over the rounds of one variant's time over another's: a slow moment of the machine slows both."""
        return statistics.median(self._ratios(name, peer))

    def spread(self, name: str, peer: str) -> tuple[float, float]:
        """The middle half of those ratios."""
        ratios = self._ratios(name, peer)
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (ratios[0],) * 3
        return low, high

    def _ratios(self, name: str, peer: str) -> list[float]:
        return [a / b for a, b in zip(self.seconds[name], self.seconds[peer], strict=True)]


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    repeat: int = 1,
    settle: int = 0,
    warm_up: int = 2,
    synchronise: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Each round runs every variant once, from another starting point each time.

    Args:
        repeat: timed runs in a row, of which the mean is kept.
        settle: runs before them that are not timed. Variants that share memory otherwise find it in the processor's cache where
            the one before has read it, and one with memory of its own does not.
        warm_up: runs of each variant before the first round.
        synchronise: waits for what was started, such as `torch.cuda.synchronize`.
        clock: seconds; `time.process_time` counts only the processor's time for this process, for one thread on a busy machine.
    """
    from tqdm.auto import tqdm

    names, wait = list(variants), synchronise or (lambda: None)
    for _ in range(warm_up):
        for run in variants.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in tqdm(range(rounds), desc="timing", unit="round", delay=2, leave=False):  # drawn between rounds, so it is in no time
            turn = i % len(names)
            for name in names[turn:] + names[:turn]:
                for _ in range(settle):
                    variants[name]()
                seconds[name].append(_timed(variants[name], repeat, wait, clock))
    finally:
        if collecting:
            gc.enable()
    return Times(seconds)


def _timed(run: Callable[[], object], repeat: int, wait: Callable[[], object], clock: Callable[[], float]) -> float:
    wait()
    start = clock()
    for _ in range(repeat):
        run()
    wait()
    return (clock() - start) / repeat
