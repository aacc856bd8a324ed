"""Bottleneck adapters in AdapterHub's files: `adapter_config.json` and `adapter.safetensors`.

Its keys have the path of its own modules in the model and the adapter's name in the middle:
`bert.encoder.layer.0.output.adapters.tone.adapter_down.0.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_nb.adapter_files import tensors_of
from lora_nb.bases import base_name
from lora_nb.bottleneck_targets import key_places
from lora_nb.configs import BottleneckConfig, to_adapterhub, to_blocks
from lora_nb.errors import AdapterFileError
from lora_nb.version import __version__

HEADS = ("model_head.safetensors", "pytorch_model_head.bin")


def hub_starts(model: nn.Module, config: BottleneckConfig, name: str) -> dict[str, str]:
    """Path of an adapted module → what its keys start with."""
    return {path: f"{key}.adapters.{name}" for path, key in key_places(model, config).items()}


def hub_content(model: nn.Module, config: BottleneckConfig, name: str) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    settings = getattr(model, "config", None)
    return {
        "config": to_adapterhub(config),
        "hidden_size": getattr(settings, "hidden_size", None),
        "model_class": type(model).__name__,
        "model_name": base_name(model) or "",
        "model_type": getattr(settings, "model_type", None),
        "name": name,
        "version": f"lora_nb.{__version__}",
    }


def hub_metadata(config: BottleneckConfig) -> dict[str, str]:
    """What AdapterHub's files have no place for: blocks that a user described."""
    return {"blocks": to_blocks(config.blocks)} if config.blocks else {}  # type: ignore[arg-type] # a tuple since it was made


def fitted(model: nn.Module, tensors: Mapping[str, Tensor], expected: Mapping[str, object]) -> dict[str, Tensor]:
    """The tensors under this model's keys: a file may come from the same base with a head before it, or without."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    if tensors.keys() & expected.keys():
        return dict(tensors)
    longer = {prefix + key: t for key, t in tensors.items()}
    return longer if longer.keys() & expected.keys() else {key.removeprefix(prefix): t for key, t in tensors.items()}


def hub_problems(model: nn.Module, folder: Path, content: Mapping[str, Any]) -> list[str]:
    """What a lenient reader may overlook in a file by AdapterHub: another kind of model, a head of the adapter's own."""
    out = []
    own = getattr(getattr(model, "config", None), "model_type", None)
    if content.get("model_type") not in (None, own):
        out.append(f"It was trained on a model of type {content['model_type']!r}, this one is {own!r}.")
    out += [
        f"It comes with a trained head ({file}), which is not the model's and is not loaded."
        for file in HEADS
        if (folder / file).exists() and not _is_models(model, folder / file)
    ]
    return out


def _is_models(model: nn.Module, file: Path) -> bool:
    """Whether a head is the model's own: AdapterHub writes that, too, unless it is told not to."""
    if file.suffix == ".bin":
        return False
    try:
        head, own = tensors_of(file)[0], model.state_dict()
    except AdapterFileError:
        return False
    return all(key in own and own[key].shape == t.shape and torch.equal(own[key].cpu(), t) for key, t in head.items())
