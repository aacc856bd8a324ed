"""One linear layer into few bits, this package's or bitsandbytes', and back into a plain one of the kind that it was."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_nb.configs import QuantConfig
from lora_nb.errors import QuantizationError
from lora_nb.layers.linear4bit import Linear4bit
from lora_nb.layers.matrix import is_conv1d
from lora_nb.layers.nf4 import quantize


def quantized_layer(linear: nn.Module, weight: Tensor, config: QuantConfig) -> nn.Module:
    """A layer that stands for `linear`, with W (out, in) in few bits; the bias stays the same parameter.

    Raises:
        QuantizationError: W is NaN or infinite somewhere.
    """
    if weight.is_floating_point() and weight.dtype not in {torch.float32, torch.bfloat16, torch.float16}:
        weight = weight.float()
    if config.quant_type == "bnb-int8":
        layer = _eight_bits(weight)
    else:
        layer = _bitsandbytes(weight, config) if config.bitsandbytes else _ours(weight, config)
    stands_for(layer, linear)
    layer._parameters["bias"] = linear._parameters.get("bias")
    if layer._parameters["bias"] is not None:
        layer._parameters["bias"].requires_grad_(False)  # noqa: FBT003 - its name differs between torch's stubs and torch
    return layer.train(linear.training)


def stands_for(layer: nn.Module, linear: nn.Module) -> None:
    """Note which kind of layer a quantized one replaces: to be merged into, it becomes one of that kind again."""
    layer.was_conv1d = is_conv1d(linear) or bool(getattr(linear, "was_conv1d", False))  # type: ignore[assignment]  # a mark, no tensor


def _ours(weight: Tensor, config: QuantConfig) -> nn.Module:
    layer = Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=config.compute(weight))
    layer.hold(quantize(weight, config.block_size, config.double_quant, quant_type=config.quant_type))
    return layer


def _bitsandbytes(weight: Tensor, config: QuantConfig) -> nn.Module:
    bnb = bitsandbytes_layers()
    _refuse_damaged(weight)
    refuse_wrong_rows(weight.shape[1], weight.device)
    kind, dtype = config.quant_type.removeprefix("bnb-"), config.compute(weight)
    with torch.device("meta"):
        layer: nn.Module = bnb.Linear4bit(
            weight.shape[1], weight.shape[0], bias=False, compute_dtype=dtype, compress_statistics=config.double_quant, quant_type=kind
        )
    values = bnb.Params4bit(
        weight.contiguous(), requires_grad=False, compress_statistics=config.double_quant, quant_type=kind, module=layer
    )
    layer.weight = values.to(weight.device)
    return layer


def _eight_bits(weight: Tensor) -> nn.Module:
    bnb = bitsandbytes_layers()
    _refuse_damaged(weight)
    with torch.device("meta"):
        layer: nn.Module = bnb.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(weight.device)
    layer.dense_dtype = weight.dtype  # type: ignore[assignment]  # a mark: bitsandbytes does not keep it
    return layer


def bitsandbytes_layers() -> Any:
    """`bitsandbytes.nn`, whose types say less than its code does."""
    import bitsandbytes

    return bitsandbytes.nn


def _refuse_damaged(weight: Tensor) -> None:
    if not torch.isfinite(weight).all():
        raise QuantizationError("The weight holds NaN or infinity, which no level stands for: it is damaged, or its training ran away.")


def refuse_wrong_rows(columns: int, device: torch.device) -> None:
    """Where bitsandbytes (0.50, on a CPU) takes another block's scales.

    Raises:
        QuantizationError: rows that are no whole number of its blocks.
    """
    if device.type == "cpu" and columns % 64:
        raise QuantizationError(
            f"bitsandbytes computes wrong weights on a CPU where a row of {columns} is no multiple of 64: use 'nf4' or 'fp4', this "
            "package's own layers, or leave the layer out with skip_modules."
        )


def dense_layer(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A plain layer in the place of a quantized one, with W (out, in), of the kind and in the type that were there before."""
    dtype = weight_dtype(module)
    linear, stored = _empty(module, weight, bias=bias is not None)
    linear.weight = nn.Parameter(stored.to(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(_bias_dtype(module, dtype)), requires_grad=False)
    return linear.train(module.training)


def _empty(module: nn.Module, weight: Tensor, *, bias: bool) -> tuple[nn.Module, Tensor]:
    """The layer without its values, and W as it keeps it."""
    with torch.device("meta"):
        if getattr(module, "was_conv1d", False):
            from transformers.pytorch_utils import Conv1D

            return Conv1D(*weight.shape), weight.T.contiguous()  # type: ignore[no-untyped-call]
        return nn.Linear(weight.shape[1], weight.shape[0], bias=bias), weight


def requantized_layer(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer of the same kind and settings as `module`, with another weight."""
    config, dtype = config_of(module), weight_dtype(module)
    layer = quantized_layer(module, weight.to(dtype), config)
    own = None if bias is None else nn.Parameter(bias.detach().to(_bias_dtype(module, dtype)), requires_grad=False)
    layer._parameters["bias"] = own
    return layer


def _bias_dtype(module: nn.Module, dtype: torch.dtype) -> torch.dtype:
    old = module._parameters.get("bias")
    return dtype if old is None else old.dtype


def config_of(module: nn.Module) -> QuantConfig:
    """The settings by which a quantized layer was made."""
    compute: Any = getattr(module, "compute_dtype", None)
    if isinstance(module, Linear4bit):
        q = module.quantized
        return QuantConfig(quant_type=q.quant_type, block_size=q.block_size, double_quant=q.nested, compute_dtype=compute)  # type: ignore[arg-type]
    state: Any = getattr(module.weight, "quant_state", None)
    if state is None:
        return QuantConfig(quant_type="bnb-int8")
    return QuantConfig(quant_type=f"bnb-{state.quant_type}", double_quant=state.nested, compute_dtype=compute)  # type: ignore[arg-type]


def weight_dtype(module: nn.Module) -> torch.dtype:
    """The type that the weight of a quantized layer had before."""
    if isinstance(module, Linear4bit):
        return module.quantized.dtype
    state: Any = getattr(module.weight, "quant_state", None)
    # Whoever made an 8-bit layer without us has not said.
    return state.dtype if state is not None else getattr(module, "dense_dtype", torch.float32)


def kept(layer: nn.Module) -> Iterable[Tensor]:
    """The tensors of a quantized weight; the tables, which are the same for all layers, left out."""
    if isinstance(layer, Linear4bit):
        q = layer.quantized
        return [t for t in (q.packed, q.absmax, q.nested_absmax) if t is not None]
    weight: Any = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        moved: Any = layer.state  # where the first forward puts the scales
        return [weight.data, weight.SCB if weight.SCB is not None else moved.SCB]
    return [weight.data, state.absmax, *([state.state2.absmax] if state.nested else [])]
