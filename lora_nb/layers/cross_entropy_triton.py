"""Cross-entropy and its gradient in one launch on a GPU (Triton; imported only where that is there).

Step by step some ten operators pass over logits in fp32. Here each row is read twice and written once, in its own type and place. A
first pass holds the largest logit m so far and t = Σ exp(z − m) of what it has seen; where m rises, t is scaled down by the
exponential of the difference (Milakov and Gimelshein, 2018, arXiv:1805.02867). A second pass writes exp(z − m)/t − [v = y].
The kernel's twin is `cross_entropy.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_nb.layers import cross_entropy
from lora_nb.layers.kernels import launching_at

BLOCK = 4096  # logits at a time


@triton.jit
def _logits(u, scale, cap, capped: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202 - as Triton wants it
    """z and dz/du from u."""
    z, slope = u * scale, scale
    if capped:
        tanh = 1 - 2 / (tl.exp(2 * z / cap) + 1)
        z, slope = cap * tanh, scale * (1 - tanh * tanh)
    return z, slope


@triton.jit
def _kernel(  # type: ignore[no-untyped-def] # noqa: ANN202, PLR0917 - as Triton wants it
    u,  # noqa: ANN001
    goals,  # noqa: ANN001
    losses,  # noqa: ANN001
    stride,  # noqa: ANN001
    vocabulary,  # noqa: ANN001
    scale,  # noqa: ANN001
    cap,  # noqa: ANN001
    capped: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0)
    u += row.to(tl.int64) * stride
    goal = tl.load(goals + row)
    top, total, aimed = -float("inf"), 0.0, 0.0
    for start in range(0, vocabulary, block):
        token = start + tl.arange(0, block)
        inside = token < vocabulary
        z, _ = _logits(tl.load(u + token, mask=inside, other=0.0).to(tl.float32), scale, cap, capped)
        z = tl.where(inside, z, -float("inf"))
        new = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(z - new), 0)
        top = new
        # Not loaded by its place: a thread that is ahead may have written its gradient there.
        aimed += tl.sum(tl.where(token == goal, z, 0.0), 0)
    tl.store(losses + row, top + tl.log(total) - aimed)
    for start in range(0, vocabulary, block):
        token = start + tl.arange(0, block)
        inside = token < vocabulary
        z, slope = _logits(tl.load(u + token, mask=inside, other=0.0).to(tl.float32), scale, cap, capped)
        gradient = (tl.exp(z - top) / total - tl.where(token == goal, 1.0, 0.0)) * slope
        tl.store(u + token, gradient.to(u.dtype.element_ty), mask=inside)


def loss_and_gradient(u: Tensor, goals: Tensor, scale: float = 1.0, cap: float | None = None) -> tuple[Tensor, Tensor]:
    """L, fp32, and ∂L/∂u, in u's own memory and type."""
    assert u.stride(1) == goals.stride(0) == 1
    losses = torch.empty(len(u), dtype=torch.float32, device=u.device)
    if len(u):
        given = (u, goals, losses, u.stride(0), u.shape[1], scale, cap or 1.0)
        with launching_at(u):
            _kernel[(len(u),)](*given, capped=cap is not None, block=BLOCK, num_warps=8)
    return losses.sum(), u


def agrees(device: torch.device) -> bool:
    """With the twin: several pieces a row and a last one that is not full; logits beyond the exponential's range; all shapes of heads."""
    u, goals = 30 * torch.randn(3, 2 * BLOCK + 77, device=device), torch.tensor([0, BLOCK, 2 * BLOCK + 76], device=device)
    u[1] *= 10
    for dtype, rounding in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for scale, cap in ((1.0, None), (0.25, None), (0.5, 30.0)):
            given = u.to(dtype)
            expected, theirs = cross_entropy.loss_and_gradient(given.float().clone(), goals, scale, cap)
            loss, ours = loss_and_gradient(given, goals, scale, cap)
            if not (torch.isclose(loss, expected, rtol=1e-5) and torch.allclose(ours.float(), theirs, rtol=rounding, atol=rounding)):
                return False
    return True
