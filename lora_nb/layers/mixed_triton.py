"""Low-rank parts of a few tokens, each with its own adapter, on a GPU (Triton; imported only where that is there).

    shrink: h_i = A_a x_i,    expand: y_i += (s · B_a)ᵀ h_i,    a = the adapter of token i, or −1 for none

Each program of either kernel has one token and a piece of x or of y, and reads its piece of A or of B where that lies: nothing is sorted
and no weight copied. Tokens of one adapter find it in the cache. shrink leaves a sum for every piece of x, which expand adds up: a fixed
order, so the same bits each time. Shapes do not depend on which adapter is whose and nobody waits for the GPU, so a CUDA graph can
hold it and `whose` may change between replays. (Punica, Chen et al., 2023, arXiv:2310.18547, has this for decoding.) The kernels' twin is
`ways.batched`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_nb.layers.kernels import launching_at
from lora_nb.layers.ways import Plan, batched

TILE = 8192  # numbers of A or B for one program, in all
MOST = 128  # rank up to which a piece is wide enough to be read at speed


@triton.jit
def _shrink(  # type: ignore[no-untyped-def] # noqa: ANN202, PLR0917 - as Triton wants it
    x,  # noqa: ANN001
    a,  # noqa: ANN001
    whose,  # noqa: ANN001
    h,  # noqa: ANN001
    width,  # noqa: ANN001
    rank,  # noqa: ANN001
    ranks: tl.constexpr,
    block: tl.constexpr,
):
    token, piece = tl.program_id(0), tl.program_id(1)
    adapter = tl.load(whose + token)
    if adapter >= 0:
        i, k = tl.arange(0, ranks)[:, None], piece * block + tl.arange(0, block)[None, :]
        inside = (i < rank) & (k < width)
        weights = tl.load(a + adapter * rank * width + i * width + k, mask=inside, other=0.0).to(tl.float32)
        inputs = tl.load(x + token * width + k, mask=k < width, other=0.0).to(tl.float32)
        one = tl.arange(0, ranks)
        # (pieces, tokens, rank)
        tl.store(h + (piece * tl.num_programs(0) + token) * rank + one, tl.sum(weights * inputs, 1), mask=one < rank)


@triton.jit
def _expand(  # type: ignore[no-untyped-def] # noqa: ANN202, PLR0917 - as Triton wants it
    h,  # noqa: ANN001
    b,  # noqa: ANN001
    whose,  # noqa: ANN001
    y,  # noqa: ANN001
    out,  # noqa: ANN001
    rank,  # noqa: ANN001
    pieces,  # noqa: ANN001
    ranks: tl.constexpr,
    block: tl.constexpr,
):
    token = tl.program_id(0)
    adapter = tl.load(whose + token)
    if adapter >= 0:
        i, k = tl.arange(0, ranks), tl.program_id(1) * block + tl.arange(0, block)
        inner = tl.zeros((ranks,), dtype=tl.float32)
        for piece in range(pieces):
            inner += tl.load(h + (piece * tl.num_programs(0) + token) * rank + i, mask=i < rank, other=0.0)
        inside = (i[:, None] < rank) & (k[None, :] < out)
        weights = tl.load(b + adapter * rank * out + i[:, None] * out + k[None, :], mask=inside, other=0.0).to(tl.float32)
        before = tl.load(y + token * out + k, mask=k < out, other=0.0)
        after = before.to(tl.float32) + tl.sum(weights * inner[:, None], 0)
        tl.store(y + token * out + k, after.to(y.dtype.element_ty), mask=k < out)


def fits(y: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether the stacks and the output lie as the kernels read them."""
    return a.shape[1] <= MOST and y.is_contiguous() and a.is_contiguous() and b.is_contiguous()


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, whose: Tensor) -> Tensor:
    """y (n, out), written to, plus the low-rank part of x (n, in): A (G, r, in), B (G, r, out), scaled, `whose` (n,), int64."""
    (tokens, width), out, rank = x.shape, y.shape[1], a.shape[1]
    ranks = triton.next_power_of_2(rank)
    block = TILE // ranks
    pieces = triton.cdiv(width, block)
    h = torch.empty(pieces, tokens, rank, dtype=torch.float32, device=x.device)
    with launching_at(y):
        _shrink[(tokens, pieces)](x.contiguous(), a, whose, h, width, rank, ranks=ranks, block=block)
        _expand[(tokens, triton.cdiv(out, block))](h, b, whose, y, out, rank, pieces, ranks=ranks, block=block)
    return y


def agrees(device: torch.device) -> bool:
    """With the twin: several pieces and one that is not full, ranks that are no power of two, tokens with no adapter, all types."""
    names = ("one", "two", "three")
    plan = Plan.of([1] * 5, ["two", None, "one", "three", "two"], names, device)
    for rank, width, out in ((16, 1100, 700), (24, 72, 333)):
        for dtype, rounding in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
            x, a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((5, width), (3, rank, width), (3, rank, out)))
            y = torch.randn(5, out, device=device).to(dtype)
            theirs = batched(y.float(), x.float(), a.float(), b.float(), plan, in_place=False)
            ours = add_low_rank(y, x, a, b, plan.whose).float()
            if not torch.allclose(ours, theirs, rtol=rounding, atol=rounding * float(theirs.abs().max())):
                return False
    return True
