"""What a weight in four bits consists of: the levels, and the tensors and numbers that a file keeps, named as in bitsandbytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from lora_nb.errors import QuantizationError

NESTED_BLOCK = 256  # scales that share a scale of their own
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def nf4_levels() -> Tensor:
    """The sixteen levels of NF4, (16,), from low to high.

    Quantiles of the normal distribution, eight on the positive side and seven on the negative, for 0 shall be among them
    (the paper's equation 4 begins with the quantile of 0, which is −∞; these are the ones that its authors' code takes). The
    outermost share, 0.9677083, is the mean of what 15 and 16 bins would have there: 1 − (1/32 + 1/30)/2. The largest is scaled to 1.
    """
    levels = torch.cat([-_quantiles(8), torch.zeros(1, device="cpu"), _quantiles(9)]).sort().values
    return levels / levels.max()


def _quantiles(n: int) -> Tensor:
    """Of n shares in equal steps from the outermost to 1/2, this one left out.

    In fp32 and counted from the nearer end: the published levels have the rounding of these steps, and of 0.9677083, in them.
    """
    outermost, i = torch.tensor(0.9677083, device="cpu"), torch.arange(n - 1, device="cpu")
    step = (0.5 - outermost) / (n - 1)
    shares = torch.where(i < n / 2, outermost + step * i, 0.5 - step * (n - 1 - i))
    quantiles: Tensor = torch.special.ndtri(shares.double())
    return quantiles.float()


def fp4_levels() -> Tensor:
    """The levels of a float of four bits, (16,), by bit pattern: sign, two bits of exponent e, one of mantissa m.

    Without an exponent m/16, else (1 + m/2) · 2^(4−e); divided by the largest, 12.
    """
    magnitudes = [(1 + m / 2) * 2 ** (4 - e) if e else m / 16 for e in range(4) for m in range(2)]
    return torch.tensor([*magnitudes, *(-x for x in magnitudes)], device="cpu") / 12


LEVELS = {"nf4": nf4_levels(), "fp4": fp4_levels()}


@cache
def dynamic_map() -> Tensor:
    """The 256 levels of 8-bit scales, from low to high: the signed dynamic map (Dettmers, 2016, arXiv:1511.04561, figure 1).

    Seven decades of exponent; with each decade up twice as many means of equal steps between 0.1 and 1; and 0 and 1.
    """
    levels = [0.0, 1.0]
    for i in range(7):
        steps = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        means = 10 ** (i - 6) * ((steps[1:] + steps[:-1]) / 2)
        levels += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(levels), device="cpu")


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor in four bits a number.

    Attributes:
        packed: two indices a byte, (bytes, 1), uint8.
        absmax: the scales, one a block: fp32, or with double quantization uint8, indices into `nested_code`.
        shape, dtype: of the tensor that it stands for.
        quant_type, block_size: `"nf4"` or `"fp4"`, and the numbers that share a scale.
        nested_absmax, nested_code, nested_offset, nested_block_size: scale s = nested_code[i] · nested_absmax + nested_offset.

    Raises:
        QuantizationError: parts that do not fit each other.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    quant_type: str = "nf4"
    block_size: int = 64
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    nested_offset: float = 0.0
    nested_block_size: int = NESTED_BLOCK

    def __post_init__(self) -> None:
        n = self.numel()
        blocks = -(n // -self.block_size)
        self._require("packed", self.packed, torch.uint8, ((n + 1) // 2, 1))
        self._require("absmax", self.absmax, torch.uint8 if self.nested else torch.float32, (blocks,))
        if self.nested_absmax is not None and self.nested_code is not None:
            self._require("nested_absmax", self.nested_absmax, torch.float32, (-(blocks // -self.nested_block_size),))
            self._require("nested_code", self.nested_code, torch.float32, (256,))

    def _require(self, name: str, part: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        if part.dtype != dtype or tuple(part.shape) != shape:
            raise QuantizationError(
                f"{name} is {part.dtype} of {tuple(part.shape)}; a weight of {tuple(self.shape)} in {self.quant_type}, blocks of "
                f"{self.block_size}, has {dtype} of {shape}: the weight is cut short or belongs to another layer. Quantize it again."
            )

    @property
    def nested(self) -> bool:
        """Whether the scales are in 8 bits."""
        return self.nested_absmax is not None

    @property
    def bits_per_parameter(self) -> float:
        """All that it keeps for each weight, the tables, which are the same for all, left out."""
        kept = [self.packed, self.absmax, *([self.nested_absmax] if self.nested_absmax is not None else [])]
        return 8 * sum(t.numel() * t.element_size() for t in kept) / self.numel()

    def numel(self) -> int:
        """How many numbers it stands for."""
        return prod(self.shape)

    def scales(self) -> Tensor:
        """One for each block, fp32."""
        if self.nested_absmax is None or self.nested_code is None:
            return self.absmax
        nested = self.nested_absmax.repeat_interleave(self.nested_block_size)[: len(self.absmax)]
        return self.nested_code[self.absmax.int()] * nested + self.nested_offset

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same on another device."""
        moved: dict[str, Any] = {f.name: t.to(device) for f in fields(self) if isinstance(t := getattr(self, f.name), Tensor)}
        return replace(self, **moved)

    def checked(self) -> QuantizedTensor:
        """Itself.

        Raises:
            QuantizationError: scales that are NaN or infinite.
        """
        for name in ("absmax", "nested_absmax", "nested_code"):
            part = getattr(self, name)
            if part is not None and part.is_floating_point() and not part.is_meta and not torch.isfinite(part).all():
                raise QuantizationError(f"{name} of a quantized weight holds NaN or infinity: it is damaged. Quantize or load it again.")
        if not -3e38 < self.nested_offset < 3e38:
            raise QuantizationError(f"nested_offset of a quantized weight is {self.nested_offset}, so it is damaged: load it again.")
        return self

    def state_dict(self, key: str) -> dict[str, Tensor]:
        """What bitsandbytes' `Linear4bit` has in its state dict under `key`, to the byte."""
        said = {"quant_type": self.quant_type, "blocksize": self.block_size, "dtype": _name(self.dtype), "shape": list(self.shape)}
        parts = {"": self.packed, ".absmax": self.absmax, ".quant_map": LEVELS[self.quant_type].to(self.packed.device, copy=True)}
        if self.nested_absmax is not None and self.nested_code is not None:
            parts |= {".nested_absmax": self.nested_absmax, ".nested_quant_map": self.nested_code}
            said |= {"nested_blocksize": self.nested_block_size, "nested_dtype": "float32", "nested_offset": self.nested_offset}
        written = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8, device=self.packed.device)
        return {key + end: t for end, t in parts.items()} | {f"{key}.quant_state.bitsandbytes__{self.quant_type}": written}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], key: str) -> QuantizedTensor:
        """The weight that `state` holds under `key` and keys that begin with it.

        Raises:
            QuantizationError: something is missing, damaged, or of another form.
        """
        parts = {name[len(key) :]: t for name, t in state.items() if name == key or name.startswith(key + ".")}
        said = _said(parts, key)
        nested = "nested_blocksize" in said or ".nested_absmax" in parts
        names = ["", ".absmax", ".quant_map", *([".nested_absmax", ".nested_quant_map"] if nested else [])]
        for name in names:
            if name not in parts:
                raise QuantizationError(f"{key + name!r} is missing: the file is incomplete. Save or download it again.")
        if parts:
            left = [key + name for name in parts if name not in names]
            if left:
                raise QuantizationError(f"{left[0]!r} is no part of a weight in four bits: the file is of another form.")
        try:
            found = cls(
                packed=parts[""],
                absmax=parts[".absmax"],
                shape=tuple(int(n) for n in said["shape"]),  # type: ignore[attr-defined]
                dtype=DTYPES[str(said["dtype"])],
                quant_type=str(said["quant_type"]),
                block_size=int(said["blocksize"]),  # type: ignore[call-overload]
                nested_absmax=parts.get(".nested_absmax"),
                nested_code=parts.get(".nested_quant_map"),
                nested_offset=float(said["nested_offset"]) if nested else 0.0,  # type: ignore[arg-type]
                nested_block_size=int(said["nested_blocksize"]) if nested else NESTED_BLOCK,  # type: ignore[call-overload]
            )
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            if isinstance(error, QuantizationError):
                raise
            raise QuantizationError(f"The description of {key!r} is damaged ({type(error).__name__}: {error}): {said}.") from error
        _check_tables(found, parts[".quant_map"], key)
        return found.checked()


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def _said(parts: dict[str, Tensor], key: str) -> dict[str, object]:
    """The numbers of the weight, out of the JSON text that stands beside it in bytes; taken out of `parts`."""
    names = [name for name in parts if name.startswith(".quant_state.bitsandbytes__")]
    if len(names) != 1:
        raise QuantizationError(
            f"{key!r} has {len(names)} descriptions (…quant_state.bitsandbytes__nf4 or __fp4), it must have one: the file is incomplete, "
            "or its weights are not in four bits."
        )
    tensor, quant_type = parts.pop(names[0]), names[0].rpartition("__")[2]
    try:
        said = json.loads(bytes(tensor.cpu().to(torch.uint8).tolist()))
    except ValueError as error:
        raise QuantizationError(f"The description of {key!r} cannot be read: {error}. Save or download the file again.") from error
    if not isinstance(said, dict) or said.get("quant_type") != quant_type or quant_type not in LEVELS:
        raise QuantizationError(f"{key!r} is described as {quant_type!r} and as {said!r}: there are {', '.join(map(repr, LEVELS))}.")
    return said


def _check_tables(found: QuantizedTensor, levels: Tensor, key: str) -> None:
    """Only the known tables: with another one the same indices mean other weights."""
    if levels.is_meta:
        return
    if levels.shape != (16,) or not torch.equal(levels.cpu().float(), LEVELS[found.quant_type]):
        raise QuantizationError(f"{key}.quant_map is not the table of {found.quant_type!r}: the weight was quantized by other rules.")
    if found.nested_code is not None:
        own, known = found.nested_code.cpu().clone(), dynamic_map()
        own[0] = known[0]  # bitsandbytes before 0.46 wrote −1 there on a CPU
        if not torch.allclose(own, known, rtol=1e-3, atol=1e-9):
            raise QuantizationError(f"{key}.nested_quant_map is not the signed dynamic map: the weight was quantized by other rules.")
