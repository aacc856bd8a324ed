"""Which modules a config means: PEFT's rules (peft 0.21, `tuners_utils.py`), but nothing that matches nothing passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import regex
import torch
from torch import Tensor, nn

from lora_nb.configs import LoraConfig
from lora_nb.errors import TargetError, nearest
from lora_nb.layers.adapted import AdaptedLayer, Part
from lora_nb.layers.dora import dora_class
from lora_nb.layers.lora import LoraConvWeights, LoraWeights, weights_class
from lora_nb.layers.matrix import is_conv1d, matrix

V = TypeVar("V")

# Heads of classification models, by transformers' convention: PEFT leaves these out of "all-linear" for SEQ_CLS.
HEADS = ("classifier", "score")
PATIENCE = 1.0  # seconds for one comparison: a pattern out of a file may be made to take for ever


@dataclass(frozen=True)
class Target:
    """One module that gets an adapter.

    `what` is the method in a word, `shape` (out, in) of the weight as a linear map, `make` gives the adapter's part with
    values not yet set, `shares` is the path of an earlier target whose parameters it shares, and `inside` has the names of
    the module's parameters, where these and not the module are meant.
    """

    name: str
    module: nn.Module
    what: str
    shape: tuple[int, int]
    r: int
    scaling: float
    make: Callable[[], Part]
    shares: str | None = None
    inside: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """What the patterns of a config are held against."""
        return [f"{self.name}.{n}" for n in self.inside] or [self.name]

    @property
    def parameters(self) -> int:
        """How many it adds."""
        return 0 if self.shares else sum(p.numel() for p in self.blank().parameters())

    def blank(self) -> Part:
        """The part without memory for its values, to ask it for names and shapes."""
        with torch.device("meta"):
            return self.make()


def low_rank_targets(model: nn.Module, config: LoraConfig, modules: Mapping[str, nn.Module]) -> list[Target]:
    """The modules that get a low-rank update, in the model's order.

    Raises:
        TargetError: a name, pattern, layer number or rank that fits nothing, or a module that LoRA cannot adapt.
    """
    wanted, left_out = config.target_modules, partial(is_left_out, config)
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        wanted = [name for name in all_linear(model, modules, config.task_type) if not left_out(name)]
    candidates = [name for name in modules if name and not left_out(name)]
    found = [name for name in candidates if named(name, wanted) and layer_wanted(name, config)]
    if wanted != ():
        _refuse_idle_names(config, wanted or (), candidates, found, modules)
    return [_target(name, modules[name], config, modules) for name in found]


def is_left_out(config: LoraConfig, path: str) -> bool:
    """By `exclude_modules`, or because the whole module is trained anyhow."""
    return named(path, config.exclude_modules) or any(f".{m}." in f".{path}." for m in config.modules_to_save)


def base_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """`named_modules`, without the insides of adapters that are already attached."""
    inside = tuple(f"{name}.adapters" for name, module in model.named_modules() if isinstance(module, AdaptedLayer))
    for name, module in model.named_modules():
        if not any(name == prefix or name.startswith(prefix + ".") for prefix in inside):
            yield name, module


def all_linear(model: nn.Module, modules: Mapping[str, nn.Module], task_type: str | None) -> list[str]:
    """Every linear layer but the output head, as full paths."""
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    heads = [head] if head is not None else []
    if head is None and task_type == "SEQ_CLS":
        heads = [getattr(model, name) for name in HEADS if hasattr(model, name)][:1]
    linear = [name for name, m in modules.items() if isinstance(m, nn.Linear) or is_conv1d(m)]
    return [name for name in linear if not any(modules[name] is h for h in heads) and not _never_called(name, modules)]


def named(path: str, names: str | Sequence[str] | None) -> bool:
    """A string is a pattern for the whole path; a list has paths or ends of paths."""
    if names is None:
        return False
    if isinstance(names, str):
        return matches(names, path)
    return any(path == name or path.endswith("." + name) for name in names)


def matches(pattern: str, path: str) -> bool:
    """Whether a regular expression fits all of `path`.

    Raises:
        TargetError: it takes for ever, as nested repetitions may.
    """
    return _match(regex.fullmatch, pattern, path) is not None


def _match(how: Callable[..., regex.Match[str] | None], pattern: str, path: str) -> regex.Match[str] | None:
    """`how(pattern, path)`, but for no longer than `PATIENCE`."""
    try:
        return how(pattern, path, timeout=PATIENCE)
    except (TimeoutError, RecursionError, regex.error) as error:
        why = f"takes longer than {PATIENCE:g} s" if isinstance(error, TimeoutError) else f"cannot be used ({error})"
        raise TargetError(f"The pattern {pattern[:80]!r} {why} on {path!r}: write it without nested repeats and brackets.") from error


def layer_number(path: str, patterns: Sequence[str] | None) -> int | None:
    """The first number that stands alone in the path and has something after it, or the one behind `layers_pattern`."""
    expressions = [rf"(?:^|.*?\.){p}\.(?P<number>\d+)\." for p in patterns] if patterns else [r".*?\.[^.]*\.(?P<number>\d+)\."]
    for expression in expressions:
        match = _match(regex.match, expression, path)
        if match:
            return int(match["number"]) if match["number"] else None  # `h|layers` may match without one
    return None


def layer_wanted(path: str, config: LoraConfig) -> bool:
    """Whether it lies in one of `layers_to_transform`."""
    layers: Sequence[int] | None = config.layers_to_transform  # type: ignore[assignment]
    # PEFT asks no layer number of a module that is named by its whole path.
    return layers is None or path in (config.target_modules or ()) or layer_number(path, config.layers_pattern) in layers


def pattern_value(patterns: Mapping[str, V], path: str, default: V) -> V:
    """The value of the first key that matches the path or its end, else the default."""
    return next((value for key, value in patterns.items() if matches(rf"(.*\.)?({key})", path)), default)


def rank_and_scale(config: LoraConfig, name: str) -> tuple[int, float]:
    """r and s of one target."""
    r = pattern_value(config.rank_pattern, name, config.r)
    return r, config.scaling(r, pattern_value(config.alpha_pattern, name, config.lora_alpha))


def _target(name: str, module: nn.Module, config: LoraConfig, modules: Mapping[str, nn.Module]) -> Target:
    kind = weights_class(module)
    if kind is None or _never_called(name, modules):
        why = f"a {type(module).__name__}" if kind is None else "whose weight nn.MultiheadAttention reads without calling it"
        raise TargetError(
            f"target_modules names {name!r}, {why}. LoRA here adapts Linear, Conv1D (transformers), Conv1d, Conv2d, Conv3d and "
            "Embedding; name the layers inside it, or leave it out with exclude_modules."
        )
    r, scaling = rank_and_scale(config, name)
    fan_out, fan_in = shape_of(module)
    _refuse_for_kind(kind, name, module, config, r)
    bias = module._parameters.get("bias")
    whole: dict[str, Tensor] = {"bias": bias} if config.bias != "none" and bias is not None else {}
    chosen = dora_class(kind) if config.use_dora else kind
    make = partial(chosen, module, r, scaling, dropout=config.lora_dropout, lora_bias=config.lora_bias, whole=whole)
    return Target(name, module, "DoRA" if config.use_dora else "LoRA", (fan_out, fan_in), r, scaling, make)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, fan-in) of the weight as a linear map, also where its numbers are packed."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.out_channels, module.in_channels * int(torch.tensor(module.kernel_size).prod())
    fan_out, fan_in = matrix(module).shape
    return fan_out, fan_in


def refuse_rank(target: Target) -> None:
    """No update of a matrix has a rank above its smaller side."""
    fan_out, fan_in = target.shape
    if target.r > min(target.shape):
        raise TargetError(
            f"rank {target.r} was asked for {target.name!r}, which is {fan_in} × {fan_out}: its update cannot have a rank above "
            f"{min(target.shape)}. Lower r, or give this module its own with rank_pattern={{{target.name.rsplit('.', 1)[-1]!r}: …}}."
        )


def _refuse_for_kind(kind: type[LoraWeights], name: str, module: nn.Module, config: LoraConfig, r: int) -> None:
    """What the maths of one kind of layer has no room for; PEFT refuses the same, or computes something else in silence."""
    groups = int(getattr(module, "groups", 1))
    if issubclass(kind, LoraConvWeights) and groups > 1:
        if r % groups:
            raise TargetError(f"rank {r} was asked for {name!r}, a convolution of {groups} groups: r must be a multiple of {groups}.")
        if config.use_dora or config.init_lora_weights not in (True, "gaussian", "orthogonal"):
            raise TargetError(
                f"{name!r} is a convolution of {groups} groups: its update reads channels that its weight does not, so it has neither "
                "DoRA's norm nor PiSSA's start. Leave it out with exclude_modules."
            )
    if isinstance(module, nn.Embedding) and (config.lora_bias or config.init_lora_weights not in (True, "gaussian")):
        setting = "lora_bias" if config.lora_bias else f"init_lora_weights={config.init_lora_weights!r}"
        raise TargetError(f"{name!r} is an embedding, where {setting} has no meaning: leave it out with exclude_modules.")


def _never_called(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """torch's attention takes the weight of its `out_proj` and multiplies by itself; an adapter there would be idle."""
    parent = modules.get(name.rpartition(".")[0])
    return isinstance(parent, nn.MultiheadAttention)


def _refuse_idle_names(
    config: LoraConfig, wanted: str | Sequence[str], candidates: list[str], found: list[str], modules: Mapping[str, nn.Module]
) -> None:
    """Each name and each layer number must have found something."""
    for part in parts_of(config.exclude_modules or ()):
        if not any(named(path, part) for path in modules if path):
            raise TargetError(_unmatched("exclude_modules", part, modules))
    for part in parts_of(wanted):
        if not any(named(path, part) for path in modules if path):
            raise TargetError(_unmatched("target_modules", part, modules))
        if not any(named(path, part) for path in candidates):
            raise TargetError(
                f"target_modules={part!r} means only what exclude_modules={config.exclude_modules!r} or "
                f"modules_to_save={list(config.modules_to_save)!r} leave out: drop it from one of them."
            )
    _refuse_idle_layers(config, wanted, candidates)
    for part in parts_of(wanted):
        if not any(named(path, part) for path in found):
            raise TargetError(
                f"target_modules={part!r} means nothing within layers_to_transform={config.layers_to_transform!r}: drop it, or name "
                "the module by its whole path, which asks no layer number."
            )
    if not found:
        raise TargetError(
            f"target_modules={config.target_modules!r} with exclude_modules={config.exclude_modules!r} means no module of this model: "
            "exclude less, or name other modules."
        )


def parts_of(names: str | Sequence[str]) -> list[str | list[str]]:
    """A pattern by itself, or each of the names by itself."""
    return [names] if isinstance(names, str) else [[name] for name in names]


def _unmatched(field: str, part: str | list[str], modules: Mapping[str, nn.Module]) -> str:
    adaptable = [path for path, m in modules.items() if path and weights_class(m) is not None]
    ends = {path.rsplit(".", 1)[-1] for path in adaptable}
    if isinstance(part, str):
        return (
            f"{field}={part!r} matches no module: a string is a regular expression for a module's whole path, such as "
            f"{adaptable[0] if adaptable else '…'!r}. Use a list for names: {field}=[{part!r}]." + nearest(part, ends)
        )
    return f"{field} names {part[0]!r}, which matches no module of the model." + nearest(part[0], ends)


def _refuse_idle_layers(config: LoraConfig, wanted: str | Sequence[str], candidates: list[str]) -> None:
    layers: Sequence[int] = config.layers_to_transform or ()  # type: ignore[assignment]
    numbers = {layer_number(path, config.layers_pattern) for path in candidates if named(path, wanted)} - {None}
    for layer in layers:
        if layer not in numbers:
            there = f"layers {min(numbers)} to {max(numbers)}" if numbers else "no numbered layers"  # type: ignore[type-var]
            raise TargetError(f"layers_to_transform names layer {layer}, but among the modules targeted there are {there}.")


def refuse_idle_patterns(config: LoraConfig, found: Sequence[str]) -> None:
    """Each key of `rank_pattern` and `alpha_pattern` must have found something."""
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if not any(matches(rf"(.*\.)?({key})", path) for path in found):
                raise TargetError(
                    f"{field} has the key {key!r}, which matches none of the {len(found)} targeted modules."
                    + nearest(key, {path.rsplit(".", 1)[-1] for path in found})
                )


def short_names(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The shortest list of names that means exactly these modules: ends of paths where they suffice, else full paths."""
    ends = sorted({name.rsplit(".", 1)[-1] for name in names})
    meant = [path for path, _ in base_modules(model) if path and named(path, ends)]
    return ends if sorted(meant) == sorted(names) else sorted(names)
