"""By what a base is known: a hash of some of its weights, which quantization does not change."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_nb.layers.linear4bit import is_quantized

NOTE = "lora_nb_fingerprint"
PRINT, PRINT_IN_HALVES = "base_fingerprint", "base_fingerprint_float16"  # of a file's metadata


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The base's own parameters by name; adapters left out."""
    return {name: p for name, p in model.named_parameters() if ".adapters." not in f".{name}"}


def fingerprint(model: nn.Module) -> str:
    """A hash of what the base is: class, parameter names, shapes, and 64 values of each weight, rounded to bfloat16.

    Adapters do not change it, nor does loading in 16 instead of 32 bits (bfloat16), nor `quantize`; a base of the same shape
    with other weights has another one.
    """
    noted = getattr(getattr(model, "config", model), NOTE, None)
    if isinstance(noted, str) and any(is_quantized(m) for m in model.modules()):
        return noted
    return digest(model, samples(model))


def fingerprint_in_halves(model: nn.Module) -> str | None:
    """The same of values that have gone through float16, which rounds otherwise: None where they are quantized.

    So a base that one loads in float16 and the other in 32 bits is known as one: by this hash, which both have.
    """
    if any(is_quantized(m) for m in model.modules()):
        return None
    return digest(model, {name: sample(p, through=torch.float16) for name, p in base_parameters(model).items()})


def same_base(model: nn.Module, known: Mapping[str, str]) -> bool:
    """Whether a file's metadata speak of this base, or do not say."""
    said = {known[key] for key in (PRINT, PRINT_IN_HALVES) if key in known}
    return not said or not said.isdisjoint({fingerprint(model), fingerprint_in_halves(model)})


def prints(model: nn.Module) -> dict[str, str]:
    """What a file's metadata say of the base."""
    halves = fingerprint_in_halves(model)
    return {PRINT: fingerprint(model), **({PRINT_IN_HALVES: halves} if halves else {})}


@torch.no_grad()
def samples(model: nn.Module) -> dict[str, bytes]:
    """For each parameter its shape and some of its values."""
    return {name: sample(p) for name, p in base_parameters(model).items()}


@torch.no_grad()
def sample(p: Tensor, through: torch.dtype = torch.bfloat16) -> bytes:
    """Shape and 64 values."""
    if p.is_meta:
        return str(tuple(p.shape)).encode()
    flat = p.detach().reshape(-1)
    picks = (torch.arange(64) * (flat.numel() - 1) // 63).to(flat.device)  # whole numbers: the same on every machine
    values = flat[picks].to(through).to(torch.bfloat16).view(torch.int16).cpu() if flat.is_floating_point() else flat[picks].cpu()
    return str(tuple(p.shape)).encode() + values.numpy().tobytes()


def digest(model: nn.Module, found: Mapping[str, bytes]) -> str:
    """The hash of a class and its parameters' samples."""
    whole = hashlib.sha256(type(model).__name__.encode())
    for name in sorted(found):
        whole.update(name.encode() + found[name])
    return whole.hexdigest()[:32]


def remember(model: nn.Module, found: Mapping[str, bytes]) -> None:
    """Note the fingerprint that the base had before it was quantized, where saving takes it along."""
    setattr(getattr(model, "config", model), NOTE, digest(model, found))
