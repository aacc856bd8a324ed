"""Quantizing a base in place: which linear layers, by which of the layers that keep weights in few bits, and a report of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_nb.attach import adapters
from lora_nb.configs import QuantConfig
from lora_nb.errors import QuantizationError, nearest
from lora_nb.layers.adapted import AdaptedLayer
from lora_nb.layers.linear4bit import Linear4bit, dense_weight, is_quantized
from lora_nb.layers.matrix import is_conv1d
from lora_nb.layers.nf4 import quantize as quantized
from lora_nb.origin import remember, samples
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
        bits = 8 * sum(t.numel() * t.element_size() for t in _kept(layer)) / dense.numel()
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
    layer.hold(quantized(weight, config.block_size, config.double_quant, quant_type=config.quant_type))
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
    return state.dtype if state is not None else getattr(module, "dense_dtype", torch.float32)


def _kept(layer: nn.Module) -> Iterable[Tensor]:
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


def size(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, adapters' included, and of what bitsandbytes' layers keep, which is neither."""
    seen: dict[int, int] = {}
    for module in model.modules():
        own = [*module._parameters.values(), *module._buffers.values()]
        layer = module.base if isinstance(module, AdaptedLayer) else module
        own += _kept(layer) if is_quantized(layer) else []
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
