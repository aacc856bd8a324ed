"""LoRA's linear layer in 16 bits on a GPU, forward and backward by one product with a low-rank part.

    y = x Wᵀ + b + s · h Bᵀ,    h = x Aᵀ,    x (n, in), W (out, in), A (r, in), B (out, r), y (n, out)

With g = ∂L/∂y, and W and b frozen, the way back has the same form, with g for x, Wᵀ for W, Bᵀ for A and Aᵀ for B:

    ∂L/∂x = g W + s · (g B) A,    ∂L/∂A = s · (g B)ᵀ x,    ∂L/∂B = s · gᵀ h

A large product keeps a GPU's units busy; what the low-rank part costs beside it is reading x once more and passing over y to add to it.
`lora_triton.py` does all in one kernel, at the price of a large product that may be slower than the vendor's. So which of the two does
the work is measured, once for each shape. h (n, r) is kept for the way back: it is small, and x need not be read again.

A weight in four bits (QLoRA; Dettmers et al., 2023, arXiv:2305.14314, equation 5) is the same with Ŵ for W. Ŵ lives for the length of one
product and is made again on the way back, in memory that CUDA's allocator hands from one layer to the next: what is kept is x and h.
With dropout D, h = D(x) Aᵀ, and what A adds to ∂L/∂x has its gaps; that is done by PyTorch's operators.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_nb.layers.dropout import dropout_mask, random_state
from lora_nb.layers.kernels import kernel, quicker
from lora_nb.layers.nf4 import dequantize
from lora_nb.layers.quantized import QuantizedTensor

MANY = 512  # rows from which on it is worth a measurement
MOST = 64  # rank up to which the kernel has room for h beside y
DEVICES = {"cuda"}  # where products in 16 bits are quick
HALVES = {torch.bfloat16, torch.float16}


class LoraProduct16(torch.autograd.Function):
    """(x, W, b, A, B, s, p) → y, all of one type; W may be in four bits, which have none. p is the probability of dropout on A's input."""

    @staticmethod
    def forward(  # noqa: PLR0917 - as autograd calls it
        ctx: Any, x: Tensor, w: Tensor | QuantizedTensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float, p: float = 0.0
    ) -> Tensor:
        ctx.state, ctx.s, ctx.p = random_state(x) if p else None, s, p
        ctx.packed = w if isinstance(w, QuantizedTensor) else None  # frozen, so autograd need not watch it
        if p:
            h = F.dropout(x, p) @ a.T
            y = F.linear(x, dense(w, x.dtype), bias).addmm_(h, b.T, alpha=s)
        else:
            y, h = product(x, dense(w, x.dtype), bias, a, b, s)
        ctx.save_for_backward(x, None if isinstance(w, QuantizedTensor) else w, a, b, h)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, b, h = ctx.saved_tensors
        for_x, _, for_bias, *_ = ctx.needs_input_grad
        mask = None if ctx.state is None else dropout_mask(ctx.state, x, x.dtype, ctx.p)
        dx: Tensor | None = None
        if for_x and mask is None:
            dx, gb = product(g, dense(ctx.packed or w, g.dtype).T, None, b.T, a.T, ctx.s)
        else:
            gb = g @ b
            if for_x:
                dx = (g @ dense(ctx.packed or w, g.dtype)).add_((gb @ a).mul_(mask), alpha=ctx.s)
        seen = x if mask is None else mask.mul_(x)
        return dx, None, g.sum(0) if for_bias else None, (gb.T @ seen).mul_(ctx.s), (g.T @ h).mul_(ctx.s), None, None


def dense(w: Tensor | QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """W, or Ŵ for as long as its caller holds it."""
    return dequantize(w, dtype) if isinstance(w, QuantizedTensor) else w


def product(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float) -> tuple[Tensor, Tensor]:  # noqa: PLR0917 - as in the formula
    """y (n, out) and h (n, r), by the quicker of the two ways."""
    given = (x, w, bias, a, b, s)
    fast = kernel("lora_triton", x.device) if len(x) >= MANY and len(a) <= MOST else None
    if fast is not None:
        key = (x.dtype, len(x).bit_length(), w.shape, w.stride(), len(a))
        if quicker(x.device, key, partial(fast.product, *given), partial(by_steps, *given)):
            return fast.product(*given)  # type: ignore[no-any-return]
    return by_steps(*given)


def by_steps(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float) -> tuple[Tensor, Tensor]:  # noqa: PLR0917
    """The large product, then the low-rank part added to it in place."""
    h = x @ a.T
    return F.linear(x, w, bias).addmm_(h, b.T, alpha=s), h


def suits(x: Tensor, w: Tensor, a: Tensor, dropout: float) -> bool:
    """Whether `LoraProduct16` is the one to take."""
    return x.device.type == "cuda" and x.dtype in HALVES and x.dtype == w.dtype == a.dtype and not dropout


def over_four_bits(
    x: Tensor, w: QuantizedTensor, bias: Tensor | None, low_rank: tuple[Tensor, Tensor, float], dropout: float = 0.0
) -> Tensor:
    """y (…, out) for x (…, in), in the type of the products: autocast's, or that of all that is given. `low_rank` is (A, B, s)."""
    (a, b, s), device = low_rank, x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        rows, bias, a, b = (None if t is None else t.to(dtype) for t in (x.reshape(-1, x.shape[-1]), bias, a, b))  # type: ignore[assignment]
        y: Tensor = LoraProduct16.apply(rows, w, bias, a, b, s, dropout)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


def suits_four_bits(x: Tensor, a: Tensor, compute_dtype: torch.dtype | None) -> bool:
    """Whether that gives what layer and adapter give one after the other, and is the way to take."""
    device = x.device.type
    if device not in DEVICES or not x.is_floating_point() or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) in HALVES
    return x.dtype in HALVES and a.dtype == x.dtype and compute_dtype in {None, x.dtype}
