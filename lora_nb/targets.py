"""Which modules a config means: PEFT's rules (peft 0.21, `tuners_utils.py`), but nothing that matches nothing passes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import nn

from lora_nb.configs import LoraConfig
from lora_nb.errors import TargetError, nearest
from lora_nb.layers.lora import LoraEmbedding, LoraLayer, is_conv1d, layer_class

V = TypeVar("V")

# Heads of classification models, by transformers' convention: PEFT leaves these out of "all-linear" for SEQ_CLS.
HEADS = ("classifier", "score")


@dataclass(frozen=True)
class Target:
    """One module that gets an adapter: its path, sizes, rank and scale."""

    name: str
    module: nn.Module
    in_features: int
    out_features: int
    r: int
    scaling: float

    @property
    def parameters(self) -> int:
        return self.r * (self.in_features + self.out_features)


def resolve(model: nn.Module, config: LoraConfig) -> list[Target]:
    """The modules that `config` means on `model`, in the model's order.

    Raises:
        TargetError: a name, pattern, layer number or rank that fits nothing, or a module that LoRA cannot adapt.
    """
    modules = dict(base_modules(model))
    wanted = config.target_modules
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        wanted = [name for name in all_linear(model, modules, config.task_type) if not _named(name, config.exclude_modules)]
    candidates = [name for name in modules if name and not _named(name, config.exclude_modules)]
    found = [name for name in candidates if _named(name, wanted) and _layer_wanted(name, config)]
    _refuse_idle_names(config, wanted, candidates, found, modules)
    targets = [_target(name, modules[name], config) for name in found]
    _refuse_idle_patterns(config, found)
    return targets


def without_excluded(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The same config less the names that `exclude_modules` takes back whole: PEFT writes such files, a person would not."""
    if isinstance(config.target_modules, str) or config.exclude_modules is None:
        return config
    paths = [path for path, _ in base_modules(model)]
    meant = {name: [path for path in paths if _named(path, [name])] for name in config.target_modules}
    idle = {name for name, found in meant.items() if found and all(_named(path, config.exclude_modules) for path in found)}
    return replace(config, target_modules=[name for name in config.target_modules if name not in idle])


def base_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """`named_modules`, without the insides of adapters that are already attached."""
    inside = tuple(f"{name}.adapters" for name, module in model.named_modules() if isinstance(module, LoraLayer))
    for name, module in model.named_modules():
        if not any(name == prefix or name.startswith(prefix + ".") for prefix in inside):
            yield name, module


def all_linear(model: nn.Module, modules: dict[str, nn.Module], task_type: str | None) -> list[str]:
    """Every linear layer but the output head, as full paths."""
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    heads = [head] if head is not None else []
    if head is None and task_type == "SEQ_CLS":
        heads = [getattr(model, name) for name in HEADS if hasattr(model, name)][:1]
    return [name for name, m in modules.items() if (isinstance(m, nn.Linear) or is_linear(m)) and not any(m is h for h in heads)]


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer under another name (Conv1D), adapted or not."""
    return is_conv1d(module.base if isinstance(module, LoraLayer) else module)


def _named(path: str, names: str | Sequence[str] | None) -> bool:
    """A string is a pattern for the whole path; a list has paths or ends of paths."""
    if names is None:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith("." + name) for name in names)


def layer_number(path: str, patterns: Sequence[str] | None) -> int | None:
    """The first number that stands alone in the path and has something after it, or the one behind `layers_pattern`."""
    expressions = [rf"(?:^|.*?\.){p}\.(?P<number>\d+)\." for p in patterns] if patterns else [r".*?\.[^.]*\.(?P<number>\d+)\."]
    for expression in expressions:
        match = re.match(expression, path)
        if match:
            return int(match["number"]) if match["number"] else None  # `h|layers` may match without one
    return None


def _layer_wanted(path: str, config: LoraConfig) -> bool:
    layers: Sequence[int] | None = config.layers_to_transform  # type: ignore[assignment]
    # PEFT asks no layer number of a module that is named by its whole path.
    return layers is None or path in config.target_modules or layer_number(path, config.layers_pattern) in layers


def pattern_value(patterns: Mapping[str, V], path: str, default: V) -> V:
    """The value of the first key that matches the path or its end, else the default."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def _target(name: str, module: nn.Module, config: LoraConfig) -> Target:
    kind = layer_class(module)
    if kind is None:
        raise TargetError(
            f"target_modules names {name!r}, a {type(module).__name__}. LoRA here adapts Linear, Conv1D (transformers) and "
            "Embedding; name the layers inside it, or leave it out with exclude_modules."
        )
    base = module.base if isinstance(module, LoraLayer) else module
    fan_in, fan_out = _features(base, kind)
    r = pattern_value(config.rank_pattern, name, config.r)
    if r > min(fan_in, fan_out):
        raise TargetError(
            f"rank {r} was asked for {name!r}, which is {fan_in} × {fan_out}: its update cannot have a rank above {min(fan_in, fan_out)}. "
            f"Lower r, or give this module its own with rank_pattern={{{name.rsplit('.', 1)[-1]!r}: …}}."
        )
    return Target(name, module, fan_in, fan_out, r, config.scaling(r, pattern_value(config.alpha_pattern, name, config.lora_alpha)))


def _features(base: nn.Module, kind: type[LoraLayer]) -> tuple[int, int]:
    if issubclass(kind, LoraEmbedding):
        return int(base.num_embeddings), int(base.embedding_dim)  # type: ignore[arg-type]
    if is_conv1d(base):
        return base.weight.shape[0], base.weight.shape[1]  # type: ignore[index,return-value]
    return int(base.in_features), int(base.out_features)  # type: ignore[arg-type]


def _refuse_idle_names(
    config: LoraConfig, wanted: str | Sequence[str], candidates: list[str], found: list[str], modules: dict[str, nn.Module]
) -> None:
    """Each name and each layer number must have found something."""
    parts: list[str | list[str]] = [wanted] if isinstance(wanted, str) else [[name] for name in wanted]
    for part in parts:
        if not any(_named(path, part) for path in modules if path):
            raise TargetError(_unmatched(part, modules))
        if not any(_named(path, part) for path in candidates):
            raise TargetError(
                f"target_modules={part!r} means only what exclude_modules={config.exclude_modules!r} leaves out: drop it from one of them."
            )
    _refuse_idle_layers(config, wanted, candidates)
    for part in parts:
        if not any(_named(path, part) for path in found):
            raise TargetError(
                f"target_modules={part!r} means nothing within layers_to_transform={config.layers_to_transform!r}: drop it, or name "
                "the module by its whole path, which asks no layer number."
            )
    if not found:
        raise TargetError(
            f"target_modules={config.target_modules!r} with exclude_modules={config.exclude_modules!r} means no module of this model: "
            "exclude less, or name other modules."
        )


def _unmatched(part: str | list[str], modules: dict[str, nn.Module]) -> str:
    adaptable = [path for path, m in modules.items() if path and layer_class(m) is not None]
    ends = {path.rsplit(".", 1)[-1] for path in adaptable}
    if isinstance(part, str):
        return (
            f"target_modules={part!r} matches no module: a string is a regular expression for a module's whole path, such as "
            f"{adaptable[0] if adaptable else '…'!r}. Use a list for names: target_modules=[{part!r}]." + nearest(part, ends)
        )
    return f"target_modules names {part[0]!r}, which matches no module of the model." + nearest(part[0], ends)


def _refuse_idle_layers(config: LoraConfig, wanted: str | Sequence[str], candidates: list[str]) -> None:
    layers: Sequence[int] = config.layers_to_transform or ()  # type: ignore[assignment]
    numbers = {layer_number(path, config.layers_pattern) for path in candidates if _named(path, wanted)} - {None}
    for layer in layers:
        if layer not in numbers:
            there = f"layers {min(numbers)} to {max(numbers)}" if numbers else "no numbered layers"  # type: ignore[type-var]
            raise TargetError(f"layers_to_transform names layer {layer}, but among the modules targeted there are {there}.")


def _refuse_idle_patterns(config: LoraConfig, found: list[str]) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if not any(re.match(rf"(.*\.)?({key})$", path) for path in found):
                raise TargetError(
                    f"{field} has the key {key!r}, which matches none of the {len(found)} targeted modules."
                    + nearest(key, {path.rsplit(".", 1)[-1] for path in found})
                )


def short_names(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The shortest list of names that means exactly these modules: ends of paths where they suffice, else full paths."""
    ends = sorted({name.rsplit(".", 1)[-1] for name in names})
    meant = [path for path, _ in base_modules(model) if path and _named(path, ends)]
    return ends if sorted(meant) == sorted(names) else sorted(names)
