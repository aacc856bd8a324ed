"""What the config in a file means on a model: PEFT writes names there that mean nothing, or more than they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lora_nb.configs import LoraConfig
from lora_nb.targets import HEADS, base_modules, is_left_out, layer_number, named, parts_of


def without_idle(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The same config less what means nothing here; PEFT writes such files, a person would not.

    That are names which `exclude_modules` or `modules_to_save` takes back whole, names to exclude that the model does not have,
    and the head that PEFT adds for a task under every name that it may have. Names in `modules_to_save` that PEFT reads as
    more modules than their name says become the paths of these.
    """
    paths = [path for path, _ in base_modules(model) if path]
    saved = [n for name in config.modules_to_save for n in _spelled(paths, name, _saved_by_peft(paths, name))]
    config = replace(config, modules_to_save=tuple(n for n in saved if n not in HEADS or _saved_by_peft(paths, n)))
    if config.exclude_modules is not None:
        there = [part for part in parts_of(config.exclude_modules) if any(named(path, part) for path in paths)]
        kept = config.exclude_modules if isinstance(config.exclude_modules, str) else tuple(part[0] for part in there)
        config = replace(config, exclude_modules=kept if there else None)
    if isinstance(config.target_modules, str) or not config.target_modules:
        return config
    meant = {name: [path for path in paths if named(path, [name])] for name in config.target_modules}
    idle = {name for name, found in meant.items() if found and all(is_left_out(config, path) for path in found)}
    return replace(config, target_modules=[name for name in config.target_modules if name not in idle])


def without_absent(model: nn.Module, config: LoraConfig) -> tuple[LoraConfig, list[str]]:
    """The same config less the names and layers that this model does not have, and a sentence on each field that lost some.

    A field of which nothing would be left stays as it is.
    """
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    there = {"target_parameters": [n for n, _ in model.named_parameters() if ".adapters." not in f".{n}"]}
    changes: dict[str, Any] = {}
    for field in ("target_modules", "modules_to_save", "target_parameters"):
        names = getattr(config, field)
        if not isinstance(names, str):
            changes[field] = tuple(n for n in names if any(named(path, [n]) for path in there.get(field, paths)))
    if config.layers_to_transform is not None:
        numbers = {layer_number(path, config.layers_pattern) for path in paths if named(path, config.target_modules)}
        changes["layers_to_transform"] = tuple(n for n in config.layers_to_transform if n in numbers)  # type: ignore[union-attr]
    fewer = {f: kept for f, kept in changes.items() if kept and len(kept) < len(getattr(config, f))}
    lost = {f: [n for n in getattr(config, f) if n not in kept] for f, kept in fewer.items()}
    return replace(config, **fewer), [_said(f, gone) for f, gone in lost.items()]


def _said(field: str, gone: list[object]) -> str:
    return f"Its {field} names {', '.join(map(repr, gone[:3]))}{', …' if len(gone) > 3 else ''}, which this model lacks."


def spelled_for_peft(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The same config with `modules_to_save` such that PEFT reads no more out of it than it says."""
    paths = [path for path, _ in base_modules(model) if path]
    saved = [n for name in config.modules_to_save for n in _spelled(paths, name, [p for p in paths if named(p, [name])])]
    return replace(config, modules_to_save=tuple(saved))


def _saved_by_peft(paths: Sequence[str], name: str) -> list[str]:
    """PEFT asks for no dot before a name in `modules_to_save`: "norm" is "input_layernorm", too."""
    return [path for path in paths if path.endswith(name)]


def _spelled(paths: Sequence[str], name: str, meant: list[str]) -> list[str]:
    """The name, where it says what is meant to us and to PEFT, else the paths."""
    return [name] if _saved_by_peft(paths, name) == [p for p in paths if named(p, [name])] else meant
