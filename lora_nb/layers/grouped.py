"""One product over rows that each belong to a group, with a weight for each group.

    y[s_g : e_g] = x[s_g : e_g] W_g,    x (n, in) sorted by group, W (groups, in, out), y (n, out)

PyTorch has it as `grouped_mm` (from 2.12 on for every type on the CPU); where that is missing, or does not take the type,
the groups go one after another into the same y. The backward pass is written out because `grouped_mm`'s own refuses a
gradient that was expanded, as `sum()` leaves it:

    ∂L/∂x[s_g : e_g] = g[s_g : e_g] W_gᵀ,    ∂L/∂W_g = x[s_g : e_g]ᵀ g[s_g : e_g]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

PRODUCT: Callable[..., Tensor] | None = getattr(F, "grouped_mm", None)
MULTIPLE = 8  # of this a rank has to be, as grouped_mm wants 16 bytes: 4 numbers of 32 bits or 8 of 16


@dataclass(frozen=True)
class Spans:
    """Where each group of sorted rows begins and ends; `ends` are the ends once more, as int32 on the device."""

    places: tuple[tuple[int, int], ...]
    ends: Tensor


def grouped(x: Tensor, w: Tensor, spans: Spans) -> Tensor:
    """x (n, in), W (groups, in, out) → (n, out), differentiable in both."""
    if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
        return GroupedProduct.apply(x, w, spans)  # type: ignore[no-any-return,no-untyped-call]
    return _product(x, w, spans)


class GroupedProduct(torch.autograd.Function):
    """(x, W, spans) → y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, spans: Spans) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.spans = spans
        return _product(x, w, spans)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        for_x, for_w, _ = ctx.needs_input_grad
        g = g.contiguous()
        return _product(g, w.mT, ctx.spans) if for_x else None, _outer(x, g, ctx.spans) if for_w else None, None


def _product(x: Tensor, w: Tensor, spans: Spans) -> Tensor:
    if _fits(x, w):
        assert PRODUCT is not None
        return PRODUCT(x, w, offs=spans.ends)
    y = x.new_empty(len(x), w.shape[2])
    for (start, end), one in zip(spans.places, w, strict=True):
        torch.mm(x[start:end], one, out=y[start:end])
    return y


def _outer(x: Tensor, g: Tensor, spans: Spans) -> Tensor:
    """(groups, in, out)."""
    dw = x.new_zeros(len(spans.places), x.shape[1], g.shape[1])
    for (start, end), one in zip(spans.places, dw, strict=True):
        torch.mm(x[start:end].T, g[start:end], out=one)
    return dw


def _fits(x: Tensor, w: Tensor) -> bool:
    """Whether `grouped_mm` takes them: both inner sizes in whole steps of 16 bytes, and on a GPU 16 bits."""
    kind = x.device.type == "cpu" or x.dtype == torch.bfloat16
    return PRODUCT is not None and kind and not (w.shape[1] % MULTIPLE or w.shape[2] % MULTIPLE)
