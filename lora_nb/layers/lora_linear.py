"""LoRA's linear layer with a forward and a backward pass of its own.

    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ,    x (n, in), W (out, in), A (r, in), B (out, r), y (n, out)

With g = ∂L/∂y the chain rule gives, W and b being frozen,

    ∂L/∂B = s · gᵀ (x Aᵀ),    ∂L/∂A = s · (g B)ᵀ x,    ∂L/∂x = g W + s · (g B) A

Autograd on the plain expression finds the same, but passes over (n, out) several times to scale and to add, and keeps x
twice where the adapter's type is another. Here the low-rank part is added in place by the product itself, and what is kept
for the backward pass is x alone; x Aᵀ, as cheap as it is small, is computed again.

With many rows it is cheaper still to form V = W + s · B A once, r rows' worth of work, and to multiply by it as by W:

    y = x Vᵀ + b,    ∂L/∂x = g V

That keeps one copy of the weight until the backward pass, so it is done in 32 bits only, where V holds an update without
rounding it away, and only where the rows outweigh the copy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MANY = 256  # rows from which on V pays


class LoraProduct(torch.autograd.Function):
    """(x, W, b, A, B, s) → y, in one type, for x of two dimensions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float) -> Tensor:  # noqa: PLR0917 - as autograd calls it
        summed = x.dtype == torch.float32 and x.shape[0] >= MANY
        v = torch.addmm(w, b, a, alpha=s) if summed else w
        ctx.save_for_backward(x, v, a, b)
        ctx.s, ctx.summed = s, summed
        y = F.linear(x, v, bias)
        return y if summed else y.addmm_(x @ a.T, b.T, alpha=s)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, v, a, b = ctx.saved_tensors
        s: float = ctx.s
        for_x, _, for_bias, for_a, for_b, _ = ctx.needs_input_grad
        gb = g @ b if for_a or (for_x and not ctx.summed) else None  # (n, r)
        dx = g @ v if for_x else None
        if dx is not None and gb is not None and not ctx.summed:
            dx.addmm_(gb, a, alpha=s)
        da = (gb.T @ x).mul_(s) if gb is not None and for_a else None
        db = ((x @ a.T).T @ g).mul_(s).T if for_b else None
        return dx, None, g.sum(0) if for_bias else None, da, db, None


def lora_linear(x: Tensor, w: Tensor, bias: Tensor | None, low_rank: tuple[Tensor, Tensor, float]) -> Tensor:
    """y for x (…, in); `low_rank` is (A, B, s)."""
    a, b, s = low_rank
    rows = x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x
    if torch.is_grad_enabled() and (x.requires_grad or a.requires_grad or b.requires_grad):
        y: Tensor = LoraProduct.apply(rows, w, bias, a, b, s)  # type: ignore[no-untyped-call]
    else:
        y = F.linear(rows, w, bias).addmm_(torch.mm(rows, a.T), b.T, alpha=s)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], -1)


def is_plain(base: nn.Module, x: Tensor, a: Tensor) -> bool:
    """Whether `base` on `x` is a product with a frozen weight and nothing else, in the adapter's type."""
    if type(base) is not nn.Linear or base._forward_hooks or base._forward_pre_hooks or base._backward_hooks:
        return False
    w = base._parameters["weight"]
    same = w is not None and x.dtype == a.dtype == w.dtype and not w.requires_grad
    return same and not torch.is_autocast_enabled(x.device.type)
