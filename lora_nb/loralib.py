"""State dicts of microsoft/LoRA's `loralib`: what the first adapters were saved as.

They hold A and B under the path of each layer (`lora.lora_state_dict(model)`) and, with `bias=`, biases. Nothing says α, so
it has to be given; the rank is that of the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_nb.adapter_files import fault
from lora_nb.attach import attach, detach, parts
from lora_nb.attach_report import AttachReport
from lora_nb.configs import LoraConfig
from lora_nb.errors import AdapterFileError, nearest
from lora_nb.layers.lora import LoraWeights, weights_class
from lora_nb.targets import base_modules, shape_of

ENDS = (".lora_A", ".lora_B", ".bias")


def load_loralib(model: nn.Module, source: Mapping[str, Tensor] | str | Path, *, lora_alpha: float, name: str = "default") -> AttachReport:
    """Attach an adapter that loralib trained, and make it the active one.

    Args:
        source: the state dict, or a safetensors file of it. A pickle is not opened: pass what
            `torch.load(path, weights_only=True)` gives.
        lora_alpha: the α that it was trained with; each layer's scale is α over its rank.

    Raises:
        AdapterFileError: no loralib state dict, layers that the model lacks, other shapes, values that are not finite, or a
            layer that loralib lays out in a way of its own (convolutions, MergedLinear). The model is then untouched.
    """
    tensors = _read(source)
    ranks = _ranks(model, tensors)
    biased = {key.removesuffix(".bias") for key in tensors if key.endswith(".bias")}
    bias = "none" if not biased else "lora_only" if biased <= ranks.keys() else "all"
    r = next(iter(ranks.values()))
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        target_modules=list(ranks),
        rank_pattern={"^" + re.escape(path): rank for path, rank in ranks.items() if rank != r},
        bias=bias,  # type: ignore[arg-type] # one of the three
    )
    report = attach(model, config, name)
    try:
        _fill(model, name, tensors)
    except BaseException:
        detach(model, name)
        raise
    return report


def _read(source: Mapping[str, Tensor] | str | Path) -> dict[str, Tensor]:
    if isinstance(source, Mapping):
        tensors = dict(source)
    elif Path(source).suffix != ".safetensors":
        raise AdapterFileError(
            f"{str(source)!r} is no safetensors file, and a pickle can run code when it is opened: if you trust it, pass "
            "torch.load(path, weights_only=True) instead of the path."
        )
    else:
        try:
            tensors = load_file(source)
        except (OSError, SafetensorError) as error:
            raise AdapterFileError(f"{str(source)!r} cannot be read ({error}): check the path, or copy the file again.") from error
    strange = next((key for key in tensors if not key.endswith(ENDS)), None)
    if strange is not None or not any(key.endswith(".lora_A") for key in tensors):
        found = f"has {strange!r}" if strange is not None else "has no lora_A"
        raise AdapterFileError(f"The state dict {found}: it is not what loralib's lora_state_dict(model) gives.")
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or (wrong := fault(tensor)):
            raise AdapterFileError(f"{key!r} {wrong if isinstance(tensor, Tensor) else 'is no tensor'}: save the adapter again.")
    return tensors


def _ranks(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Rank of each layer; everything is held against the model first."""
    modules = dict(base_modules(model))
    ranks = {}
    for key in tensors:
        path, _, kind = key.rpartition(".")
        if path not in modules:
            ends = [p for p in modules if p]
            raise AdapterFileError(f"The state dict has {key!r}, but the model has no such layer." + nearest(path, ends))
        if kind == "lora_A":
            ranks[path] = _rank(path, modules[path], tensors)
    for key in tensors:
        path = key.rpartition(".")[0]
        own = modules[path]._parameters.get("bias")
        if key.endswith(".bias") and (own is None or own.shape != tensors[key].shape):
            raise AdapterFileError(f"{key!r} does not fit the model, whose layer has {'no bias' if own is None else tuple(own.shape)}.")
        if key.endswith(".lora_B") and path not in ranks:
            raise AdapterFileError(f"{key!r} has no lora_A beside it: the state dict is incomplete.")
    return ranks


def _rank(path: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> int:
    a, b = tensors[f"{path}.lora_A"], tensors.get(f"{path}.lora_B")
    if b is None:
        raise AdapterFileError(f"{path}.lora_A has no lora_B beside it: the state dict is incomplete.")
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise AdapterFileError(
            f"{path} is a convolution, whose update loralib builds otherwise (rank r·k): it cannot be read as LoRA here."
        )
    if weights_class(module) is None:
        raise AdapterFileError(f"{path} is a {type(module).__name__}, which LoRA does not adapt here.")
    fan_out, fan_in = shape_of(module)
    if a.ndim == b.ndim == 2 and len(a) != b.shape[1] and a.shape[1] == fan_in:
        raise AdapterFileError(f"{path} has A {tuple(a.shape)} and B {tuple(b.shape)}: a MergedLinear, which loralib lays out by head.")
    if (tuple(a.shape), tuple(b.shape)) != ((len(a), fan_in), (fan_out, len(a))):
        raise AdapterFileError(
            f"{path} has A {tuple(a.shape)} and B {tuple(b.shape)}, but the model's layer is {fan_in} × {fan_out}: A must be (r, {fan_in}) "
            f"and B ({fan_out}, r). Load the base that it was trained on."
        )
    return len(a)


@torch.no_grad()
def _fill(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    for path, part in parts(model, name).items():
        if isinstance(part, LoraWeights):
            part.lora_A.copy_(tensors[f"{path}.lora_A"])
            part.lora_B.copy_(tensors[f"{path}.lora_B"])
        if f"{path}.bias" in tensors:
            part.whole["bias"].copy_(tensors[f"{path}.bias"])
