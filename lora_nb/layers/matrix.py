"""The weight of a layer as the matrix of a linear map, (out, fan-in), however the layer stores it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_nb.layers.adapted import AdaptedLayer
from lora_nb.layers.linear4bit import dense_weight, is_quantized


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2), a linear layer that stores W transposed, (in, out); told by its looks, so that torch is all we need."""
    module = getattr(module, "base", module) if isinstance(module, AdaptedLayer) else module
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", torch.empty(0)).ndim == 2


def is_transposed(module: nn.Module) -> bool:
    """Whether its weight is stored with the inputs first: Conv1D (in, out) and embeddings (vocabulary, width)."""
    return is_conv1d(module) or isinstance(module, nn.Embedding)


def matrix(module: nn.Module) -> Tensor:
    """The weight as a matrix (out, fan-in): of a convolution (out, in·k…), of an embedding (width, vocabulary)."""
    return as_matrix(module, dense_weight(module))


def shape(module: nn.Module) -> tuple[int, int]:
    """(out, fan-in), without unpacking a weight of few bits for it."""
    if is_quantized(module):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    fan_out, fan_in = matrix(module).shape
    return fan_out, fan_in


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """`weight`, stored as `module` stores its own, as a matrix (out, fan-in)."""
    return weight.T if is_transposed(module) else weight.flatten(1)


def unmatrix(module: nn.Module, m: Tensor) -> Tensor:
    """From a matrix (out, fan-in) back to the shape in which the base stores its weight."""
    return m.T if is_transposed(module) else m.view_as(module.weight) if m.ndim != module.weight.ndim else m  # type: ignore[arg-type]
