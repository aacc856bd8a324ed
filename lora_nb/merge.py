"""Merging adapters into the base's weights, and exactly back.

What is replaced is kept beside the model, so `unmerge` puts the same bytes back; subtracting the update again would not
(in 32 bits a third of the entries change). Over a base in four bits there are three places to merge into:

| into | the weight becomes | what it costs |
| --- | --- | --- |
| `"dequantized"` | what training saw, plus the update, in 16 or 32 bits | memory; the output stays what was trained |
| `"original"` | the weights before they were quantized, plus the update | the update was learnt around the rounding, which is now gone |
| `"requantized"` | that of the first, rounded to four bits again | updates smaller than the grid are lost |
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lora_nb.attach import STATE, acting, active_names, adapters, freeze, layers, release, set_active
from lora_nb.attach_report import AttachReport
from lora_nb.errors import AdapterError
from lora_nb.layers.adapted import AdaptedLayer, Part, adapted
from lora_nb.layers.linear4bit import dense_weight, is_quantized
from lora_nb.layers.matrix import matrix
from lora_nb.merged_values import kept_dtype, survived, values
from lora_nb.output_change import change, seen
from lora_nb.quantized_layers import dense_layer, requantized_layer
from lora_nb.render import html_table, text_table

Into = Literal["dequantized", "original", "requantized"]
HALF = 0.5  # of an update; less of it left than that is worth a warning
COLUMNS = ["module", "update left", "change of output"]


@dataclass(frozen=True)
class MergeReport:
    """What merging did: how much of each module's update arrived in its weight, and how its output changed by that.

    `survived` is the projection of what was added onto what should have been, 1 where nothing was lost; `output_change` is
    ‖y′ − y‖ / ‖y‖ of the module on the inputs that it gets from the sample, y before and y′ after.
    """

    names: tuple[str, ...]
    target: str
    survived: dict[str, float]
    output_change: dict[str, float]
    notes: tuple[str, ...] = ()

    def _title(self) -> str:
        least = min(self.survived.values(), default=1.0)
        return f"{', '.join(map(repr, self.names))} merged into {len(self.survived)} modules ({self.target}); least update left {least:.1%}"

    def _rows(self) -> list[tuple[str, str, str]]:
        return [(n, f"{kept:.1%}", f"{self.output_change.get(n, nan):.2g}") for n, kept in self.survived.items()]

    def __repr__(self) -> str:
        return "\n".join([self._title(), *self.notes, text_table(COLUMNS, self._rows())])

    def _repr_html_(self) -> str:
        return html_table(COLUMNS, self._rows(), " ".join([self._title(), *self.notes]))


@dataclass
class Merged:
    """What `unmerge` needs: the adapters with their parts by path, and the modules and tensors that were replaced."""

    reports: dict[str, AttachReport]
    active: tuple[str, ...]
    parts: dict[str, dict[str, Part]] = field(default_factory=dict)
    tensors: dict[str, dict[str, Tensor | None]] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    tied: bool | None = None
    quantization: object | None = None


def merge(
    model: nn.Module,
    names: str | Sequence[str] | None = None,
    *,
    into: Into = "dequantized",
    original: nn.Module | Mapping[str, Tensor] | None = None,
    sample: Any = None,
    keep: bool = True,
) -> MergeReport:
    """Put adapters into the weights; the model then has plain modules again, as fast as before any adapter.

    Args:
        names: one or several, applied in this order. Default: the active ones.
        into: what the weights of a base in four bits become (see above); others are merged as they are.
        original: for `into="original"`: the base before it was quantized, or its state dict.
        sample: token ids (batch, seq), or a dict of the model's arguments, to measure the change of outputs on. Default, for a
            language model: 64 tokens out of its vocabulary.
        keep: keep what is replaced for `unmerge`; False saves its memory, and what is merged stays.

    Raises:
        AdapterError: unknown names, an adapter that no weight can express, no original weight, or a result that is not
            finite. The model is then as it was.
    """
    wanted = active_names(model) if names is None else (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    state = adapters(model)
    if state.merged is not None:
        there = ", ".join(cast("Merged", state.merged).reports)
        raise AdapterError(f"{there} is merged already: unmerge(model) first, then merge all that you want together.")
    originals = _originals(into, original)
    with acting(model, wanted):
        chosen = [(path, layer) for path, layer in layers(model) if layer.active]
        for path, layer in chosen:
            values(path, layer, originals)  # all of them once before any is written
        before = seen(model, [layer for _, layer in chosen], sample)
        record, arrived = Merged({n: state.reports[n] for n in wanted}, state.active), {}
        for path, layer in chosen:
            arrived[path] = _write(record, path, layer, into, originals)
    _take_out(model, wanted, record)
    notes = _untie(model, record)
    _say_dense(model, record)
    _close(model, record if keep else None)
    changes = {path: change(model.get_submodule(path), *before[layer]) for path, layer in chosen if layer in before}
    lost = [path for path, share in arrived.items() if share < HALF]
    if lost:
        warnings.warn(f"Less than half of the update is left in {len(lost)} of {len(arrived)} modules, such as {lost[0]!r}.", stacklevel=2)
    return MergeReport(wanted, into if record.modules else "weights", arrived, changes, notes)


def unmerge(model: nn.Module) -> AttachReport:
    """Put the original weights back, bit for bit, and the adapters on again, acting as before.

    Raises:
        AdapterError: nothing is merged, or it was with `keep=False`.
    """
    state = adapters(model)
    record = cast("Merged | None", state.merged)
    if record is None:
        raise AdapterError("Nothing is merged that could be taken out again: merge(model) first (and not with keep=False).")
    for path, module in record.modules.items():
        _replace(model, path, module)
    for path, tensors in record.tensors.items():
        _set(model.get_submodule(path), tensors)
    freeze(model, state)
    for path, parts in record.parts.items():
        module = model.get_submodule(path)
        layer = adapted(module)
        if layer is not module:
            model.set_submodule(path, layer)
        layer.adapters.update(parts)
    if record.tied is not None:
        model.config.tie_word_embeddings = record.tied  # type: ignore[union-attr]
    if record.quantization is not None:
        model.config.quantization_config = record.quantization  # type: ignore[union-attr]
    state.reports |= record.reports
    state.merged = None
    set_active(model, record.active)
    return next(iter(record.reports.values()))


def _originals(into: Into, original: nn.Module | Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
    if into not in ("dequantized", "original", "requantized"):
        raise AdapterError(f"merge(into={into!r}): there are 'dequantized', 'original' and 'requantized'.")
    if (into == "original") != (original is not None):
        raise AdapterError("merge(into='original', original=…) needs both: the base before it was quantized, or its state dict.")
    return dict(original.named_parameters()) if isinstance(original, nn.Module) else original


@torch.no_grad()
def _write(record: Merged, path: str, layer: AdaptedLayer, into: Into, originals: Mapping[str, Tensor] | None) -> float:
    """Put a layer's new values in place; returns the share of the weight's update that arrived."""
    before, changed = values(path, layer, originals)
    if is_quantized(layer.base):
        record.modules[path], arrived = layer.base, _new_base(layer, changed, into)
    else:
        record.tensors[path], arrived = _rounded(layer, changed)
    return survived(before.get("weight"), changed.get("weight"), arrived)


def _new_base(layer: AdaptedLayer, changed: Mapping[str, Tensor], into: Into) -> Tensor | None:
    """A new module beneath the layer; `layer.base` is it from now on."""
    bias = changed.get("bias", layer._parameters.get("bias"))
    weight = changed["weight"] if "weight" in changed else dense_weight(layer.base)
    new = (requantized_layer if into == "requantized" else dense_layer)(layer.base, weight, bias)
    layer.__dict__["base"] = new
    return matrix(new)


def _rounded(layer: AdaptedLayer, changed: Mapping[str, Tensor]) -> tuple[dict[str, Tensor | None], Tensor | None]:
    """The values in the types of what they replace, put in place; returns what stood there, and the new weight."""
    old = {n: layer._parameters.get(n, layer._buffers.get(n)) for n in changed}
    new = {n: v.detach().to(kept_dtype(layer, n), copy=True) for n, v in changed.items()}
    _set(layer, {n: v if n in layer._buffers else nn.Parameter(v, requires_grad=False) for n, v in new.items()})
    return old, new.get("weight")


def _set(module: nn.Module, tensors: Mapping[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        table: dict[str, Any] = module._buffers if name in module._buffers else module._parameters
        table[name] = tensor


def _take_out(model: nn.Module, names: Sequence[str], record: Merged) -> None:
    """The merged adapters' parts out of the model; a layer that has no other makes room for its base."""
    state = adapters(model)
    for path, layer in layers(model):
        gone = {n: cast("Part", layer.adapters[n]) for n in names if n in layer.adapters}
        for n in gone:
            del layer.adapters[n]
        if gone:
            record.parts[path] = gone
            layer.active = tuple(n for n in layer.active if n not in gone)
            _replace(model, path, layer.base)
    for n in names:
        del state.reports[n]
    state.active = tuple(n for n in state.active if n in state.reports)


def _replace(model: nn.Module, path: str, base: nn.Module) -> None:
    """`base` in the place of the module at `path`, with the adapters that are there around it."""
    there = model.get_submodule(path)
    if isinstance(there, AdaptedLayer) and there.adapters:
        layer = there if there._parameters is base._parameters else adapted(base)
        if layer is not there:
            layer.adapters.update(dict(there.adapters.items()))
            layer.active = there.active
        base = layer
    if base is not there:
        model.set_submodule(path, base)


def _untie(model: nn.Module, record: Merged) -> tuple[str, ...]:
    """Modules that shared a weight of which one has another now: said aloud, and in the model's config, which saving reads."""
    notes = []
    for path, tensors in record.tensors.items():
        old = tensors.get("weight")
        others = [p for p, m in model.named_modules(remove_duplicate=False) if old is not None and m._parameters.get("weight") is old]
        twins = [p for p, t in record.tensors.items() if p > path and old is not None and t.get("weight") is old]
        for twin in twins:
            one, other = model.get_submodule(path), model.get_submodule(twin)
            if torch.equal(one.weight, other.weight):  # type: ignore[arg-type]
                other._parameters["weight"] = one._parameters["weight"]
            else:
                others.append(twin)
        if others:
            notes.append(f"{path} shared its weight with {', '.join(others)}; now it has one of its own.")
            if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
                record.tied, model.config.tie_word_embeddings = True, False  # type: ignore[union-attr]
    return tuple(notes)


def _say_dense(model: nn.Module, record: Merged) -> None:
    """Which layers are of few bits no more, in the model's config: whoever loads what is saved from it would round these again."""
    config: Any = getattr(model, "config", None)
    said = getattr(config, "quantization_config", None)
    dense = [path for path in record.modules if not is_quantized(model.get_submodule(path))]
    if said is None or not dense:
        return
    record.quantization = said
    if any(is_quantized(m) for m in model.modules()):
        said = dict(said if isinstance(said, Mapping) else said.to_dict())
        config.quantization_config = said | {"llm_int8_skip_modules": sorted({*(said.get("llm_int8_skip_modules") or ()), *dense})}
    else:
        del config.quantization_config


def _close(model: nn.Module, record: Merged | None) -> None:
    state = adapters(model)
    state.merged = record
    if not state.reports:
        release(model, state)
        if record is None:
            delattr(model, STATE)
