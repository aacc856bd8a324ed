"""How the benchmarks measure, as the package itself does (`lora_nb/timing.py`), and what they say of the machine."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_nb.timing import Times, interleaved

__all__ = ["RESULTS", "Line", "Times", "interleaved", "machine", "write"]

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Line:
    """One line of the table: what was measured, the target, and what else there is to say."""

    measure: str
    threads: int | None
    value: float | None
    target: str = ""
    note: str = ""

    @property
    def met(self) -> str:
        if self.value is None or not self.target:
            return ""
        sign, bound = self.target.split()
        return "yes" if (self.value <= float(bound) if sign == "≤" else self.value >= float(bound)) else "no"


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
