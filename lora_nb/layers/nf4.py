"""Weights in four bits: NF4, FP4 and double quantization (Dettmers et al., 2023, arXiv:2305.14314, section 3).

W is cut, row after row, into blocks of 64 weights. A block keeps its largest absolute value, the scale, and for each weight
the nearest of sixteen levels in [−1, 1]:

    index = argmin_k |w / absmax − level_k|,    ŵ = level_index · absmax

NF4's levels lie at quantiles of the normal distribution, as weights roughly follow one. Double quantization keeps the scales
themselves, less their mean, in 8 bits: 4 + 8/64 + 32/(64·256) = 4.127 bits a weight instead of 4 + 32/64 = 4.5.

Two weights share a byte, the first in its high half. Bytes, rounding and names are those of bitsandbytes 0.50 on a CPU.
`quantize_textbook` and `dequantize_textbook` are the method as it is told; `quantize` and `dequantize` give the same bits sooner.
"""

from __future__ import annotations

from functools import cache
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_nb.errors import QuantizationError
from lora_nb.layers.kernels import kernel
from lora_nb.layers.quantized import LEVELS, NESTED_BLOCK, QuantizedTensor, dynamic_map
from lora_nb.layers.recycled import empty

SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
TINY = 1e-38  # a scale below has no finite reciprocal in fp32
CHUNK = 1 << 18  # weights at a time: what lies between input and output stays in the cache
CELLS = 1024  # of equal width over [−1, 1]; none has two of the borders between levels in it


def quantize(weight: Tensor, block_size: int = 64, double_quant: bool = False, *, quant_type: str = "nf4") -> QuantizedTensor:
    """A tensor of any shape, in fp32, bf16 or fp16, in four bits a weight.

    Args:
        block_size: weights that share a scale: 32, 64, 128, … 4096.
        double_quant: keep the scales in 8 bits.
        quant_type: `"nf4"` or `"fp4"`.

    Raises:
        QuantizationError: another block size or type, or weights that are empty, NaN or infinite.
    """
    _check(weight, block_size, quant_type)
    flat = weight.detach().reshape(-1)
    whole = flat.numel() - flat.numel() % block_size
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(flat.numel() // -block_size), device=flat.device)
    pack = _pack_chunk if flat.device.type == "cpu" else _pack_textbook
    size = CHUNK // 2 if flat.device.type == "cpu" else CHUNK * 64
    for i in range(0, whole, size):
        j = min(i + size, whole)
        pack(flat[i:j].view(-1, block_size), quant_type, packed[i // 2 : j // 2], absmax[i // block_size : j // block_size])
    if whole < flat.numel():
        _pack_textbook(flat[whole:][None], quant_type, packed[whole // 2 :], absmax[-1:], last=True)
    return _finished(weight, packed, absmax, block_size, quant_type, double_quant)


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weights again, in the type that they had before unless another is asked for.

    On a CPU the memory of an earlier result that nobody holds any more is used again (see `recycled.py`).

    Raises:
        QuantizationError: scales that are NaN or infinite.
    """
    dtype = dtype or quantized.dtype
    if torch.compiler.is_compiling() or type(quantized.packed) is not Tensor or quantized.packed.device.type != "cpu":
        return _elsewhere(quantized, dtype)
    scales = quantized.scales()
    if not torch.isfinite(scales.max()):
        raise QuantizationError("The scales of a quantized weight hold NaN or infinity: it is damaged. Quantize or load it again.")
    n, block = quantized.numel(), quantized.block_size
    whole = n - n % block
    out = empty(n, dtype)
    if whole:
        _unpack(quantized.packed.view(-1)[: whole // 2], scales, quantized.quant_type, block, out[:whole])
    if whole < n:
        tail = quantized.packed.view(-1)[whole // 2 :]
        out[whole:] = _values(tail, quantized.quant_type)[: n - whole] * scales[-1]
    return out.view(quantized.shape)


def quantize_textbook(weight: Tensor, block_size: int = 64, double_quant: bool = False, *, quant_type: str = "nf4") -> QuantizedTensor:
    """`quantize` in the fewest words, for reading; the same bits, some eight times slower."""
    _check(weight, block_size, quant_type)
    flat = weight.detach().reshape(-1)
    whole = flat.numel() - flat.numel() % block_size
    parts = [(flat[:whole].view(-1, block_size), False), (flat[whole:][None], True)]
    packed, absmax = [], []
    for blocks, last in parts:
        if blocks.numel():
            packed.append(torch.empty((blocks.numel() + 1) // 2, dtype=torch.uint8, device=flat.device))
            absmax.append(torch.empty(len(blocks), device=flat.device))
            _pack_textbook(blocks, quant_type, packed[-1], absmax[-1], last=last)
    return _finished(weight, torch.cat(packed), torch.cat(absmax), block_size, quant_type, double_quant)


def dequantize_textbook(quantized: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """`dequantize` in the fewest words, for reading; the same bits, some four times slower."""
    values = _values(quantized.packed.view(-1), quantized.quant_type)[: quantized.numel()]
    scales = quantized.scales().repeat_interleave(quantized.block_size)[: quantized.numel()]
    return (values * scales).view(quantized.shape).to(dtype or quantized.dtype)


def _check(weight: Tensor, block_size: int, quant_type: str) -> None:
    if weight.dtype not in {torch.float32, torch.bfloat16, torch.float16}:
        raise QuantizationError(f"a weight of {weight.dtype} cannot be quantized: convert it to float32, bfloat16 or float16 first.")
    if not weight.numel():
        raise QuantizationError(f"a weight of {tuple(weight.shape)} has nothing in it to quantize.")
    if block_size not in SIZES:
        raise QuantizationError(f"block_size={block_size!r}: there are {', '.join(map(str, SIZES))}.")
    if quant_type not in LEVELS:
        raise QuantizationError(f"quant_type={quant_type!r}: there are {', '.join(map(repr, LEVELS))}.")


def _finished(weight: Tensor, packed: Tensor, absmax: Tensor, block: int, quant_type: str, double: bool) -> QuantizedTensor:  # noqa: PLR0917
    """The parts together; the scales in 8 bits, where that is asked for."""
    nested = _double(absmax) if double else {"absmax": absmax}
    return QuantizedTensor(
        packed=packed[:, None], shape=tuple(weight.shape), dtype=weight.dtype, quant_type=quant_type, block_size=block, **nested
    )


def _double(absmax: Tensor) -> dict[str, Tensor | float | int]:
    """The scales less their mean in 8 bits, in blocks of 256.

    The nearest level is looked up for 65,536 values over [−1, 1] first, as bitsandbytes does on a CPU: beside a border between
    two levels that gives the other one than a search does, once in six hundred.
    """
    offset = absmax.mean()
    blocks = F.pad(absmax - offset, (0, -len(absmax) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = blocks.abs().amax(1)
    scaled = (blocks * (1 / nested)[:, None]).nan_to_num(-1.0).clamp(-1, 1)  # where all are 0 any level will do
    cells = ((scaled + 1) * 32767.5 + 0.5).int()
    levels = dynamic_map().to(absmax.device, copy=True)  # each its own: safetensors refuses what shares memory
    grid = torch.arange(65536, dtype=torch.float64, device=absmax.device) / 32767.5 - 1
    table = torch.bucketize(grid, (levels[1:].double() + levels[:-1].double()) / 2).to(torch.uint8)
    index = table[cells].view(-1)[: len(absmax)]
    return {
        "absmax": index.contiguous(),
        "nested_absmax": nested,
        "nested_code": levels,
        "nested_offset": 0.0 if offset.is_meta else float(offset),
        "nested_block_size": NESTED_BLOCK,
    }


def _pack_textbook(blocks: Tensor, quant_type: str, packed: Tensor, absmax: Tensor, *, last: bool = False) -> None:
    """(blocks, block) → indices in pairs, and scales.

    `last`: fewer weights than a block has; bitsandbytes divides them by their scale instead of multiplying by its reciprocal.
    """
    _, order, borders = sorted_levels(quant_type)
    blocks = blocks.float()
    absmax.copy_(blocks.abs().amax(1))
    _check_finite(absmax)
    if last:
        absmax.clamp_(min=TINY)
    scaled = blocks / absmax[:, None] if last else blocks * (1 / absmax.clamp(min=TINY))[:, None]
    nearest = torch.bucketize(scaled, borders.to(blocks.device))  # how many borders lie below
    index = order.to(blocks.device)[nearest].view(-1)
    index = F.pad(index, (0, len(index) % 2), value=_zero(quant_type))
    packed.copy_(index[0::2] << 4 | index[1::2])


def _check_finite(absmax: Tensor) -> None:
    if not absmax.is_meta and not torch.isfinite(absmax).all():
        raise QuantizationError("The weight holds NaN or infinity, which no level stands for: it is damaged, or its training ran away.")


def _pack_chunk(blocks: Tensor, quant_type: str, packed: Tensor, absmax: Tensor) -> None:
    """The same without a search: the cell that a weight lies in tells all borders below it but one, which is then asked."""
    _, order, _ = sorted_levels(quant_type)
    below, border = _cells(quant_type)
    blocks = blocks.float()
    torch.amax(blocks.abs(), 1, out=absmax)
    _check_finite(absmax)
    scaled = (blocks * (1 / absmax.clamp(min=TINY))[:, None]).view(-1).clamp_(-1, 1)
    cell = _cell(scaled)
    index = below.index_select(0, cell)
    index += (scaled > border.index_select(0, cell)).view(torch.uint8)
    if quant_type != "nf4":
        index = order.index_select(0, index.int())
    torch.add(index[1::2], index[0::2], alpha=16, out=packed)


def _cell(scaled: Tensor) -> Tensor:
    """Which cell: never falls as its argument rises, and that is all that is asked of it."""
    return (scaled * (CELLS / 2)).add_(CELLS / 2).int()


@cache
def _cells(quant_type: str) -> tuple[Tensor, Tensor]:
    """For each cell the number of borders in the cells below, and the border in it (infinity where there is none)."""
    borders = sorted_levels(quant_type)[2]
    own = _cell(borders)
    cells = torch.arange(CELLS + 1, device="cpu")
    border = torch.full((CELLS + 1,), float("inf"), device="cpu")
    border[own] = borders
    return (own < cells[:, None]).sum(1).to(torch.uint8), border


@cache
def sorted_levels(quant_type: str) -> tuple[Tensor, Tensor, Tensor]:
    """The levels from low to high, their indices, and the borders half-way between neighbours; on the CPU."""
    levels = LEVELS[quant_type]
    low_to_high, order = torch.sort(levels, stable=True)
    return low_to_high, order.to(torch.uint8), (low_to_high[1:] + low_to_high[:-1]) / 2


def _zero(quant_type: str) -> int:
    """What fills the last byte of an odd number of weights: the index of 0."""
    _, order, borders = sorted_levels(quant_type)
    return int(order[(borders < 0).sum()])


def _values(packed: Tensor, quant_type: str) -> Tensor:
    """(bytes,) → levels (2·bytes,), fp32."""
    index = torch.stack([packed >> 4, packed & 15], 1).flatten()
    return LEVELS[quant_type].to(packed.device)[index.int()]


def _unpack(packed: Tensor, scales: Tensor, quant_type: str, block: int, out: Tensor) -> None:
    """Look levels up for several weights at a time and multiply them by their scales, chunk by chunk, in fp32."""
    values = torch.empty(min(CHUNK, len(out)), device="cpu")
    look_up = _look_up_pairs if torch.get_num_threads() == 1 else _look_up_quads
    for i in range(0, len(out), CHUNK):
        target = out[i : i + CHUNK]
        dense = target if out.dtype == torch.float32 else values[: len(target)]
        look_up(packed[i // 2 : (i + len(target)) // 2], quant_type, dense)
        dense.view(-1, block).mul_(scales[i // block : (i + len(target)) // block, None])
        if dense is not target:
            target.copy_(dense)


def _look_up_pairs(packed: Tensor, quant_type: str, out: Tensor) -> None:
    """By the byte: two levels are moved as one number of 64 bits. The quickest on one thread, and torch gives it no more."""
    torch.index_select(_table(quant_type, 1), 0, packed.int(), out=out.view(torch.float64))


def _look_up_quads(packed: Tensor, quant_type: str, out: Tensor) -> None:
    """By two bytes: four levels are moved as one complex number of 128 bits, by all threads."""
    index = (packed if packed.storage_offset() % 2 == 0 else packed.clone()).view(torch.uint16).long()
    rows = gcd(len(index), 64)  # the threads share them
    table = _table(quant_type, 2).expand(rows, -1)
    torch.gather(table, 1, index.view(rows, -1), out=out.view(torch.complex128).view(rows, -1))


@cache
def _table(quant_type: str, n: int) -> Tensor:
    """The levels of the weights in one byte, (256,) of 64 bits, or in two, (65536,) of 128."""
    every = torch.arange(256**n, dtype=torch.int32, device="cpu").to(torch.uint16 if n == 2 else torch.uint8)
    return _values(every.view(torch.uint8), quant_type).view(torch.complex128 if n == 2 else torch.float64)


def _elsewhere(quantized: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """On a GPU in one kernel, where that works; else, and for what torch.compile makes of it, in the textbook's words."""
    fast = kernel("nf4_triton", quantized.packed.device)
    return dequantize_textbook(quantized, dtype) if fast is None else fast.dequantize_triton(quantized, dtype)
