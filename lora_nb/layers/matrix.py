"""The weight of a layer as the matrix of a linear map, (out, fan-in), however the layer stores it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_nb.layers.adapted import AdaptedLayer


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2), a linear layer that stores W transposed, (in, out); told by its looks, so that torch is all we need."""
    module = getattr(module, "base", module) if isinstance(module, AdaptedLayer) else module
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", torch.empty(0)).ndim == 2


def is_transposed(module: nn.Module) -> bool:
    """Whether its weight is stored with the inputs first: Conv1D (in, out) and embeddings (vocabulary, width)."""
    return is_conv1d(module) or isinstance(module, nn.Embedding)


def matrix(module: nn.Module) -> Tensor:
    """The weight as a matrix (out, fan-in): of a convolution (out, in·k…), of an embedding (width, vocabulary)."""
    dense: Any = getattr(module, "weight_dense", None)  # of a layer in four bits
    weight: Any = module.weight
    return as_matrix(module, dense() if dense else weight)


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """`weight`, stored as `module` stores its own, as a matrix (out, fan-in)."""
    return weight.T if is_transposed(module) else weight.flatten(1)


def unmatrix(module: nn.Module, m: Tensor) -> Tensor:
    """From a matrix (out, fan-in) back to the shape in which the base stores its weight."""
    return m.T if is_transposed(module) else m.view_as(module.weight) if m.ndim != module.weight.ndim else m  # type: ignore[arg-type]
