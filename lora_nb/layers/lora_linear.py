"""LoRA's linear layer with a forward and a backward pass of its own.

    y = x Wᵀ + b + s · (D(x) Aᵀ) Bᵀ,    x (n, in), W (out, in), A (r, in), B (out, r), y (n, out)

D is the dropout of the adapter's input, a product with a mask m of zeros and 1/(1 − p). With g = ∂L/∂y the chain rule gives, W and
b being frozen,

    ∂L/∂B = s · gᵀ (D(x) Aᵀ),    ∂L/∂A = s · (g B)ᵀ D(x),    ∂L/∂x = g W + s · m ⊙ (g B) A

Autograd on the plain expression finds the same, but passes over (n, out) several times to scale and to add, and keeps x once
more where the adapter's type is another, and again with its gaps. Here the low-rank part is added in place by the product itself,
and what is kept for the backward pass is x alone: x Aᵀ, as cheap as it is small, is computed again, and so is the mask, from the state
that the generator of random numbers was in.

With many rows it is cheaper still to form V = W + s · B A once, r rows' worth of work, and to multiply by it as by W:

    y = x Vᵀ + b,    ∂L/∂x = g V

That keeps one copy of the weight until the backward pass, so it is done in 32 bits only, where V holds an update without
rounding it away, and only where the rows outweigh the copy. In 16 bits on a GPU `lora_gpu.py` has another form of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_nb.layers.dropout import dropout_mask, random_state
from lora_nb.layers.lora_gpu import LoraProduct16, suits

MANY = 1024  # rows from which on V pays
ROWS = 256  # of the backward pass at a time: what A's gradient has read is still in a CPU's cache for B's
THIN = 16  # rank from which on a product of a matrix and A prefers the usual order


class LoraProduct(torch.autograd.Function):
    """(x, W, b, A, B, s, p) → y, for x of two dimensions; A and B may be of another type than x and W. p is dropout's probability."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float, p: float) -> Tensor:  # noqa: PLR0917 - as autograd calls it
        summed = x.dtype == a.dtype == torch.float32 and x.shape[0] >= MANY and not p
        ctx.state = random_state(x) if p else None
        ctx.s, ctx.p, ctx.summed = s, p, summed
        v = torch.addmm(w, b, a, alpha=s) if summed else w
        ctx.save_for_backward(x, v, a, b)
        y = F.linear(x, v, bias)
        if not summed:
            add_product(y, narrow(F.dropout(x.to(a.dtype), p), a).T, b.T, s)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, v, a, b = ctx.saved_tensors
        dx = g @ v if ctx.needs_input_grad[0] else None
        mask = dropout_mask(ctx.state, x, a.dtype, ctx.p) if ctx.state is not None else None
        update = Update(a, b, ctx.s)
        for at in parts(x):
            seen = x[at].to(a.dtype)
            gaps = None if mask is None else mask[at]
            update.add(seen if gaps is None else seen * gaps, None, g[at], None if dx is None or ctx.summed else dx[at], gaps)
        return dx, None, g.sum(0) if ctx.needs_input_grad[2] else None, *update.gradients(), None, None


class Update:
    """s · B A on the way back: what it adds to ∂L/∂x, and its own gradients, summed over rows."""

    def __init__(self, a: Tensor, b: Tensor, s: float) -> None:
        self.a, self.bt, self.s = a, b.T.contiguous(), s
        self.da, self.db = torch.zeros_like(a), torch.zeros_like(self.bt)

    def add(self, x: Tensor, h: Tensor | None, g: Tensor, dx: Tensor | None = None, mask: Tensor | None = None) -> None:
        """For rows x (n, in), with A xᵀ in h (r, n) if that is known, and g (n, out): add to both sums, and into dx (n, in)."""
        g = g.to(self.bt.dtype)
        gb = narrow(g, self.bt)  # (r, n)
        self.da.addmm_(gb, x)
        self.db.addmm_(narrow(x, self.a) if h is None else h, g)
        if dx is not None:
            if mask is None:
                add_product(dx, gb.T, self.a, self.s)
            else:
                dx.add_((gb.T @ self.a).mul_(mask).mul_(self.s).to(dx.dtype))

    def gradients(self) -> tuple[Tensor, Tensor]:
        """∂L/∂A and ∂L/∂B."""
        return self.da.mul_(self.s), self.db.mul_(self.s).T


def narrow(x: Tensor, m: Tensor) -> Tensor:
    """m xᵀ, (r, n), from x (n, k) and m (r, k), in the order in which a CPU is quicker."""
    return m @ x.T if len(m) < THIN else (x @ m.T).T


def add_product(y: Tensor, left: Tensor, right: Tensor, s: float) -> None:
    """y += s · left right; rounded to y's type once, if that is another."""
    if y.dtype == left.dtype:
        y.addmm_(left, right, alpha=s)
    else:
        y.add_((left @ right).mul_(s).to(y.dtype))


def parts(x: Tensor) -> list[slice]:
    """The rows of x in turn: all at once on a GPU."""
    rows = ROWS if x.device.type == "cpu" else max(1, len(x))
    return [slice(at, at + rows) for at in range(0, len(x), rows)]


def lora_linear(x: Tensor, w: Tensor, bias: Tensor | None, low_rank: tuple[Tensor, Tensor, float], dropout: float = 0.0) -> Tensor:
    """y for x (…, in); `low_rank` is (A, B, s)."""
    if torch.is_autocast_enabled(x.device.type):
        a, b, s = low_rank
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            x, w, bias, a, b = (None if t is None else t.to(dtype) for t in (x, w, bias, a, b))  # type: ignore[assignment]
            return product(x, w, bias, (a, b, s), dropout)
    return product(x, w, bias, low_rank, dropout)


def product(x: Tensor, w: Tensor, bias: Tensor | None, low_rank: tuple[Tensor, Tensor, float], dropout: float = 0.0) -> Tensor:
    """The same outside of autocast."""
    a, b, s = low_rank
    learns = torch.is_grad_enabled() and (x.requires_grad or a.requires_grad or b.requires_grad)
    if not learns and x.numel() == w.shape[1]:  # one token in generation: as a vector it is half the work around the products
        y = F.linear(x, w, bias)
        y.view(-1).addmv_(b, torch.mv(a, x.reshape(-1)), alpha=s)
        return y
    rows = x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x
    if not learns:
        y = F.linear(rows, w, bias).addmm_(torch.mm(rows, a.T), b.T, alpha=s)
    elif suits(rows, w, a, dropout):
        y = LoraProduct16.apply(rows, w, bias, a, b, s)  # type: ignore[no-untyped-call]
    else:
        y = LoraProduct.apply(rows, w, bias, a, b, s, dropout)  # type: ignore[no-untyped-call]
    return y if x.ndim == 2 else y.view(*x.shape[:-1], -1)


def is_plain(base: nn.Module, x: Tensor, a: Tensor) -> bool:
    """Whether `base` on `x` is a product with a frozen weight and nothing else, in the adapter's type."""
    return is_frozen(base) and x.dtype == a.dtype == base._parameters["weight"].dtype and not torch.is_autocast_enabled(x.device.type)  # type: ignore[union-attr]


def is_frozen(base: nn.Module) -> bool:
    """Whether `base` is a product with a frozen weight and nothing else."""
    if type(base) is not nn.Linear or base._forward_hooks or base._forward_pre_hooks or base._backward_hooks:
        return False
    w = base._parameters["weight"]
    return w is not None and not w.requires_grad
