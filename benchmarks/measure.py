"""How the benchmarks measure: variants interleaved, medians, ratios of the same round; and what they say of the machine."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Times:
    """Seconds of each variant, round by round."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, peer: str) -> float:
        """The median over the rounds of one variant's time over another's: a slow moment of the machine slows both."""
        return round(statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[peer], strict=True)), 4)

    def spread(self, name: str, peer: str) -> tuple[float, float]:
        """The middle half of those ratios."""
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[peer], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        return round(low, 4), round(high, 4)


def interleaved(variants: Mapping[str, Callable[[], object]], *, rounds: int, repeat: int = 1, warm_up: int = 2) -> Times:
    """Each round runs every variant once (`repeat` times in a row), from another starting point each time."""
    names = list(variants)
    for _ in range(warm_up):
        for run in variants.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.disable()
    try:
        for i in range(rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                run, start = variants[name], time.perf_counter()
                for _ in range(repeat):
                    run()
                seconds[name].append((time.perf_counter() - start) / repeat)
    finally:
        gc.enable()
    return Times(seconds)


def machine() -> dict[str, Any]:
    """Processor, versions, date."""
    import torch

    words = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in words if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def write(name: str, content: Mapping[str, Any]) -> None:
    """`results/NAME.json`, with the machine."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), **content}, indent=2) + "\n")
