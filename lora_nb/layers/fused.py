"""Blocks of a Llama with LoRA in them, forward and backward written out, for bases that are frozen.

Autograd keeps what each operation read, and passes over memory once for each of them. Of a whole block it is known in advance
what its backward pass needs, so less is kept and less passed over. Liger Kernel (arXiv:2410.10989) and Unsloth do so on GPUs with
kernels of their own; here it is PyTorch's operators, in one type, fp32, and on a CPU some rows at a time, so that what one operator
wrote is still in the cache for the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_nb.layers.lora_linear import Update, narrow, parts

LINE = 16  # numbers in a line of the cache: rows of a stacked product are whole ones
Gradients = tuple[Tensor | None, ...]


class Low(NamedTuple):
    """A frozen linear layer, W (out, in) and bias (out,), with an update s · B A or, where A and B are None, without."""

    w: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    s: float

    @classmethod
    def several(cls, flat: Sequence[Any]) -> list[Low]:
        """From one after another, as autograd passes them."""
        return [cls(*flat[i : i + 5]) for i in range(0, len(flat), 5)]

    def update(self) -> Update | None:
        """To sum its gradients in."""
        return None if self.a is None or self.b is None else Update(self.a, self.b, self.s)


def flat_gradients(updates: Sequence[Update | None]) -> Gradients:
    """As autograd wants them: of W, bias, A, B and s of each layer."""
    return tuple(g for u in updates for g in (None, None, *((None, None) if u is None else u.gradients()), None))


class RmsNorm(torch.autograd.Function):
    """(x, w, ε) → y = w ⊙ x / n with n = √(mean(x²) + ε);   ∂L/∂x = w⊙g / n − x · ⟨w⊙g, x⟩ / (width · n³)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, w, inverse)
        return torch.mul(x, inverse).mul_(w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Gradients:
        x, w, inverse = ctx.saved_tensors
        dx = g * w
        inner = (dx * x).sum(-1, keepdim=True)
        return dx.mul_(inverse).addcmul_(x, inner.mul_(inverse.pow(3)), value=-1 / x.shape[-1]), None, None


class GatedMlp(torch.autograd.Function):
    """(x, then gate, up and down, each a `Low` laid out flat) → down(p), p = silu(g) ⊙ u, with g = gate(x) and u = up(x).

    The low-rank parts are added on the way to p and from it. p is computed again on the way back. With σ the logistic function,

        ∂L/∂u = ∂L/∂p ⊙ silu(g),    ∂L/∂g = ∂L/∂p ⊙ u ⊙ σ(g) (1 + g (1 − σ(g)))
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *flat: Any) -> Tensor:
        gate, up, down = lows = Low.several(flat)
        rows = x.flatten(0, -2)
        g, u = F.linear(rows, gate.w, gate.bias), F.linear(rows, up.w, up.bias)
        hs = [None if low.a is None else narrow(rows, low.a) for low in (gate, up)]  # (r, n)
        p, h = torch.empty_like(g), None if down.a is None else rows.new_empty(len(down.a), len(rows))
        for at in parts(rows):
            for y, low, part in ((g, gate, hs[0]), (u, up, hs[1])):
                if part is not None and low.b is not None:
                    y[at].addmm_(part[:, at].T, low.b.T, alpha=low.s)
            torch.mul(F.silu(g[at]), u[at], out=p[at])
            if h is not None and down.a is not None:
                h[:, at] = narrow(p[at], down.a)
        y = F.linear(p, down.w, down.bias)
        if h is not None and down.b is not None:
            y.addmm_(h.T, down.b.T, alpha=down.s)
        ctx.save_for_backward(rows, g, u, *hs, h, *(t for low in lows for t in low[:4]))
        ctx.scales, ctx.shape = [low.s for low in lows], x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, g, u, gate_h, up_h, h, *flat = ctx.saved_tensors
        lows = [Low(w, bias, a, b, s) for w, bias, a, b, s in zip(*(flat[i::4] for i in range(4)), ctx.scales, strict=True)]
        gate, up, down = updates = [low.update() for low in lows]
        dy = dy.reshape(len(x), -1)
        du, dg = dy @ lows[2].w, torch.empty_like(g)  # ∂L/∂p at first
        for at in parts(x):
            silu = F.silu(g[at])
            if down is not None:
                down.add(silu * u[at], h[:, at], dy[at], du[at])
            torch.ops.aten.silu_backward.grad_input(du[at] * u[at], g[at], grad_input=dg[at])
            du[at].mul_(silu)
        dx = torch.mm(dg, lows[0].w).addmm_(du, lows[1].w) if ctx.needs_input_grad[0] else None
        for at in parts(x):
            for update, part, grad in ((gate, gate_h, dg), (up, up_h, du)):
                if update is not None:
                    update.add(x[at], part[:, at], grad[at], None if dx is None else dx[at])
        return None if dx is None else dx.view(ctx.shape), *flat_gradients(updates)


class RotatedQkv(torch.autograd.Function):
    """(x, rotation, then q, k and v, each a `Low` laid out flat) → q, k, v, each (batch, heads, seq, d), q and k turned by position.

    Rotary embedding turns each pair (qⱼ, qⱼ₊ₕ), h = d/2, by an angle θ: a product with the complex number e^{iθ} where the two are
    neighbours. So the weights, here with their updates in them and stacked into one, have their rows in that order,

        V = [W_q + s B_q A_q; W_k + s B_k A_k; W_v + s B_v A_v; A_q; A_k; A_v],    x Vᵀ = [q | k | v | x A_qᵀ | x A_kᵀ | x A_vᵀ]

    Attention knows q and k by their inner products alone, which do not depend on it. `rotation` is (batch or 1, seq, 1, h), complex; on
    the way back it turns the other way.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor, *flat: Any) -> tuple[Tensor, ...]:
        lows, d, (batch, seq, _) = Low.several(flat), 2 * rotation.shape[-1], x.shape
        rows, sizes = x.flatten(0, 1), [len(low.w) for low in lows]
        v = stacked(lows, (d, d, 0))
        bias = stacked_bias(lows, (d, d, 0), len(v))
        out = rows @ v.T if bias is None else torch.addmm(bias, rows, v.T)
        complex_pairs(heads(out[:, : sizes[0] + sizes[1]], (batch, seq, -1, d)), d).mul_(rotation)
        ctx.save_for_backward(rows, rotation, v, out[:, sum(sizes) :].T.contiguous(), *(t for low in lows for t in low[2:4]))
        ctx.scales = [low.s for low in lows]
        return tuple(heads(y, (batch, seq, -1, d)).transpose(1, 2) for y in torch.split(out[:, : sum(sizes)], sizes, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        x, rotation, v, h, *flat = ctx.saved_tensors
        batch, _, seq, d = grads[0].shape
        sizes, back = [g.shape[1] * d for g in grads], torch.conj_physical(rotation)
        g = x.new_empty(len(x), sum(sizes))
        dq, dk, dv = torch.split(g, sizes, 1)
        for to, grad in ((dq, grads[0]), (dk, grads[1])):
            torch.mul(complex_pairs(grad.transpose(1, 2).contiguous(), d), back, out=complex_pairs(heads(to, (batch, seq, -1, d)), d))
        heads(dv, (batch, seq, -1, d)).copy_(grads[2].transpose(1, 2))
        updates = [
            None if a is None else Update(a, in_pairs(b, order), s)
            for a, b, s, order in zip(flat[::2], flat[1::2], ctx.scales, (d, d, 0), strict=True)
        ]
        for at in parts(x):
            first = 0
            for update, grad in zip(updates, (dq, dk, dv), strict=True):
                if update is not None:
                    update.add(x[at], h[first : first + len(update.a), at], grad[at])
                    first += len(update.a)
        dx = (g @ v[: sum(sizes)]).view(batch, seq, -1) if ctx.needs_input_grad[0] else None
        for update in updates[:2]:
            if update is not None:
                update.db = out_of_pairs(update.db.T, d).T
        return dx, None, *flat_gradients(updates)


def stacked(lows: Sequence[Low], orders: Sequence[int]) -> Tensor:
    """V of `RotatedQkv`, zeros below; rows in pairs where `orders` has the width of a head."""
    size, low_rank = sum(len(low.w) for low in lows), sum(len(low.a) for low in lows if low.a is not None)
    v = lows[0].w.new_empty(-(-(size + low_rank) // LINE) * LINE, lows[0].w.shape[1])
    at, below = 0, size
    for low, d in zip(lows, orders, strict=True):
        to = v[at : at + len(low.w)]
        if d:
            torch.unflatten(to, 0, (-1, d // 2, 2)).copy_(torch.unflatten(low.w, 0, (-1, 2, d // 2)).transpose(1, 2))
        if low.a is not None and low.b is not None:
            torch.addmm(to if d else low.w, in_pairs(low.b, d), low.a, alpha=low.s, out=to)
            v[below : below + len(low.a)] = low.a
            below += len(low.a)
        elif not d:
            to.copy_(low.w)
        at += len(low.w)
    v[below:] = 0
    return v


def stacked_bias(lows: Sequence[Low], orders: Sequence[int], rows: int) -> Tensor | None:
    """The biases in the order of V's rows; None if there is none."""
    if all(low.bias is None for low in lows):
        return None
    own = [x.w.new_zeros(len(x.w)) if x.bias is None else in_pairs(x.bias, d) for x, d in zip(lows, orders, strict=True)]
    return F.pad(torch.cat(own), (0, rows - sum(map(len, own))))


def in_pairs(t: Tensor, d: int) -> Tensor:
    """Rows j and j + d/2 of every d next to each other; as they are where d is 0."""
    return torch.unflatten(t, 0, (-1, 2, d // 2)).transpose(1, 2).reshape(t.shape) if d else t


def out_of_pairs(t: Tensor, d: int) -> Tensor:
    """What `in_pairs` undoes."""
    return torch.unflatten(t, 0, (-1, d // 2, 2)).transpose(1, 2).reshape(t.shape)


def heads(t: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """(batch · seq, heads · d) as `shape`, (batch, seq, heads, d)."""
    return torch.unflatten(torch.unflatten(t, 0, shape[:2]), 2, shape[2:])


def complex_pairs(t: Tensor, d: int) -> Tensor:
    """(…, d) as complex (…, d/2) in the same memory."""
    return torch.view_as_complex(torch.unflatten(t, -1, (d // 2, 2)))
