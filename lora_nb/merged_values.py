"""What a layer's weights become when the adapters that act in it are merged into them; nothing is written here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from lora_nb.errors import AdapterError
from lora_nb.layers.adapted import AdaptedLayer, Part
from lora_nb.layers.linear4bit import dense_weight, is_quantized

Values = dict[str, Tensor]


@torch.no_grad()
def values(path: str, layer: AdaptedLayer, originals: Mapping[str, Tensor] | None) -> tuple[Values, Values]:
    """Before and after, by name, in fp32 and not yet rounded: of what changes.

    Args:
        originals: the base's weights before they were quantized, by name, to take instead of what is left of them.

    Raises:
        AdapterError: an adapter that no weight can express, no original weight, or a result that is not finite.
    """
    before = _before(path, layer, originals)
    after = dict(before)
    for name in layer.active:
        try:
            cast("Part", layer.adapters[name]).merge(layer, after)
        except TypeError as error:
            raise AdapterError(f"{name!r} cannot be merged into {path!r}: {error}. Nothing was changed.") from error
    changed = {n: v for n, v in after.items() if v is not before.get(n)}
    for n, v in changed.items():
        if not torch.isfinite(v.to(kept_dtype(layer, n))).all():
            names = ", ".join(layer.active)
            raise AdapterError(f"{path}.{n} would hold NaN or infinity with {names!r}: nothing was changed. Train it again.")
    return before, changed


def _before(path: str, layer: AdaptedLayer, originals: Mapping[str, Tensor] | None) -> Values:
    own = {n: p.detach() for n, p in layer._parameters.items() if p is not None}
    if is_quantized(layer.base):
        own["weight"] = dense_weight(layer.base)
        if originals is not None:
            own["weight"] = _original(originals, path, own["weight"], transposed=getattr(layer.base, "was_conv1d", False))
    return {n: p.float() if p.is_floating_point() else p for n, p in own.items()}


def _original(originals: Mapping[str, Tensor], path: str, dense: Tensor, *, transposed: bool) -> Tensor:
    """(out, in); `transposed` says that the layer was transformers' Conv1D, which stores (in, out)."""
    found = originals.get(f"{path}.weight")
    found = found.T if found is not None and transposed else found
    if found is None or found.shape != dense.shape:
        have = "none" if found is None else f"one of {tuple(found.shape)}"
        raise AdapterError(f"original has {have} for {path}.weight, {tuple(dense.shape)}: give the base that was quantized.")
    return found.detach().to(dense.device)


def kept_dtype(layer: AdaptedLayer, name: str) -> torch.dtype:
    """The type in which the layer keeps the tensor of that name."""
    kept = layer._parameters.get(name, layer._buffers.get(name))
    like = kept if kept is not None else next(p for p in layer._parameters.values() if p is not None)
    return like.dtype


def survived(before: Tensor | None, wanted: Tensor | None, arrived: Tensor | None) -> float:
    """The share of a weight's update that arrived: ⟨what was added, what should have been⟩ / ‖what should have been‖²."""
    if before is None or wanted is None or arrived is None or wanted.shape != before.shape:
        return 1.0
    update = wanted - before
    size = float(update.square().sum())
    return float(((arrived.float() - before) * update).sum()) / size if size else 1.0
