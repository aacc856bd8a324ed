"""Undoing double quantization and NF4 in one launch on a GPU (Triton; imported only where that is there).

Step by step it is three launches, with the scales written to memory and read again in between. Here each program takes some
bytes and does all of it in registers:

    scale = nested_code[absmax[block]] · nested_absmax[block / 256] + offset
    out[2i] = levels[byte_i >> 4] · scale,    out[2i + 1] = levels[byte_i & 15] · scale

A block has an even number of weights, so both halves of a byte have one scale. The kernel's twin is `nf4.dequantize_textbook`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_nb.layers.kernels import launching_at
from lora_nb.layers.nf4 import SIZES, dequantize_textbook, quantize
from lora_nb.layers.quantized import LEVELS, QuantizedTensor

BYTES = 1024  # of the packed weight, for one program


@triton.jit
def _kernel(  # type: ignore[no-untyped-def] # noqa: ANN202, PLR0917 - as Triton wants it
    packed,  # noqa: ANN001
    absmax,  # noqa: ANN001
    levels,  # noqa: ANN001
    nested_code,  # noqa: ANN001
    nested_absmax,  # noqa: ANN001
    offset,  # noqa: ANN001
    out,  # noqa: ANN001
    size,  # noqa: ANN001
    n,  # noqa: ANN001
    block_size: tl.constexpr,
    nested_block_size: tl.constexpr,
    nested: tl.constexpr,
    blocks: tl.constexpr,
    count: tl.constexpr,
):
    # A tile is some blocks of so many bytes, so that a block's scale is found once; or a part of one block, if that is a long one.
    first = tl.program_id(0).to(tl.int64) * (blocks * count)
    row, column = tl.arange(0, blocks), tl.arange(0, count)
    place = first + row[:, None] * count + column[None, :]
    byte = tl.load(packed + place, mask=place < size, other=0).to(tl.int32)
    block = 2 * first // block_size + row
    inside = first + row * count < size
    scale = tl.load(absmax + block, mask=inside, other=0)
    if nested:
        whole = tl.load(nested_absmax + block // nested_block_size, mask=inside, other=0)
        scale = tl.load(nested_code + scale.to(tl.int32), mask=inside, other=0) * whole + offset
    # The levels, 64 bytes, stay in the nearest cache.
    high = tl.load(levels + (byte >> 4)) * scale[:, None]
    low = tl.load(levels + (byte & 15)) * scale[:, None]
    target = 2 * first + row[:, None] * (2 * count) + tl.arange(0, 2 * count)[None, :]
    tl.store(out + target, tl.interleave(high, low).to(out.dtype.element_ty), mask=target < n)


def dequantize_triton(quantized: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weights again, to the bit as `dequantize` gives them on a CPU."""
    q, device = quantized, quantized.packed.device
    if q.block_size not in SIZES:  # a file may have others
        return dequantize_textbook(q, dtype)
    out = torch.empty(q.shape, dtype=dtype or q.dtype, device=device)
    scales = q.nested_code if q.nested_code is not None else q.absmax, q.nested_absmax if q.nested_absmax is not None else q.absmax
    count = min(q.block_size // 2, BYTES)
    with launching_at(out):
        _kernel[(triton.cdiv(q.packed.numel(), BYTES),)](
            q.packed,
            q.absmax,
            levels_on(q.quant_type, device),
            *scales,
            q.nested_offset,
            out,
            q.packed.numel(),
            q.numel(),
            block_size=q.block_size,
            nested_block_size=q.nested_block_size,
            nested=q.nested,
            blocks=BYTES // count,
            count=count,
            enable_fp_fusion=False,  # a fused multiply-add would round once where bitsandbytes rounds twice
        )
    return out


_LEVELS: dict[tuple[str, torch.device], Tensor] = {}


def levels_on(quant_type: str, device: torch.device) -> Tensor:
    """The levels, copied to each device once."""
    if (quant_type, device) not in _LEVELS:
        _LEVELS[quant_type, device] = LEVELS[quant_type].to(device)
    return _LEVELS[quant_type, device]


def agrees(device: torch.device) -> bool:
    """With the twin, to the bit: both sorts of levels and of scales, a last block and a last byte that are not full."""
    dtypes = (torch.float32, torch.float16) if device.type == "cpu" else (torch.float32, torch.float16, torch.bfloat16)  # the
    # interpreter, not a GPU, cuts digits off where a bfloat16 should be rounded
    for double in (False, True):
        for kind in ("nf4", "fp4"):
            q = quantize(torch.randn(33, 65, device=device), 64, double, quant_type=kind)
            if not all(torch.equal(dequantize_triton(q, t), dequantize_textbook(q, t)) for t in dtypes):
                return False
    return True
