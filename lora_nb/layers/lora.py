"""Low-rank adaptation (Hu et al., 2021, arXiv:2106.09685, section 4.1).

A frozen weight W (out, in) gets a trainable update of rank r:

    h = W x + s · B A x,    A (r, in),  B (out, r),    s = α/r  (or α/√r, arXiv:2312.03732)

B starts at zero, so the model starts as it was; and since ∂L/∂A = s·Bᵀ(∂L/∂h)xᵀ, A's gradient is zero in the first step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoraWeights(nn.Module):
    """One adapter of one layer: the update x ↦ s · B A x.

    Args:
        in_features, out_features: sizes of the layer that it belongs to.
        r: rank; at most the smaller of the two sizes.
        scaling: the factor s.
        dropout: probability with which an entry of the input is zeroed while training.

    Both matrices are fp32 whatever the layer's type, as small updates vanish in 16 bits; under autocast the products
    are computed in its type. The result has the input's type.
    """

    def __init__(self, in_features: int, out_features: int, r: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.r, self.scaling, self.dropout = r, scaling, dropout
        self.lora_A = nn.Parameter(torch.empty(r, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, r))

    def reset(self, init: bool | str = True) -> None:
        """A uniform in ±1/√in (`True`, as PEFT) or normal with deviation 1/r (`"gaussian"`); B zero."""
        if init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        h = F.dropout(x.to(self.lora_A.dtype), self.dropout, self.training)
        h = F.linear(h, self.lora_A)  # (…, r)
        return (F.linear(h, self.lora_B) * self.scaling).to(x.dtype)  # in PEFT's order, so that both round alike

    def delta(self) -> Tensor:
        """The update as a matrix, s · B A, (out, in)."""
        return (self.lora_B @ self.lora_A) * self.scaling


class LoraEmbeddingWeights(LoraWeights):
    """One adapter of an embedding: token i gets s · B A[:, i], with A (r, vocabulary) and B (width, r).

    Here A is zero at the start and B normal, as in PEFT: a lookup touches few columns of A, so B is the one that must
    not be zero for them to learn. The padding token, if the base has one, learns nothing, as in the base.
    """

    padding_idx: int | None = None

    def reset(self, init: bool | str = True) -> None:
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def forward(self, ids: Tensor) -> Tensor:
        """(…) token ids → (…, width), in fp32."""
        return F.linear(F.embedding(ids, self.lora_A.T, self.padding_idx), self.lora_B) * self.scaling


class LoraLayer(nn.Module):
    """A layer with adapters: the sum of the base's output and of each active adapter's update.

    It stands where the base stood and shares the base's own table of parameters, so names in the state dict, tied
    weights, `.to()` and whatever else reaches for `weight` find what they found before. The base itself is kept beside
    the module tree, unregistered, and is put back by `detach`.
    """

    weights_class: type[LoraWeights] = LoraWeights
    base: nn.Module
    adapters: nn.ModuleDict
    active: tuple[str, ...]

    def __init__(self, base: nn.Module) -> None:
        nn.Module.__init__(self)
        self.__dict__["base"] = base
        self._parameters, self._buffers = base._parameters, base._buffers
        self._non_persistent_buffers_set = base._non_persistent_buffers_set
        self.training = base.training
        self.adapters = nn.ModuleDict().train(base.training)
        self.active = ()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["base"], name)  # in_features, padding_idx, quant_state, …

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for name in self.active:
            y = y + self.adapters[name](x).to(y.dtype)
        return y  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return self.base.extra_repr()

    def features(self) -> tuple[int, int]:
        """(in, out) of the base."""
        raise TypeError(f"{type(self).__name__} does not say its sizes")

    def add(self, name: str, r: int, scaling: float, dropout: float, init: bool | str) -> LoraWeights:
        """A new adapter on the base's device, not yet active."""
        new = self.weights_class(*self.features(), r=r, scaling=scaling, dropout=dropout)
        new.reset(init)
        self.adapters[name] = new.to(self.weight.device).train(self.training)  # no dropout on a model in eval mode
        return new


class LoraLinear(LoraLayer, nn.Linear):
    """`nn.Linear`, W (out, in), with adapters: h = W x + b + Σ s · B A x."""

    def features(self) -> tuple[int, int]:
        return self.in_features, self.out_features


class LoraConv1D(LoraLayer):
    """transformers' `Conv1D` (GPT-2): a linear layer that stores W transposed, (in, out). A and B are as for a linear."""

    def features(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]


class LoraEmbedding(LoraLayer, nn.Embedding):
    """`nn.Embedding`, (vocabulary, width), with adapters. A base that scales what it looks up (Gemma) scales the update too."""

    weights_class = LoraEmbeddingWeights

    def forward(self, x: Tensor) -> Tensor:
        y, scale = self.base(x), getattr(self, "embed_scale", 1.0)
        for name in self.active:
            y = y + (self.adapters[name](x) * scale).to(y.dtype)
        return y  # type: ignore[no-any-return]

    def add(self, name: str, r: int, scaling: float, dropout: float, init: bool | str) -> LoraWeights:
        new = super().add(name, r, scaling, dropout, init)
        new.padding_idx = self.padding_idx  # type: ignore[assignment]
        return new

    def features(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, told by its looks so that torch is all this file needs."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", torch.empty(0)).ndim == 2


def layer_class(module: nn.Module) -> type[LoraLayer] | None:
    """Which of the classes above adapts `module`; None where LoRA has no form for it."""
    if isinstance(module, LoraLayer):
        return type(module)
    if is_conv1d(module):
        return LoraConv1D
    if isinstance(module, nn.Linear):
        return LoraLinear
    return LoraEmbedding if isinstance(module, nn.Embedding) else None
