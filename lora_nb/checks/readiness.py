"""Ten seconds that tell whether a machine can take the course: versions, memory, the front end, and two training steps."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_nb.render import format_bytes, html_table, text_table

NEEDED = {"torch": (2, 11), "transformers": (5, 0), "ipywidgets": (8, 1), "anywidget": (0, 9), "matplotlib": (3, 0), "safetensors": (0, 4)}
LEAST_MEMORY = 2 * 2**30
LEAST_DISK = 200 * 2**20
Finding = tuple[str, bool, str, str]  # what, whether it is well, what was found, what to do


@dataclass(frozen=True)
class Readiness:
    """What was looked at; `ready` says whether all of it is well."""

    findings: tuple[Finding, ...]

    @property
    def ready(self) -> bool:
        return all(well for _, well, _, _ in self.findings)

    def _rows(self) -> list[tuple[str, str, str]]:
        return [
            (what, "✓ well" if well else "✗ to do", found if well else f"{found}: {remedy}") for what, well, found, remedy in self.findings
        ]

    def _title(self) -> str:
        return "This machine is ready for the course." if self.ready else "Not ready yet: see the lines marked ✗."

    def __repr__(self) -> str:
        return f"{self._title()}\n{text_table(['what', 'verdict', 'found'], self._rows())}"

    def _repr_html_(self) -> str:
        return html_table(["what", "verdict", "found"], self._rows(), self._title())


def readiness() -> Readiness:
    """Look; nothing is changed, and nothing is sent anywhere."""
    return Readiness(tuple(_findings()))


def _findings() -> Iterator[Finding]:
    yield "Python", sys.version_info >= (3, 11), platform.python_version(), "the course needs 3.11 or newer"
    yield from (_version(name, least) for name, least in NEEDED.items())
    memory = _free_memory()
    if memory:
        yield "free memory", memory >= LEAST_MEMORY, format_bytes(memory), "close other programs; a notebook needs up to 2 GiB"
    disk = shutil.disk_usage(Path()).free
    yield "free disk", disk >= LEAST_DISK, format_bytes(disk), "make room for saved adapters"
    yield "this folder can be written", os.access(".", os.W_OK), str(Path.cwd()), "open the notebook in a folder of your own"
    yield _front_end()
    yield _training()


def _version(name: str, least: tuple[int, ...]) -> Finding:
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return name, False, "not installed", f"pip install {name}"
    numbers = tuple(int(n) for n in found.split("+")[0].split(".")[:2] if n.isdigit())
    return name, numbers >= least, found, f"the course needs {'.'.join(map(str, least))} or newer"


def _free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0  # not Linux: nothing is said


def _front_end() -> Finding:
    """Widgets need the same environment on both sides: the kernel's and that of the Lab that shows it."""
    places = [Path(sys.prefix) / "share/jupyter/labextensions" / name for name in ("anywidget", "@jupyter-widgets/jupyterlab-manager")]
    absent = [p.name for p in places if not p.is_dir()]
    found = f"widgets lie beside this kernel in {sys.prefix}" if not absent else f"{', '.join(absent)} is not in {sys.prefix}"
    return "widgets", not absent, found, "install lora-nb where JupyterLab is installed, and restart the server"


def _training() -> Finding:
    start = time.perf_counter()
    try:
        losses = _two_steps()
    except Exception as error:  # noqa: BLE001 - that is the finding
        return "two training steps", False, f"{type(error).__name__}: {error}", "report this with the lines above"
    seconds = time.perf_counter() - start
    return "two training steps", losses == 2 and seconds < 60, f"{seconds:.1f} s, the base loaded", "the course will be slow here"


def _two_steps() -> int:
    from lora_nb.attach import attach
    from lora_nb.bases import load
    from lora_nb.configs import LoraConfig, TrainConfig
    from lora_nb.datasets import dataset
    from lora_nb.training.loop import train

    model, tokenizer = load("tiny")
    attach(model, LoraConfig(r=4, lora_alpha=8))
    return train(model, tokenizer, dataset("tone")[:32], TrainConfig(max_steps=2, batch_size=4)).steps
