"""Memory for large results, used again once nobody holds the last one.

A large new tensor costs the operating system a page fault every 4 KiB. On a CPU that takes longer than filling it does, so a
weight that is unpacked for one product, dropped, and unpacked again would spend most of its time there. CUDA's allocator
keeps freed memory for the same reason.
"""

from __future__ import annotations

import sys
from threading import Lock
from typing import Any

import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes; below, the allocator itself keeps what is freed
LARGEST = 256 << 20  # bytes kept in all
KEPT: dict[int, Any] = {}  # size in bytes → an array that owns so many; the latest used comes last
LOCK = Lock()


def empty(n: int, dtype: torch.dtype) -> Tensor:
    """(n,) on the CPU, with whatever stands in it."""
    size = n * dtype.itemsize
    if size < SMALLEST:
        return torch.empty(n, dtype=dtype, device="cpu")
    with LOCK:
        array = KEPT.pop(size, None)
        # Tensors made from an array hold it, and so do their views. Two hold a free one: this name, and getrefcount's own.
        if array is None or sys.getrefcount(array) > 2:
            array = torch.empty(size, dtype=torch.uint8, device="cpu").numpy()
        KEPT[size] = array
        while sum(KEPT) > LARGEST:
            del KEPT[next(iter(KEPT))]
        return torch.from_numpy(array).view(dtype)


def release() -> int:
    """Give back what is kept; returns how many bytes that were."""
    with LOCK:
        size = sum(KEPT)
        KEPT.clear()
    return size
