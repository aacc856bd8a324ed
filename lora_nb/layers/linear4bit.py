"""A frozen linear layer whose weight is kept in four bits (Dettmers et al., 2023, arXiv:2305.14314, section 3, equation 5).

    y = x Ŵᵀ + b,    ∂L/∂x = ∂L/∂y · Ŵ,    Ŵ = dequantize(packed, absmax)  (out, in)

Ŵ lives for the length of one product. The backward pass makes it again rather than keeping it, so that what a layer holds
between forward and backward is what it holds at rest. W itself is frozen: what learns is an adapter beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_nb.errors import QuantizationError
from lora_nb.layers.nf4 import dequantize
from lora_nb.layers.quantized import QuantizedTensor


class Multiply4bit(torch.autograd.Function):
    """x (…, in), b (out,) or None, Ŵ (out, in) in four bits → x Ŵᵀ + b, all in x's type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: QuantizedTensor) -> Tensor:
        ctx.weight = weight  # frozen, so autograd need not watch it
        return F.linear(x, dequantize(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        for_x, for_bias, _ = ctx.needs_input_grad
        return (
            grad @ dequantize(ctx.weight, grad.dtype) if for_x else None,
            grad.reshape(-1, grad.shape[-1]).sum(0) if for_bias else None,
            None,
        )


class Linear4bit(nn.Linear):
    """`nn.Linear` with a frozen weight in four bits; empty until `hold` or `load_state_dict` gives it one.

    Args:
        in_features, out_features: as of the linear layer that it stands for.
        bias: whether b is added; b keeps its own type and may train.
        compute_dtype: type of the product; None for the input's own. Under autocast it is autocast's. The output has the input's.

    Its state dict has the keys and bytes of bitsandbytes' `Linear4bit`, so that each reads the other's files. The parts of
    the quantized weight that are fractions lie in the buffers as the integers of the same bits: so `.half()` and `.to(dtype)`,
    which round whatever is a fraction, cannot harm them.
    """

    # Of a QuantizedTensor beside `packed`, which is the parameter `weight`.
    TENSORS = ("absmax", "nested_absmax", "nested_code")

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, compute_dtype: torch.dtype | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.compute_dtype = in_features, out_features, compute_dtype
        self.weight = nn.Parameter(torch.empty(0, 1, dtype=torch.uint8), requires_grad=False)
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)
        for name in self.TENSORS:
            self.register_buffer(name, None)
        self.constants: dict[str, Any] | None = None  # the QuantizedTensor's other fields

    def hold(self, quantized: QuantizedTensor) -> None:
        """Take a weight in.

        Raises:
            QuantizationError: it is not (out, in), or its scales are NaN.
        """
        if tuple(quantized.shape) != (self.out_features, self.in_features):
            raise QuantizationError(
                f"a weight of {tuple(quantized.shape)} does not fit a linear layer of {(self.out_features, self.in_features)}: "
                "it belongs to another layer or model."
            )
        parts = {f.name: getattr(quantized.checked(), f.name) for f in fields(quantized)}
        self.weight = nn.Parameter(parts.pop("packed"), requires_grad=False)
        for name in self.TENSORS:
            setattr(self, name, _bits(parts.pop(name)))
        self.constants = parts

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as `layers/nf4.py` knows it; shares its memory.

        Raises:
            QuantizationError: the layer has none yet.
        """
        if self.constants is None:
            raise QuantizationError("This Linear4bit is empty: give it a weight with hold(quantize(weight)) or load_state_dict(…).")
        tensors: dict[str, Any] = {n: _fractions(getattr(self, n)) for n in self.TENSORS}
        return QuantizedTensor(packed=self.weight.data, **tensors, **self.constants)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        y: Tensor = Multiply4bit.apply(x.to(dtype), bias, self.quantized)  # type: ignore[no-untyped-call]
        return y if autocast else y.to(x.dtype)

    def weight_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Ŵ, (out, in); in the type that the weight had before it was quantized unless another is asked for."""
        return dequantize(self.quantized, dtype)

    def extra_repr(self) -> str:
        """As a linear layer's, and the form of its weight."""
        form = f"{self.quantized.quant_type}, {self.quantized.bits_per_parameter:.3f} bits" if self.constants else "empty"
        return f"{super().extra_repr()}, {form}, compute_dtype={self.compute_dtype}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weight = {prefix + "weight": self.weight} if self.constants is None else self.quantized.state_dict(prefix + "weight")
        bias = {} if self.bias is None else {prefix + "bias": self.bias if keep_vars else self.bias.detach()}
        destination.update(weight | bias)

    def _load_from_state_dict(  # noqa: PLR0917 - as nn.Module has it
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Everything is checked before anything changes."""
        own = {key: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        bias = own.pop(prefix + "bias", None) if self.bias is not None else None
        parts = {key: own.pop(key) for key in list(own) if key.startswith(prefix + "weight.") or key == prefix + "weight"}
        unexpected_keys += list(own) if strict else []
        absent = [prefix + "weight"] * (not parts) + [prefix + "bias"] * (self.bias is not None and bias is None)
        missing_keys += absent if strict else []
        try:
            self._check_bias(bias)
            if parts:
                self.hold(_parsed(parts, prefix + "weight").to(self.weight.device))
        except QuantizationError as error:
            error_msgs.append(f"{prefix}weight: {error}")
            return
        if bias is not None:
            with torch.no_grad():
                self.bias.copy_(bias)

    def _check_bias(self, bias: Tensor | None) -> None:
        if bias is not None and bias.shape != self.bias.shape:
            raise QuantizationError(f"a bias of {tuple(bias.shape)} does not fit a layer of {self.out_features} outputs.")


def _parsed(parts: Mapping[str, Tensor], key: str) -> QuantizedTensor:
    """A weight from a state dict.

    Raises:
        QuantizationError: it is no weight in four bits, or a damaged one.
    """
    if len(parts) == 1 and parts.get(key, torch.empty(0)).is_floating_point():
        raise QuantizationError(
            f"{key!r} holds a weight of {parts[key].dtype}, this layer one in four bits: load it into the model before quantize(model)."
        )
    return QuantizedTensor.from_state_dict(parts, key)


def _bits(fractions: Tensor | None) -> Tensor | None:
    """The same bits as whole numbers, which no change of a module's type rounds."""
    return fractions.view(torch.int32) if fractions is not None and fractions.dtype == torch.float32 else fractions


def _fractions(bits: Tensor | None) -> Tensor | None:
    return bits.view(torch.float32) if bits is not None and bits.dtype == torch.int32 else bits


def is_quantized(module: nn.Module) -> bool:
    """Whether its weight is kept in few bits, by this package or by bitsandbytes, whose layers are told by their looks."""
    weight = getattr(module, "weight", None)
    return hasattr(module, "weight_dense") or getattr(weight, "quant_state", None) is not None or hasattr(weight, "SCB")


def dense_weight(module: nn.Module) -> Tensor:
    """The weight that a layer multiplies with: its own, or what is dequantized from 4 bits (ours, bitsandbytes') or 8 (bitsandbytes').

    bitsandbytes' layers are told by their looks, so that torch is all this file needs. Their weights are unpacked here: the
    version 0.50 of the library gives wrong ones on a CPU when a row is no whole number of blocks.
    """
    weight: Any = module.weight
    if hasattr(module, "weight_dense"):
        return module.weight_dense()  # type: ignore[no-any-return,operator]
    if getattr(weight, "quant_state", None) is not None:
        return _dense_from_bitsandbytes(module)
    state = getattr(module, "state", None)
    if hasattr(weight, "SCB") and state is not None:
        codes, scales = (weight.CB, weight.SCB) if weight.SCB is not None else (weight.data, state.SCB)  # moved there by the first forward
        return codes * (scales.unsqueeze(1) / 127)  # type: ignore[no-any-return]
    return weight  # type: ignore[no-any-return]


def _dense_from_bitsandbytes(module: nn.Module) -> Tensor:
    """From its state dict; of a copy, as bitsandbytes unpacks in place what it has packed for a CPU."""
    weight: Any = module.weight
    if not getattr(weight.quant_state, "packing_format_for_cpu", False):
        state = {f"weight.{key}": tensor for key, tensor in weight.quant_state.as_dict(packed=True).items()} | {"weight": weight.data}
        return dequantize(QuantizedTensor.from_state_dict(state, "weight"))
    state = {key: tensor for key, tensor in copy.deepcopy(module).state_dict().items() if key.startswith("weight")}
    if state["weight.absmax"].ndim == 2:  # without double quantization its unpacking forgets the scales, (blocks in a row, out)
        state["weight.absmax"] = state["weight.absmax"].T.reshape(-1).float()
    return dequantize(QuantizedTensor.from_state_dict(state, "weight"))
