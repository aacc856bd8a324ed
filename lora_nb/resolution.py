"""All that a config means: low-rank updates of modules, and beside them whole modules, biases, expert weights, single tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

from torch import Tensor, nn

from lora_nb.configs import LoraConfig
from lora_nb.errors import TargetError, nearest
from lora_nb.layers.adapted import Part
from lora_nb.layers.linear4bit import is_quantized
from lora_nb.layers.special import ParameterWeights, TokenWeights
from lora_nb.targets import (
    HEADS,
    Target,
    base_modules,
    low_rank_targets,
    named,
    rank_and_scale,
    refuse_idle_patterns,
    refuse_rank,
)

# Where PEFT trains the head of a task whole without being asked.
TASK_HEADS = {"SEQ_CLS": HEADS, "TOKEN_CLS": HEADS, "QUESTION_ANS": ("qa_outputs",)}


def resolve(model: nn.Module, config: LoraConfig) -> list[Target]:
    """Everything that `config` means on `model`, in the model's order, one target a module.

    Raises:
        TargetError: something that fits nothing, or two things that mean the same module.
    """
    modules = dict(base_modules(model))
    config = with_head(config, modules)
    low_rank = low_rank_targets(model, config, modules)
    _refuse_tied_updates(config, low_rank, modules)
    others = [*_experts(config, modules), *_tokens(model, config, modules), *_saved(model, config, modules)]
    taken = {t.name for t in (*low_rank, *others)}
    others += _biases(config, modules, taken)
    targets: dict[str, Target] = {}
    for target in (*low_rank, *others):
        if target.name in targets:
            raise TargetError(
                f"{target.name!r} would be adapted twice, as {targets[target.name].what} and as {target.what}: leave it to one of them."
            )
        targets[target.name] = target
    return [targets[name] for name in modules if name in targets]


def _refuse_tied_updates(config: LoraConfig, low_rank: Sequence[Target], modules: Mapping[str, nn.Module]) -> None:
    """PEFT has one update for both of a tied pair, on the one side transposed; here each layer has its own."""
    for target in low_rank if config.ensure_weight_tying else ():
        partners = _partners(modules, {target.name: target.module})
        if partners:
            raise TargetError(
                f"ensure_weight_tying asks for one update of {target.name!r} and {next(iter(partners))!r}, which share a weight; here "
                f"low-rank updates are each layer's own. Name {target.name.rsplit('.', 1)[-1]!r} in modules_to_save to train it whole and "
                "tied, or leave ensure_weight_tying out."
            )


def refuse_idle_settings(config: LoraConfig, targets: Sequence[Target]) -> None:
    """What a person would want to hear of when attaching, though a file may well have it.

    Raises:
        TargetError: a key of a pattern that means no target, or a rank above the size of a layer.
    """
    ranked = [t for t in targets if t.r]
    refuse_idle_patterns(config, [name for t in ranked for name in t.names()])
    for target in ranked:
        refuse_rank(target)


def with_head(config: LoraConfig, modules: Mapping[str, nn.Module]) -> LoraConfig:
    """A classifier starts at random, so PEFT adds it to `modules_to_save` for the tasks that have one; so do we, unless it is a target."""
    taken = (*config.modules_to_save, *(() if isinstance(config.target_modules, str) else config.target_modules or ()))
    ends = TASK_HEADS.get(config.task_type or "", ())
    heads = [name for name in modules if name.endswith(ends) and "." not in name and name not in taken]  # "pre_classifier", too
    return replace(config, modules_to_save=(*config.modules_to_save, *heads)) if heads else config


def _whole(name: str, module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> Target:
    return Target(name, module, what, _largest(tensors), 0, 1.0, partial(Part, dict(tensors)))


def _largest(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    weight = max(tensors.values(), key=lambda p: p.numel())
    return int(weight.shape[0]) if weight.ndim else 1, int(weight[0].numel()) if weight.ndim > 1 else 1


def _saved(model: nn.Module, config: LoraConfig, modules: Mapping[str, nn.Module]) -> list[Target]:
    """`modules_to_save`: each module of that name, and whatever holds parameters or buffers inside it."""
    chosen: dict[str, nn.Module] = {}
    everything = dict(model.named_modules(remove_duplicate=False))
    for name in config.modules_to_save:
        tops = [path for path in everything if path and named(path, [name]) and ".adapters." not in f".{path}."]
        if not tops:
            known = [path.rsplit(".", 1)[-1] for path in modules if path]
            raise TargetError(f"modules_to_save names {name!r}, which matches no module of the model." + nearest(name, known))
        chosen |= {p: m for p, m in modules.items() if any(p == top or p.startswith(top + ".") for top in tops)}
    if config.ensure_weight_tying:
        chosen |= _partners(modules, chosen)
    few_bits = next((p for p, m in chosen.items() if is_quantized(m)), None)
    if few_bits is not None:
        raise TargetError(f"modules_to_save means {few_bits!r}, which is kept in few bits and cannot train whole: name it in skip_modules.")
    found = [_whole(p, m, _own(m), "whole") for p, m in modules.items() if p in chosen and _own(m)]
    return _tied(found) if config.ensure_weight_tying else found


def _own(module: nn.Module) -> dict[str, Tensor]:
    """Its own parameters and lasting buffers, not those of what it contains."""
    buffers = {n: b for n, b in module._buffers.items() if b is not None and n not in module._non_persistent_buffers_set}
    return {**{n: p for n, p in module._parameters.items() if p is not None}, **buffers}


def _partners(modules: Mapping[str, nn.Module], chosen: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Modules whose weight is one of the chosen modules' own."""
    shared = {id(w) for m in chosen.values() if (w := m._parameters.get("weight")) is not None}
    return {p: m for p, m in modules.items() if p not in chosen and id(m._parameters.get("weight")) in shared}


def _tied(targets: list[Target]) -> list[Target]:
    """Targets whose base is one and the same weight stay so: the later ones share the parameters of the first."""
    first: dict[int, str] = {}
    out = []
    for target in targets:
        weight = target.module._parameters.get("weight")
        owner = first.setdefault(id(weight), target.name) if weight is not None else target.name
        out.append(target if owner == target.name else replace(target, shares=owner))
    return out


def _biases(config: LoraConfig, modules: Mapping[str, nn.Module], taken: set[str]) -> list[Target]:
    """With `bias="all"` those of the layers that have no other adapter; the rest carry theirs already."""
    if config.bias != "all":
        return []
    rest = {p: b for p, m in modules.items() if p not in taken and (b := m._parameters.get("bias")) is not None}
    return [_whole(p, modules[p], {"bias": b}, "bias") for p, b in rest.items()]


def _experts(config: LoraConfig, modules: Mapping[str, nn.Module]) -> list[Target]:
    """`target_parameters`, those of one module together."""
    found: dict[str, list[str]] = {}
    for name in config.target_parameters:
        hits = [(p, n) for p, m in modules.items() for n, w in m._parameters.items() if w is not None and named(f"{p}.{n}", [name])]
        if not hits:
            known = [f"{p.rsplit('.', 1)[-1]}.{n}" for p, m in modules.items() for n in m._parameters]
            raise TargetError(f"target_parameters names {name!r}, which matches no parameter of the model." + nearest(name, known))
        for path, parameter in hits:
            found.setdefault(path, []).append(parameter)
    return [_expert(path, modules[path], [n for n in modules[path]._parameters if n in chosen], config) for path, chosen in found.items()]


def _expert(path: str, module: nn.Module, names: list[str], config: LoraConfig) -> Target:
    chosen: dict[str, nn.Parameter] = {n: cast("nn.Parameter", module._parameters[n]) for n in names}
    for name, p in chosen.items():
        if p.ndim not in {2, 3}:
            raise TargetError(f"target_parameters means {path}.{name} of {p.ndim} dimensions: LoRA needs two, or three with experts.")
    settings = {n: rank_and_scale(config, f"{path}.{n}") for n in names}
    transposed = bool(getattr(module, "is_transposed", False))
    make = partial(ParameterWeights, chosen, settings, transposed=transposed)
    smallest = min(chosen.values(), key=lambda p: min(p.shape[-2:]))
    last, second = int(smallest.shape[-1]), int(smallest.shape[-2])
    shape = (last, second) if transposed and smallest.ndim == 3 else (second, last)
    r, scaling = max(settings.values())
    return Target(path, module, "LoRA", shape, r, scaling, make, inside=tuple(names))


def _tokens(model: nn.Module, config: LoraConfig, modules: Mapping[str, nn.Module]) -> list[Target]:
    """`trainable_token_indices`, with what is tied to the input embedding where that is named, as in PEFT."""
    if config.trainable_token_indices is None:
        return []
    found: dict[str, Sequence[int]] = {}
    for name, indices in _by_module(model, config.trainable_token_indices, modules).items():
        hits = [p for p, m in modules.items() if p and named(p, [name]) and hasattr(m, "weight")]
        if not hits:
            known = [p.rsplit(".", 1)[-1] for p, m in modules.items() if isinstance(m, nn.Embedding)]
            raise TargetError(f"trainable_token_indices names {name!r}, which matches no module of the model." + nearest(name, known))
        found |= dict.fromkeys(hits, indices)
    for path, indices in found.items():
        size = modules[path].weight.shape[0]  # type: ignore[index]
        if max(indices) >= size:
            raise TargetError(f"trainable_token_indices has token {max(indices)}, but {path!r} has {size}: 0 to {size - 1}.")
    embedding = _input_embedding(model)
    together = embedding is None or any(modules[p] is embedding for p in found)
    for path in _partners(modules, {p: modules[p] for p in found}) if together else ():
        found[path] = next(i for p, i in found.items() if modules[p].weight is modules[path].weight)
    plain = [_token_target(p, modules[p], found[p], tied=False) for p in modules if p in found]
    return [
        replace(_token_target(t.name, t.module, found[t.name], tied=True), shares=t.shares) if t.shares else t
        for t in (_same(plain, found) if together else plain)
    ]


def _input_embedding(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_input_embeddings", None)  # of transformers' models
    return cast("nn.Module | None", get()) if get else None


def _same(targets: list[Target], found: Mapping[str, Sequence[int]]) -> list[Target]:
    """Sharing rows needs the same tokens on both sides, too."""
    tied = _tied(targets)
    return [t if t.shares is None or list(found[t.shares]) == list(found[t.name]) else replace(t, shares=None) for t in tied]


def _token_target(path: str, module: nn.Module, indices: Sequence[int], *, tied: bool) -> Target:
    weight: Tensor = module.weight  # type: ignore[assignment]
    make = partial(TokenWeights, weight, tuple(indices), tied=tied)
    return Target(path, module, f"{len(indices)} tokens", (weight.shape[0], weight.shape[1]), 0, 1.0, make)


def _by_module(
    model: nn.Module, tokens: Sequence[int] | Mapping[str, Sequence[int]], modules: Mapping[str, nn.Module]
) -> Mapping[str, Sequence[int]]:
    """Numbers alone mean the input embedding."""
    if isinstance(tokens, Mapping):
        return tokens
    embedding = _input_embedding(model)
    path = next((p for p, m in modules.items() if m is embedding), "embed_tokens")
    return {path: tokens}
