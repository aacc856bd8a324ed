"""A product with a low-rank part in one kernel on a GPU (Triton; imported only where that is there).

    y = x Wᵀ + b + s · h Bᵀ,    h = x Aᵀ

Each program has a tile of y. Along `in` it multiplies a piece of its rows of x by W, and while that piece is at hand by A as well, which
is r more columns. At the end it adds s · h Bᵀ, from registers, and writes y once. Every tile computes its rows' h anew, r columns
beside its own; one of them writes it. W, A and B are read with any strides, so the way back, where all three are transposed, is the same
kernel. Its twin is `lora_gpu.by_steps`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_nb.layers.kernels import launching_at
from lora_nb.layers.lora_gpu import by_steps

ROWS, COLUMNS, DEPTH = 128, 128, 64  # of a tile of y, and of a piece along `in`
STRIPS = 8  # strips of rows whose programs run together, so that they find W in the cache
LEAST = 16  # columns that a product of tiles has


@triton.jit
def _kernel(  # type: ignore[no-untyped-def] # noqa: ANN202, PLR0917 - as Triton wants it
    x,  # noqa: ANN001
    w,  # noqa: ANN001
    bias,  # noqa: ANN001
    a,  # noqa: ANN001
    b,  # noqa: ANN001
    y,  # noqa: ANN001
    h,  # noqa: ANN001
    n,  # noqa: ANN001
    out,  # noqa: ANN001
    width,  # noqa: ANN001
    rank,  # noqa: ANN001
    s,  # noqa: ANN001
    x_row,  # noqa: ANN001
    x_in,  # noqa: ANN001
    w_out,  # noqa: ANN001
    w_in,  # noqa: ANN001
    a_rank,  # noqa: ANN001
    a_in,  # noqa: ANN001
    b_out,  # noqa: ANN001
    b_rank,  # noqa: ANN001
    biased: tl.constexpr,
    whole: tl.constexpr,  # pieces along `in`
    rows: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
    ranks: tl.constexpr,
    strips: tl.constexpr,
):
    # Programs are numbered down a few strips of rows before they move on by one column of tiles.
    across, program = tl.cdiv(out, columns), tl.program_id(0)
    first = program // (strips * across) * strips
    height = tl.minimum(tl.cdiv(n, rows) - first, strips)
    within = program % (strips * across)
    row = (first + within % height).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    tile = within // height
    column = tile.to(tl.int64) * columns + tl.arange(0, columns)
    one, along = tl.arange(0, ranks), tl.arange(0, depth)
    # Moved on by a step each time: a place counted from the start of a large W would not fit into 32 bits.
    x_at = x + row * x_row + along[None, :] * x_in
    w_at = w + column[None, :] * w_out + along[:, None] * w_in
    a_at = a + one[None, :] * a_rank + along[:, None] * a_in
    total, low = tl.zeros((rows, columns), dtype=tl.float32), tl.zeros((rows, ranks), dtype=tl.float32)
    for start in range(0, width, depth):
        inside = (along < width - start) | whole
        xs = tl.load(x_at, mask=(row < n) & inside[None, :], other=0.0)
        ws = tl.load(w_at, mask=(column[None, :] < out) & inside[:, None], other=0.0)
        part = tl.load(a_at, mask=(one[None, :] < rank) & inside[:, None], other=0.0)
        total = tl.dot(xs, ws, total, input_precision="ieee")
        low = tl.dot(xs, part, low, input_precision="ieee")
        x_at += depth * x_in
        w_at += depth * w_in
        a_at += depth * a_in
    inner = low.to(h.dtype.element_ty)
    up = tl.load(b + column[None, :] * b_out + one[:, None] * b_rank, mask=(column[None, :] < out) & (one[:, None] < rank), other=0.0)
    total += s * tl.dot(inner, up, input_precision="ieee")
    if biased:
        total += tl.load(bias + column, mask=column < out, other=0.0).to(tl.float32)[None, :]
    tl.store(y + row * out + column[None, :], total.to(y.dtype.element_ty), mask=(row < n) & (column[None, :] < out))
    if tile == 0:
        tl.store(h + row * rank + one[None, :], inner, mask=(row < n) & (one[None, :] < rank))


def product(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float) -> tuple[Tensor, Tensor]:  # noqa: PLR0917 - as in the formula
    """y (n, out) and h (n, r), in x's type, from x (n, in), W (out, in), bias (out,), A (r, in) and B (out, r)."""
    (n, width), out, rank = x.shape, len(w), len(a)
    y, h = x.new_empty(n, out), x.new_empty(n, rank)
    with launching_at(y):
        _kernel[(triton.cdiv(n, ROWS) * triton.cdiv(out, COLUMNS),)](
            x,
            w,
            x if bias is None else bias,
            a,
            b,
            y,
            h,
            n,
            out,
            width,
            rank,
            s,
            *x.stride(),
            *w.stride(),
            *a.stride(),
            *b.stride(),
            biased=bias is not None,
            whole=width % DEPTH == 0,
            rows=ROWS,
            columns=COLUMNS,
            depth=DEPTH,
            ranks=max(LEAST, triton.next_power_of_2(rank)),
            strips=STRIPS,
            num_warps=8,
            num_stages=3,
        )
    return y, h


def agrees(device: torch.device) -> bool:
    """With the twin, forward and transposed: tiles and pieces that are not full, several strips, ranks below and above the least."""
    dtype, rounding = (torch.float32, 1e-5) if device.type == "cpu" else (torch.bfloat16, 1e-2)  # Triton's interpreter cannot multiply bf16
    for n, width, out, rank in ((1200, 200, 300, 5), (130, 72, 136, 24)):
        x, w, bias, a, b = (
            torch.randn(shape, device=device, dtype=dtype) for shape in ((n, width), (out, width), (out,), (rank, width), (out, rank))
        )
        for given in ((x, w, bias, a, b, 0.5), (torch.randn_like(x @ w.T), w.T, None, b.T, a.T, 0.5)):
            for ours, theirs in zip(product(*given), by_steps(*given), strict=True):
                if not torch.allclose(ours, theirs, rtol=rounding, atol=rounding * float(theirs.abs().max())):
                    return False
    return True
