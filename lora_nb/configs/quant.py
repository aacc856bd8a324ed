"""Settings of quantization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lora_nb.configs.checks import checked, compiles, is_choice, require

QUANT_TYPES = ("nf4", "fp4", "bnb-nf4", "bnb-fp4", "bnb-int8")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@checked
@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How the frozen linear layers of a base are kept (QLoRA: Dettmers et al., 2023, arXiv:2305.14314, section 3).

    Args:
        quant_type: `"nf4"` (levels at the quantiles of a normal distribution) or `"fp4"` (a 4-bit float), both in this
            package's own layers, on any device; the same two in bitsandbytes' layers, `"bnb-nf4"` and `"bnb-fp4"`; or
            its 8-bit integers, `"bnb-int8"` (LLM.int8(), arXiv:2208.07339).
        block_size: weights that share one scale; bitsandbytes' layers have 64.
        double_quant: keep the scales themselves in 8 bits: 4.127 bits for each weight instead of 4.5, with blocks of 64.
        compute_dtype: type in which the layers multiply. Default: the weights' own where that has 16 bits; else bfloat16
            on a GPU and float32 on a CPU.
        skip_modules: linear layers to leave as they are, by the same rules as `LoraConfig`'s `target_modules`.
        skip_head: leave the output head as it is.

    Raises:
        ConfigError: an unknown field or a value that is not allowed.
    """

    quant_type: Literal["nf4", "fp4", "bnb-nf4", "bnb-fp4", "bnb-int8"] = "nf4"
    block_size: int = 64
    double_quant: bool = True
    compute_dtype: torch.dtype | None = None
    skip_modules: str | Sequence[str] | None = None
    skip_head: bool = True

    def __post_init__(self) -> None:
        is_choice(self.quant_type, self, "quant_type", QUANT_TYPES)
        require(self.block_size in BLOCK_SIZES, self, "block_size", f"one of {', '.join(map(str, BLOCK_SIZES))}")
        require(
            self.block_size == 64 or not self.bitsandbytes, self, "block_size", f"64 with {self.quant_type!r}: its layers have no other"
        )
        require(isinstance(self.double_quant, bool), self, "double_quant", "True or False")
        known = self.compute_dtype is None or self.compute_dtype in COMPUTE_DTYPES
        require(known, self, "compute_dtype", f"None or one of {', '.join(map(str, COMPUTE_DTYPES))}")
        require(isinstance(self.skip_head, bool), self, "skip_head", "True or False")
        self._check_skipped()

    def _check_skipped(self) -> None:
        names = self.skip_modules
        if names is None:
            return
        if isinstance(names, str):
            compiles(names, self, "skip_modules")
            return
        fits = isinstance(names, Sequence | set | frozenset) and len(names) > 0 and all(isinstance(n, str) and n for n in names)
        require(fits, self, "skip_modules", "None, a string or a list of module names, not empty")
        object.__setattr__(self, "skip_modules", tuple(dict.fromkeys(sorted(names) if isinstance(names, set | frozenset) else names)))

    @property
    def bitsandbytes(self) -> bool:
        """Whether the layers are bitsandbytes' own."""
        return self.quant_type.startswith("bnb-")

    def compute(self, weight: torch.Tensor) -> torch.dtype:
        """The type in which layers with such weights multiply."""
        if self.compute_dtype is not None or weight.element_size() == 2:
            return self.compute_dtype or weight.dtype
        return torch.float32 if weight.device.type == "cpu" else torch.bfloat16
