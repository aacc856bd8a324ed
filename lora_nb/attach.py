"""Putting adapters on a model, in place, and taking them off again.

What is attached is written on the model itself (`model.lora_nb_adapters`) and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn

from lora_nb.attach_report import AttachReport, report_of
from lora_nb.bottleneck_targets import resolve_bottleneck
from lora_nb.configs import BottleneckConfig, LoraConfig
from lora_nb.errors import AdapterError, nearest
from lora_nb.layers.adapted import AdaptedLayer, Part, adapted
from lora_nb.layers.lora import LoraWeights
from lora_nb.resolution import refuse_idle_settings, resolve
from lora_nb.targets import Target

STATE = "lora_nb_adapters"


@dataclass
class Adapters:
    """The adapters of one model.

    Reports of attaching by name; which act; facts to save with each, such as how it was trained; the base's own
    `requires_grad` flags; and what `merge` has taken out.
    """

    reports: dict[str, AttachReport] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    trainable_before: dict[str, bool] = field(default_factory=dict)
    merged: object | None = None


def adapters(model: nn.Module) -> Adapters:
    """The record of what is attached; empty for a model without adapters."""
    return getattr(model, STATE, None) or Adapters()


def attach(model: nn.Module, config: LoraConfig | BottleneckConfig, name: str = "default") -> AttachReport:
    """Add an adapter in place, freeze the base, and make the new adapter the active one.

    The modules that `config` names are swapped for layers that share their parameters; the output does not change
    until something is trained, unless the config asks for another start. Adapters that are already there stay, inactive:
    `set_active` takes several.

    Raises:
        TargetError: the config names something that the model lacks.
        AdapterError: the name is taken or not usable as a name.
    """
    check_name(model, name)
    if isinstance(config, BottleneckConfig):
        return put_on(model, config, name, resolve_bottleneck(model, config))
    targets = resolve(model, config)
    refuse_idle_settings(config, targets)
    return put_on(model, config, name, targets)


def put_on(model: nn.Module, config: LoraConfig | BottleneckConfig, name: str, targets: Sequence[Target]) -> AttachReport:
    """What `attach` does once it is clear what goes where."""
    state = adapters(model)
    freeze(model, state)
    init = config.init_weights if isinstance(config, BottleneckConfig) else config.init_lora_weights
    for target in targets:
        _put(model, name, target, init)
    state.reports[name] = report_of(model, name, config, targets)
    set_active(model, name)
    return state.reports[name]


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter off, or all of them; with the last one the base's own modules are put back, bit for bit.

    Raises:
        AdapterError: no adapter of that name.
    """
    state = adapters(model)
    for gone in list(state.reports) if name is None else [_known(model, name)]:
        for path, layer in layers(model, gone):
            del layer.adapters[gone]
            layer.active = tuple(n for n in layer.active if n != gone)
            if not layer.adapters:
                model.set_submodule(path, layer.base)
        del state.reports[gone]
        state.facts.pop(gone, None)
    state.active = tuple(n for n in state.active if n in state.reports)
    if not state.reports and hasattr(model, STATE):
        release(model, state)
        if state.merged is None:
            delattr(model, STATE)


def freeze(model: nn.Module, state: Adapters) -> None:
    """Let the base train no more, and note what did before the first adapter."""
    if not state.reports:
        state.trainable_before = {n: p.requires_grad for n, p in model.named_parameters()}
        setattr(model, STATE, state)
    for p in model.parameters():
        p.requires_grad_(False)  # noqa: FBT003 - its name differs between torch's stubs and torch


def release(model: nn.Module, state: Adapters) -> None:
    """What trained before the first adapter trains again."""
    for n, p in model.named_parameters():
        p.requires_grad_(state.trainable_before.get(n, True) and p.is_floating_point())


def set_active(model: nn.Module, names: str | Sequence[str]) -> None:
    """Let exactly these adapters act and train; several act one after the other. An empty list leaves the base alone.

    Raises:
        AdapterError: no adapter of that name, or two of them bring a whole copy of the same parameter.
    """
    wanted = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    _check_together(model, wanted)
    _switch(model, wanted)
    for _, layer in layers(model):
        for name, part in layer.adapters.items():
            part.requires_grad_(name in wanted)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the `with` block the model is the base alone; afterwards the same adapters act as before."""
    with acting(model, ()):
        yield model


@contextmanager
def acting(model: nn.Module, names: Sequence[str]) -> Iterator[nn.Module]:
    """Within the `with` block these adapters act, without a change to what trains."""
    _check_together(model, names)
    before = adapters(model).active
    _switch(model, tuple(names))
    try:
        yield model
    finally:
        _switch(model, tuple(n for n in before if n in adapters(model).reports))


def parameters(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """The adapter's parameters by their path in the model, for an optimizer of one's own. Default: the active ones.

    Raises:
        AdapterError: no adapter of that name, or none attached.
    """
    wanted = active_names(model) if name is None else (_known(model, name),)
    found: dict[Tensor, str] = {}  # a tied parameter stands in two layers but is one
    for path, layer in layers(model):
        for n in wanted:
            for key, p in layer.adapters[n].named_parameters() if n in layer.adapters else ():
                found.setdefault(p, f"{path}.adapters.{n}.{key}")
    return {key: p for p, key in found.items()}


def active_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that act.

    Raises:
        AdapterError: none is attached or active.
    """
    state = adapters(model)
    if not state.active:
        there = list(state.reports)
        hint = f"call set_active(model, …) with one of {there}" if there else "call attach(model, LoraConfig(…)) first"
        raise AdapterError(f"The model has no active adapter: {hint}.")
    return state.active


def only_name(model: nn.Module, name: str | None) -> str:
    """The adapter meant by `name`, or the single active one when None.

    Raises:
        AdapterError: unknown name, none active, or several active and none named.
    """
    if name is not None:
        return _known(model, name)
    active = active_names(model)
    if len(active) > 1:
        raise AdapterError(f"Several adapters are active ({', '.join(active)}): say which one with name=….")
    return active[0]


def layers(model: nn.Module, name: str | None = None) -> list[tuple[str, AdaptedLayer]]:
    """The adapted layers by path; with a name, those that carry that adapter."""
    return [
        (path, m) for path, m in _base_modules(model, "", set()) if isinstance(m, AdaptedLayer) and (name is None or name in m.adapters)
    ]


def _base_modules(module: nn.Module, path: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """As `named_modules`, but not into the adapters, of which there may be hundreds at each layer."""
    if module in seen:
        return
    seen.add(module)
    yield path, module
    for key, child in module._modules.items():
        if child is not None and not (key == "adapters" and isinstance(module, AdaptedLayer)):
            yield from _base_modules(child, f"{path}.{key}" if path else key, seen)


def parts(model: nn.Module, name: str) -> dict[str, Part]:
    """Everything of one adapter by the path of the module that it belongs to."""
    return {path: layer.adapters[name] for path, layer in layers(model, _known(model, name))}  # type: ignore[misc]


def weights(model: nn.Module, name: str) -> Mapping[str, LoraWeights]:
    """The low-rank updates of one adapter by the path of the module that they belong to."""
    return {path: part for path, part in parts(model, name).items() if isinstance(part, LoraWeights)}


def _switch(model: nn.Module, wanted: tuple[str, ...]) -> None:
    state = adapters(model)
    state.active = wanted
    for _, layer in layers(model):
        layer.active = tuple(n for n in wanted if n in layer.adapters)


def _check_together(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        _known(model, name)
    for path, layer in layers(model) if len(names) > 1 else ():
        owners: dict[str, str] = {}
        for name in (n for n in names if n in layer.adapters):
            for key in layer.adapters[name].copies():  # type: ignore[operator]
                if owners.setdefault(key, name) != name:
                    raise AdapterError(
                        f"{owners[key]!r} and {name!r} cannot act together: each has a {key} of its own for {path!r}. Activate one of them."
                    )


def _put(model: nn.Module, name: str, target: Target, init: bool | str) -> None:
    """The adapter's part into its layer; the layer into the model, where it is not there yet."""
    layer = adapted(target.module)
    if layer is not target.module:
        model.set_submodule(target.name, layer)
    part = layer.add(name, target.make(), init)
    if target.shares is not None:
        owner = cast("AdaptedLayer", model.get_submodule(target.shares)).adapters[name]
        for key, p in owner.named_parameters():
            place, _, leaf = key.rpartition(".")
            part.get_submodule(place)._parameters[leaf] = p


def check_name(model: nn.Module, name: str) -> None:
    """Raise unless a new adapter may have that name."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w\- ]*", name) or hasattr(nn.ModuleDict(), name):
        raise AdapterError(f"{name!r} cannot name an adapter: use letters, digits, '-', '_' and spaces, as in 'tone-v2'.")
    if name in adapters(model).reports:
        raise AdapterError(f"The model already has an adapter {name!r}: choose another name, or detach(model, {name!r}) first.")


def _known(model: nn.Module, name: str) -> str:
    names = list(adapters(model).reports)
    if name not in names:
        raise AdapterError(f"The model has no adapter {name!r}." + (nearest(name, names) if names else " None is attached."))
    return name
