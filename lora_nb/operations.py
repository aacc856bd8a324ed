"""How many operations, FLOPs and kernel launches something takes: what a time is made of, and the same on every machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

VIEW = "aten._unsafe_view.default"  # torch does not count this one among the views


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what computes; a view only says how to look at what is there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Sequence[Any], args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or str(func) == VIEW)
        return func(*args, **(kwargs or {}))


@torch.no_grad()  # not inference_mode, in which an operation made of others is seen as one
def count_operations(run: Callable[[], object]) -> tuple[int, int]:
    """Operations and FLOPs of a second run, as the first may compute what is kept."""
    run()
    with Operations() as operations:
        run()
    with FlopCounterMode(display=False, custom_mapping=LEFT_OUT) as flops:
        run()
    return operations.count, flops.get_total_flops()


@torch.no_grad()
def count_launches(run: Callable[[], object]) -> int:
    """Kernels that a run starts on a CUDA GPU."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return sum(e.count for e in profile.key_averages() if "LaunchKernel" in e.key)


def _addmm_flops(_into: Sequence[int], a: Sequence[int], b: Sequence[int], *_: object, **__: object) -> int:
    """Of a product added in place: a (n, k), b (k, m)."""
    return 2 * a[0] * a[1] * b[1]


def _mv_flops(a: Sequence[int], *_: object, **__: object) -> int:
    """Of a matrix a (n, k) and a vector."""
    return 2 * a[0] * a[1]


def _addmv_flops(_into: Sequence[int], a: Sequence[int], *_: object, **__: object) -> int:
    """The same, added in place."""
    return 2 * a[0] * a[1]


# Products that torch's count leaves out.
LEFT_OUT = {torch.ops.aten.addmm_: _addmm_flops, torch.ops.aten.mv: _mv_flops, torch.ops.aten.addmv_: _addmv_flops}
