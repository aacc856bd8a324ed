"""How a change of weights changes what modules give, on inputs that they get from a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_nb.layers.adapted import AdaptedLayer


@torch.no_grad()
def seen(model: nn.Module, chosen: Sequence[AdaptedLayer], sample: Any) -> dict[AdaptedLayer, tuple[Tensor, Tensor]]:
    """What each layer gets and gives with the adapters acting, on the sample."""
    inputs = _inputs(model) if sample is None else sample
    if inputs is None:
        return {}
    there: dict[AdaptedLayer, tuple[Tensor, Tensor]] = {}

    def note(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if len(args) == 1 and isinstance(output, Tensor):
            there[cast("AdaptedLayer", layer)] = (args[0], output)

    modes = {m: m.training for m in model.modules()}
    hooks = [layer.register_forward_hook(note) for layer in chosen]
    try:
        model.eval()
        model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for m, training in modes.items():
            m.training = training
    return there


def _inputs(model: nn.Module) -> dict[str, Tensor] | None:
    """64 tokens spread over a language model's vocabulary."""
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    if not size:
        return None
    device = next(model.parameters()).device
    ids = (torch.arange(64, device=device) * 7919 % size)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else inputs


@torch.no_grad()
def change(module: nn.Module, x: Tensor, y: Tensor) -> float:
    """‖y′ − y‖ / ‖y‖."""
    mode, module.training = module.training, False
    difference = module(x).float() - y.float()
    module.training = mode
    return float(difference.norm() / y.float().norm().clamp_min(torch.finfo(torch.float32).tiny))
