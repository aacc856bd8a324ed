"""OpenMP's threads, given back before the work goes on in another Python thread.

Each Python thread that computes has OpenMP threads of its own. GCC's runtime, which comes with torch on Linux, counts them all: with
more of them than cores, those that wait are put to sleep at once instead of watching for a moment, and a loop of small products as
in training takes 1.7 times as long. Notebooks get there easily: the kernel's main thread has computed, and the panel trains in another.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import torch

SOFT = 1  # omp_pause_soft: threads go, settings stay


def give_back() -> bool:
    """End the idle OpenMP threads of the calling Python thread; its next parallel product starts them again, in microseconds.

    To be called by the thread that has computed, when another is about to. Source: OpenMP 5.0, section 3.2.44.

    Returns:
        Whether torch's runtime can do that and did: not on Windows, where a symbol is not looked up in what a library needs.
    """
    pause = _pause()
    return pause is not None and pause(SOFT) == 0


def give_back_after_cells() -> None:
    """In a notebook the main thread gives its own back after every cell: another thread that computes could not do it for that one."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is not None:
        shell.events.register("post_run_cell", _after_cell)


def _after_cell(_: object) -> None:
    give_back()


@cache
def _pause() -> Any:
    """`omp_pause_resource_all` of the runtime that torch computes with, found through torch's own library; None without one."""
    try:
        return ctypes.CDLL(torch._C.__file__).omp_pause_resource_all  # noqa: SLF001 - the lowest library that is always there
    except (AttributeError, OSError):
        return None
