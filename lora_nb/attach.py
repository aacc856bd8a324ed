"""Putting adapters on a model, in place, and taking them off again.

What is attached is written on the model itself (`model.lora_nb_adapters`) and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from lora_nb.configs import LoraConfig
from lora_nb.errors import AdapterError, nearest
from lora_nb.layers.lora import LoraLayer, LoraWeights, layer_class
from lora_nb.render import html_table, text_table
from lora_nb.targets import Target, resolve

STATE = "lora_nb_adapters"


@dataclass(frozen=True)
class MatchedModule:
    """One adapted module: shape (out, in) of its weight as a linear map, rank, scale, parameters added."""

    shape: tuple[int, int]
    rank: int
    scale: float
    parameters: int


@dataclass(frozen=True)
class AttachReport:
    """What `attach` did: the modules that matched, and how much there is to train."""

    name: str
    config: LoraConfig
    matched: dict[str, MatchedModule]
    trainable: int
    total: int

    def _title(self) -> str:
        share = 100 * self.trainable / self.total
        return f"adapter {self.name!r}: {len(self.matched)} modules, {self.trainable:,} of {self.total:,} parameters train ({share:.2f} %)"

    def _rows(self) -> list[tuple[str | int | float, ...]]:
        return [(n, f"{m.shape[0]} × {m.shape[1]}", m.rank, m.scale, m.parameters) for n, m in self.matched.items()]

    def __repr__(self) -> str:
        return self._title() + "\n" + text_table(["module", "out × in", "rank", "scale", "parameters"], self._rows())

    def _repr_html_(self) -> str:
        table = html_table(["module", "out × in", "rank", "scale", "parameters"], self._rows())
        return f"<details open><summary><b>{self._title()}</b></summary>{table}</details>"


@dataclass
class Adapters:
    """The adapters of one model: name → report of attaching, which act, and the base's own `requires_grad` flags."""

    reports: dict[str, AttachReport] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    trainable_before: dict[str, bool] = field(default_factory=dict)


def adapters(model: nn.Module) -> Adapters:
    """The record of what is attached; empty for a model without adapters."""
    return getattr(model, STATE, None) or Adapters()


def attach(model: nn.Module, config: LoraConfig, name: str = "default") -> AttachReport:
    """Add an adapter in place, freeze the base, and make the new adapter the active one.

    The modules that `config` names are swapped for layers that share their parameters; the output does not change
    until something is trained. Adapters that are already there stay, inactive: `set_active` takes several.

    Raises:
        TargetError: the config names something that the model lacks.
        AdapterError: the name is taken or not usable as a name.
    """
    _check_name(model, name)
    targets = resolve(model, config)
    state = adapters(model)
    if not state.reports:
        state.trainable_before = {n: p.requires_grad for n, p in model.named_parameters()}
        setattr(model, STATE, state)
    for p in model.parameters():
        p.requires_grad_(False)  # noqa: FBT003 - its name differs between torch's stubs and torch
    for target in targets:
        _adapt(model, target).add(name, target.r, target.scaling, config.lora_dropout, config.init_lora_weights)
    state.reports[name] = _report(model, name, config, targets)
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
                layer.base.train(layer.training)  # unseen by model.eval() while it was out of the tree
                model.set_submodule(path, layer.base)
        del state.reports[gone]
    state.active = tuple(n for n in state.active if n in state.reports)
    if not state.reports and hasattr(model, STATE):
        for n, p in model.named_parameters():
            p.requires_grad_(state.trainable_before.get(n, True))
        delattr(model, STATE)


def set_active(model: nn.Module, names: str | Sequence[str]) -> None:
    """Let exactly these adapters act and train; several add up. An empty list leaves the base alone.

    Raises:
        AdapterError: no adapter of that name.
    """
    wanted = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    for name in wanted:
        _known(model, name)
    _switch(model, wanted)
    for _, layer in layers(model):
        for name, weights in layer.adapters.items():
            weights.requires_grad_(name in wanted)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the `with` block the model is the base alone; afterwards the same adapters act as before."""
    with acting(model, ()):
        yield model


@contextmanager
def acting(model: nn.Module, names: Sequence[str]) -> Iterator[nn.Module]:
    """Within the `with` block these adapters act, without a change to what trains."""
    for name in names:
        _known(model, name)
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
    return {
        f"{path}.adapters.{n}.{key}": p
        for path, layer in layers(model)
        for n in wanted
        if n in layer.adapters
        for key, p in layer.adapters[n].named_parameters()
    }


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


def layers(model: nn.Module, name: str | None = None) -> list[tuple[str, LoraLayer]]:
    """The adapted layers by path; with a name, those that carry that adapter."""
    return [(path, m) for path, m in model.named_modules() if isinstance(m, LoraLayer) and (name is None or name in m.adapters)]


def weights(model: nn.Module, name: str) -> Mapping[str, LoraWeights]:
    """The weights of one adapter by the path of the module that they belong to."""
    return {path: layer.adapters[name] for path, layer in layers(model, _known(model, name))}  # type: ignore[misc]


def _switch(model: nn.Module, wanted: tuple[str, ...]) -> None:
    state = adapters(model)
    state.active = wanted
    for _, layer in layers(model):
        layer.active = tuple(n for n in wanted if n in layer.adapters)


def _adapt(model: nn.Module, target: Target) -> LoraLayer:
    module = target.module
    if isinstance(module, LoraLayer):
        return module
    kind = layer_class(module)
    assert kind is not None  # resolve() has seen to it
    layer = kind(module)
    model.set_submodule(target.name, layer)
    return layer


def _report(model: nn.Module, name: str, config: LoraConfig, targets: list[Target]) -> AttachReport:
    matched = {t.name: MatchedModule((t.out_features, t.in_features), t.r, t.scaling, t.parameters) for t in targets}
    total = sum(p.numel() for p in model.parameters())
    return AttachReport(name, config, matched, sum(t.parameters for t in targets), total)


def _check_name(model: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w\- ]*", name) or hasattr(nn.ModuleDict(), name):
        raise AdapterError(f"{name!r} cannot name an adapter: use letters, digits, '-', '_' and spaces, as in 'tone-v2'.")
    if name in adapters(model).reports:
        raise AdapterError(f"The model already has an adapter {name!r}: choose another name, or detach(model, {name!r}) first.")


def _known(model: nn.Module, name: str) -> str:
    names = list(adapters(model).reports)
    if name not in names:
        raise AdapterError(f"The model has no adapter {name!r}." + (nearest(name, names) if names else " None is attached."))
    return name
