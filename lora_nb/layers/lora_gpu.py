"""LoRA's linear layer in 16 bits on a GPU, forward and backward by one product with a low-rank part.

    y = x Wᵀ + b + s · h Bᵀ,    h = x Aᵀ,    x (n, in), W (out, in), A (r, in), B (out, r), y (n, out)

With g = ∂L/∂y, and W and b frozen, the way back has the same form, with g for x, Wᵀ for W, Bᵀ for A and Aᵀ for B:

    ∂L/∂x = g W + s · (g B) A,    ∂L/∂A = s · (g B)ᵀ x,    ∂L/∂B = s · gᵀ h

A large product keeps a GPU's units busy; what the low-rank part costs beside it is reading x once more and passing over y to add to it.
`lora_triton.py` does all in one kernel, at the price of a large product that may be slower than the vendor's. So which of the two does
the work is measured, once for each shape. h (n, r) is kept for the way back: it is small, and x need not be read again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_nb.layers.kernels import kernel, quicker

MANY = 512  # rows from which on it is worth a measurement
MOST = 64  # rank up to which the kernel has room for h beside y
HALVES = {torch.bfloat16, torch.float16}


class LoraProduct16(torch.autograd.Function):
    """(x, W, b, A, B, s) → y, all of one type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float) -> Tensor:  # noqa: PLR0917 - as autograd calls it
        y, h = product(x, w, bias, a, b, s)
        ctx.save_for_backward(x, w, a, b, h)
        ctx.s = s
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, b, h = ctx.saved_tensors
        dx, gb = product(g, w.T, None, b.T, a.T, ctx.s) if ctx.needs_input_grad[0] else (None, g @ b)
        return dx, None, g.sum(0) if ctx.needs_input_grad[2] else None, (gb.T @ x).mul_(ctx.s), (g.T @ h).mul_(ctx.s), None


def product(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float) -> tuple[Tensor, Tensor]:  # noqa: PLR0917 - as in the formula
    """y (n, out) and h (n, r), by the quicker of the two ways."""
    given = (x, w, bias, a, b, s)
    fast = kernel("lora_triton", x.device) if len(x) >= MANY and len(a) <= MOST else None
    if fast is not None:
        key = (x.device, x.dtype, len(x).bit_length(), w.shape, w.stride(), len(a))
        if quicker(key, partial(fast.product, *given), partial(by_steps, *given)):
            return fast.product(*given)  # type: ignore[no-any-return]
    return by_steps(*given)


def by_steps(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float) -> tuple[Tensor, Tensor]:  # noqa: PLR0917
    """The large product, then the low-rank part added to it in place."""
    h = x @ a.T
    return F.linear(x, w, bias).addmm_(h, b.T, alpha=s), h


def suits(x: Tensor, w: Tensor, a: Tensor, dropout: float) -> bool:
    """Whether `LoraProduct16` is the one to take."""
    return x.device.type == "cuda" and x.dtype in HALVES and x.dtype == w.dtype == a.dtype and not dropout
