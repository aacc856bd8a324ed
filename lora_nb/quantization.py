"""Quantizing a base in place: which of its linear layers, and a report of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_nb.attach import adapters
from lora_nb.configs import QuantConfig
from lora_nb.errors import QuantizationError, nearest
from lora_nb.layers.adapted import AdaptedLayer
from lora_nb.layers.linear4bit import dense_weight, is_quantized
from lora_nb.layers.matrix import is_conv1d
from lora_nb.origin import remember, samples
from lora_nb.quantized_layers import kept, quantized_layer
from lora_nb.render import format_bytes, html_table, text_table
from lora_nb.targets import all_linear, base_modules, named, parts_of

COLUMNS = ["module", "out × in", "bits a weight", "error"]


@dataclass(frozen=True)
class QuantizedModule:
    """One layer: shape (out, in), bits for each weight, and ‖Ŵ − W‖ / ‖W‖."""

    shape: tuple[int, int]
    bits: float
    error: float


@dataclass(frozen=True)
class QuantReport:
    """What `quantize` did: the layers, those left alone and why, and the bytes of the whole model before and after."""

    config: QuantConfig
    compute_dtype: torch.dtype | None
    modules: dict[str, QuantizedModule]
    skipped: dict[str, str]
    before: int
    after: int

    def _title(self) -> str:
        type_said = str(self.compute_dtype).removeprefix("torch.") if self.compute_dtype else "the input's type"
        return (
            f"{len(self.modules)} linear layers in {self.config.quant_type}, computed in {type_said}: the model has "
            f"{format_bytes(self.after)}, before {format_bytes(self.before)}"
        )

    def _notes(self) -> list[str]:
        return [f"{name} is left as it is: {why}." for name, why in self.skipped.items()]

    def _rows(self) -> list[tuple[str, str, float, float]]:
        return [(name, f"{m.shape[0]} × {m.shape[1]}", m.bits, m.error) for name, m in self.modules.items()]

    def __repr__(self) -> str:
        return "\n".join([self._title(), *self._notes(), text_table(COLUMNS, self._rows())])

    def _repr_html_(self) -> str:
        return html_table(COLUMNS, self._rows(), " ".join([self._title() + ".", *self._notes()]))


@torch.no_grad()
def quantize(model: nn.Module, config: QuantConfig | None = None) -> QuantReport:
    """Put the linear layers of a base into few bits, in place, one after the other.

    Norms, embeddings and biases keep their type, and so does the output head unless `skip_head=False`. `load(…, quant=…)` does
    the same while it reads, so that the whole model never lies in memory.

    Raises:
        QuantizationError: no layer to quantize, adapters on the model, weights that are NaN, or a name in `skip_modules` that
            means nothing. The layers before the damaged one are quantized then.
    """
    config = config or QuantConfig()
    if adapters(model).reports:
        there = ", ".join(adapters(model).reports)
        raise QuantizationError(f"The model has adapters ({there}): quantize(model) first, then attach them; detach(model) takes them off.")
    names, skipped = choose(model, config)
    before, origin = size(model), samples(model)
    report: dict[str, QuantizedModule] = {}
    dtype = None
    for name in names:
        linear = model.get_submodule(name)
        dense = _matrix(linear)
        layer = quantized_layer(linear, dense, config)
        model.set_submodule(name, layer)
        dtype = config.compute(dense)
        error = dense.float() - dense_weight(layer).to(dense.dtype).float()
        bits = 8 * sum(t.numel() * t.element_size() for t in kept(layer)) / dense.numel()
        norm = float(dense.float().norm()) or 1.0
        report[name] = QuantizedModule((dense.shape[0], dense.shape[1]), bits, float(error.norm()) / norm)
    remember(model, origin)
    note_in_config(model, config, dtype, skipped)
    return QuantReport(config, dtype, report, skipped, before, size(model))


def choose(model: nn.Module, config: QuantConfig) -> tuple[list[str], dict[str, str]]:
    """Names of the layers to quantize, in the model's order, and why the other linear layers are not.

    Raises:
        QuantizationError: there is none, or a name in `skip_modules` means none.
    """
    modules = dict(base_modules(model))
    inside = set(all_linear(model, modules, None))
    linear = {n: m for n, m in modules.items() if n and (n in inside or isinstance(m, nn.Linear) or is_conv1d(m)) and not is_quantized(m)}
    for part in parts_of(config.skip_modules or ()):
        if not any(_within(name, part) for name in modules if name):
            ends = {name.rsplit(".", 1)[-1] for name in linear}
            raise QuantizationError(f"skip_modules={config.skip_modules!r} means no module of the model." + nearest(str(part[0]), ends))
    skipped = {n: why for n, m in linear.items() if (why := _why_not(n, m, inside, model, config))}
    names = [n for n in linear if n not in skipped]
    if not names:
        left = "; ".join(f"{n}: {why}" for n, why in skipped.items()) or "it has none, or they are quantized already"
        raise QuantizationError(f"The model has no linear layer left to quantize ({left}).")
    return names, skipped


def _why_not(name: str, module: nn.Module, inside: set[str], model: nn.Module, config: QuantConfig) -> str | None:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if module is head and config.skip_head:
        return "it is the output head"
    if name not in inside and module is not head:
        return "its weight is read without a call"
    if _is_tied(model, name):
        return "it shares its weight with another layer"
    exact = [*(getattr(model, "_keep_in_fp32_modules", None) or ()), *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    if any(part in exact for part in name.split(".")):
        return "the architecture needs it in 32 bits"
    return "skip_modules names it" if _within(name, config.skip_modules) else None


def _within(name: str, names: Any) -> bool:
    """Whether the module or one that it lies in is named."""
    pieces = name.split(".")
    return any(named(".".join(pieces[: i + 1]), names) for i in range(len(pieces)))


def _is_tied(model: nn.Module, name: str) -> bool:
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    weight = getattr(model.get_submodule(name), "weight", None)
    tied_now = sum(m._parameters.get("weight") is weight for m in model.modules()) > 1
    return tied_now or f"{name}.weight" in {*ties.keys(), *ties.values()}


def _matrix(linear: nn.Module) -> Tensor:
    """W, (out, in); transformers' Conv1D keeps it transposed."""
    weight: Tensor = linear.weight.detach()  # type: ignore[operator]
    return weight.T.contiguous() if is_conv1d(linear) else weight


def size(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, adapters' included, and of what bitsandbytes' layers keep, which is neither."""
    seen: dict[int, int] = {}
    for module in model.modules():
        own = [*module._parameters.values(), *module._buffers.values()]
        layer = module.base if isinstance(module, AdaptedLayer) else module
        own += kept(layer) if is_quantized(layer) else []
        seen |= {t.data_ptr() if t.numel() and not t.is_meta else id(t): t.numel() * t.element_size() for t in own if t is not None}
    return sum(seen.values())


def note_in_config(model: nn.Module, config: QuantConfig, dtype: torch.dtype | None, skipped: Mapping[str, str]) -> None:
    """What transformers' `save_pretrained` writes into config.json, so that it reads the checkpoint again with bitsandbytes' layers."""
    own = getattr(model, "config", None)
    if own is None:
        return
    four = config.quant_type != "bnb-int8"
    said: dict[str, object] = {"quant_method": "bitsandbytes", "load_in_4bit": four, "load_in_8bit": not four}
    said |= {"llm_int8_skip_modules": sorted(skipped) or None, "llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": False}
    if four:
        said |= {
            "bnb_4bit_quant_type": config.quant_type.removeprefix("bnb-"),
            "bnb_4bit_use_double_quant": config.double_quant,
            "bnb_4bit_compute_dtype": str(dtype or torch.float32).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
        }
    own.quantization_config = said
