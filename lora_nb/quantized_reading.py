"""Reading a checkpoint into few bits, tensor by tensor, as a quantizer of transformers: it names, converts and checks the weights.

What transformers hands over here is one weight at a time; what is left of it afterwards is its quantized layer, in its place
in the model. transformers is imported with this file, so whoever needs it imports it late.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import modeling_utils
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lora_nb.configs import QuantConfig
from lora_nb.errors import QuantizationError
from lora_nb.layers.linear4bit import Linear4bit
from lora_nb.layers.matrix import is_conv1d
from lora_nb.layers.quantized import QuantizedTensor
from lora_nb.origin import remember, sample, samples
from lora_nb.quantization import choose, note_in_config
from lora_nb.quantized_layers import bitsandbytes_layers, quantized_layer, refuse_wrong_rows, stands_for

METHOD = "lora_nb"
STATE = "quant_state.bitsandbytes__"
STORED = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", f"{STATE}nf4", f"{STATE}fp4")


@register_quantization_config(METHOD)
class Reading(QuantizationConfigMixin):
    """What is asked for, and what is found on the way: samples of the weights as they were, and the first refusal.

    `stored` says that the checkpoint has four bits already, by bitsandbytes' rules.
    """

    def __init__(self, config: QuantConfig, device: torch.device, *, stored: bool) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.config, self.device, self.stored = config, device, stored
        self.origin: dict[str, bytes] = {}
        self.skipped: dict[str, str] = {}
        self.dtype: torch.dtype | None = None
        self.refusal: QuantizationError | None = None

    @contextmanager
    def piecewise(self) -> Iterator[None]:
        """While in here transformers reads a file piece by piece, as it does on Windows, instead of mapping it into memory whole.

        What was read of a mapped file stays in memory until all of it has been: with it goes what reading one tensor at a
        time would save. (transformers has no setting for it.)
        """
        loading: Any = modeling_utils  # where the name is not declared as public
        mapped = loading.safe_open

        def read(file: str, *, framework: str, device: str, backend: str) -> Any:  # noqa: ARG001 - the one that is not taken
            return mapped(file, framework=framework, device=device, backend="pread")

        loading.safe_open = read
        try:
            yield
        finally:
            loading.safe_open = mapped

    def finish(self, model: Any) -> None:
        """Take transformers' marks off, and note in the config what the layers are."""
        for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
            if hasattr(model, mark):
                delattr(model, mark)
        kept: Any = model._weight_conversions  # noqa: SLF001 - what saving would undo; ours needs no undoing
        model._weight_conversions = [c for c in kept if not isinstance(getattr(c, "operations", [None])[0], Convert)]  # noqa: SLF001
        note_in_config(model, self.config, self.dtype, self.skipped)
        if self.origin:
            remember(model, {**samples(model), **self.origin})


@register_quantizer(METHOD)
class Reader(HfQuantizer):
    """What transformers asks while it loads."""

    serialized_names = {"weight": ["weight", *(f"weight.{name}" for name in STORED)]}  # noqa: RUF012 - as its base has it

    def __init__(self, quantization_config: Reading, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.reading, self.pre_quantized = quantization_config, quantization_config.stored
        self.chosen: set[str] = set()

    def update_device_map(self, device_map: Any) -> Any:
        return device_map if self.reading.device.type == "cpu" else {"": str(self.reading.device)}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            names, self.reading.skipped = choose(model, self.reading.config)
            self.chosen = set(names)
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name.removesuffix(".weight") in self.chosen

    def get_quantize_ops(self) -> ConversionOps:
        return Convert(self)

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": Convert}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class Convert(ConversionOps):
    """One weight, dense or in its stored parts → its layer, put into the model; nothing is left for transformers to place."""

    def __init__(self, hf_quantizer: Reader) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Convert:
        """transformers copies it for each weight; what is found on the way belongs in one place."""
        return self

    def convert(  # type: ignore[override]  # called by name
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        reading = self.hf_quantizer.reading
        parts: dict[str, Tensor] = {name: t[0] if isinstance(t, list) else t for name, t in input_dict.items()}
        if reading.stored and len(parts) == 1:
            return input_dict
        path = full_layer_name.removesuffix(".weight")
        try:
            put = _restore if reading.stored else _quantize
            put(model, path, parts, reading)
        except QuantizationError as error:
            # Not raised in here, where transformers would print it with all that led to it, and go on.
            reading.refusal = reading.refusal or QuantizationError(f"{full_layer_name}: {error}")
            return {}
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


def _quantize(model: nn.Module, path: str, parts: dict[str, Tensor], reading: Reading) -> None:
    (weight,) = parts.values()
    linear = model.get_submodule(path)
    expected = linear._parameters["weight"]
    if expected is not None and weight.shape != expected.shape:
        raise QuantizationError(f"{tuple(weight.shape)} does not fit a layer of {tuple(expected.shape)}: it belongs to another model.")
    reading.origin[f"{path}.weight"] = sample(weight)
    dense = weight.T.contiguous() if is_conv1d(linear) else weight
    reading.dtype = reading.config.compute(dense)
    model.set_submodule(path, _done(quantized_layer(linear, dense, reading.config)))


def _restore(model: nn.Module, path: str, parts: dict[str, Tensor], reading: Reading) -> None:
    found = QuantizedTensor.from_state_dict(parts, "weight")
    kind = reading.config.quant_type.removeprefix("bnb-")
    if found.quant_type != kind:
        raise QuantizationError(f"the checkpoint has {found.quant_type!r} and {kind!r} was asked for: leave quant out to read it.")
    linear = model.get_submodule(path)
    rows, columns = _shape(linear)
    reading.dtype = reading.config.compute(torch.empty(0, dtype=found.dtype))
    layer = Linear4bit(columns, rows, bias=False, compute_dtype=reading.dtype)
    layer.hold(found)
    chosen = _as_bitsandbytes(layer, parts) if reading.config.bitsandbytes else layer
    stands_for(chosen, linear)
    chosen._parameters["bias"] = linear._parameters.get("bias")
    model.set_submodule(path, _done(chosen.train(linear.training)))


def _shape(linear: nn.Module) -> tuple[int, int]:
    """(out, in)."""
    weight: Any = linear.weight
    return tuple(reversed(weight.shape)) if is_conv1d(linear) else tuple(weight.shape)


def _as_bitsandbytes(layer: Linear4bit, parts: dict[str, Tensor]) -> nn.Module:
    refuse_wrong_rows(layer.in_features, parts["weight"].device)
    bnb = bitsandbytes_layers()
    with torch.device("meta"):
        theirs: nn.Module = bnb.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=layer.compute_dtype)
    stats = {name: t for name, t in parts.items() if name != "weight"}
    theirs.weight = bnb.Params4bit.from_prequantized(parts["weight"], stats, device=parts["weight"].device, module=theirs)
    return theirs


def _done(layer: nn.Module) -> nn.Module:
    """Marked so that transformers does not set its values anew."""
    for part in (layer, *layer.parameters()):
        setattr(part, "_is_hf_initialized", True)  # noqa: B010 - a mark, not a field
    return layer
