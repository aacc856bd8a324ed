"""Adapters of what is no layer of its own: expert weights that lie in one parameter, and single tokens of an embedding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_nb.layers.adapted import AdaptedLayer, Forward, Part
from lora_nb.layers.lora_init import start


class ParameterWeights(Part):
    """LoRA on parameters themselves (PEFT's `target_parameters`): W ↦ W + s · B A, before the base's forward reads it.

    For a stack of experts W is (experts, out, in), or (experts, in, out) where the base says `is_transposed`. Each expert e
    has an update of rank r of its own, and as in PEFT all of them lie in two matrices:

        A (experts·r, in), row e·r + k,    B (out, r·experts), column k·experts + e

    Args:
        parameters: name → the base's parameter, of two or three dimensions.
        settings: name → rank of one expert's update, and its factor s.
        transposed: whether inputs come first.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], settings: dict[str, tuple[int, float]], *, transposed: bool) -> None:
        super().__init__()
        self.settings, self.transposed, self.replaces = settings, transposed, True
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name, p in parameters.items():
            experts, fan_out, fan_in = self._sizes(p)
            self.lora_A[name] = nn.Parameter(torch.empty(experts * settings[name][0], fan_in))
            self.lora_B[name] = nn.Parameter(torch.empty(fan_out, settings[name][0] * experts))

    def _sizes(self, p: Tensor) -> tuple[int, int, int]:
        """Experts, outputs, inputs."""
        if p.ndim == 2:
            return 1, p.shape[0], p.shape[1]
        return (p.shape[0], p.shape[2], p.shape[1]) if self.transposed else (p.shape[0], p.shape[1], p.shape[2])

    @torch.no_grad()
    def reset(self, layer: AdaptedLayer, init: bool | str = True) -> None:
        super().reset(layer, init)
        for name, a in self.lora_A.items():
            start(a, self.lora_B[name], init, lambda: torch.empty(0), self.settings[name][1])

    def substitute(self, layer: AdaptedLayer, values: dict[str, Tensor]) -> None:
        super().substitute(layer, values)
        for name in self.lora_A:
            w: Tensor = values.get(name, layer._parameters[name])  # type: ignore[assignment]
            values[name] = w + self.update(name, w).to(w.dtype)

    def update(self, name: str, w: Tensor) -> Tensor:
        """s · B A in the shape of the parameter."""
        experts, (r, scaling) = self._sizes(w)[0], self.settings[name]
        a = self.lora_A[name].view(experts, r, -1)
        b = self.lora_B[name].view(-1, r, experts).permute(2, 0, 1)  # (experts, out, r)
        delta: Tensor = (b @ a) * scaling
        return (delta.mT if self.transposed and w.ndim == 3 else delta).reshape(w.shape)

    def tensors(self) -> dict[str, Tensor]:
        """In PEFT each further parameter of a module lies around the one before, whose keys it makes one level deeper."""
        deeper = {name: ".base_layer" * i for i, name in enumerate(reversed(list(self.lora_A)))}
        return {
            f"{deeper[name]}.lora_{letter}.weight": pair[name]
            for name in self.lora_A
            for letter, pair in (("A", self.lora_A), ("B", self.lora_B))
        }


class TokenWeights(Part):
    """Rows of their own for some tokens (PEFT's `trainable_token_indices`); the rest of the embedding stays as it is.

    The parameter (tokens, width) holds the new rows themselves, not their difference from the old. On an output head that
    is tied to the embedding the same parameter gives the logits of these tokens.

    Args:
        weight: (vocabulary, width), the base's.
        indices: which tokens.
        tied: whether another layer's part owns the rows and saves them.
    """

    token_indices: Tensor

    def __init__(self, weight: Tensor, indices: Sequence[int], *, tied: bool = False) -> None:
        super().__init__()
        self.tied = tied
        self.trainable_tokens_delta = nn.Parameter(torch.empty(len(indices), weight.shape[1], dtype=weight.dtype))
        self.register_buffer("token_indices", torch.tensor(list(indices)), persistent=False)

    @torch.no_grad()
    def reset(self, layer: AdaptedLayer, init: bool | str = True) -> None:
        self.trainable_tokens_delta.copy_(layer.weight[self.token_indices])

    def forward(self, layer: AdaptedLayer, inner: Forward, x: Tensor) -> Tensor:
        """Token ids (…) → (…, width) on an embedding; (…, width) → (…, vocabulary) on a head."""
        y = inner(x)
        change = self.trainable_tokens_delta - layer.weight[self.token_indices]
        if not isinstance(layer, nn.Embedding):
            return y.index_add(-1, self.token_indices, F.linear(x, change).to(y.dtype))  # type: ignore[no-any-return]
        hit = x[..., None] == self.token_indices  # (…, tokens)
        # A product with ones and zeros is a lookup that leaves other tokens at exactly zero.
        return y + (hit.to(change.dtype) @ change) * getattr(layer, "embed_scale", 1.0)  # type: ignore[no-any-return]

    def merge(self, layer: AdaptedLayer, values: dict[str, Tensor]) -> None:
        weight = values["weight"]
        before, own = weight[self.token_indices], layer.weight[self.token_indices].to(weight.dtype)
        new = self.trainable_tokens_delta.to(weight.dtype)
        # Where no adapter before this one has changed a row it is the new one to the bit, else their changes add up.
        values["weight"] = weight.index_copy(0, self.token_indices, torch.where(before == own, new, before + (new - own)))

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.tied else {".token_adapter.trainable_tokens_delta": self.trainable_tokens_delta}
