"""Weight-decomposed low-rank adaptation (Liu et al., 2024, arXiv:2402.09353, equation 5).

The adapted weight is split into a length for each output and a direction. LoRA turns the direction, the magnitude m (out,)
is learnt by itself:

    h = (m / n) ⊙ (W x + s · B A x) + b,    n = ‖W + s · B A‖, row by row

m starts as ‖W‖, so the model starts as it was. As in section 4.3 of the paper no gradient goes through n.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_nb.layers.adapted import AdaptedLayer, Forward, Part
from lora_nb.layers.lora import LoraConvWeights, LoraEmbeddingWeights, LoraWeights, with_bias
from lora_nb.layers.lora_linear import is_plain, lora_linear
from lora_nb.layers.matrix import as_matrix, matrix, unmatrix

CANCELLED = 8.0  # from this m / n on most of W has been taken away: what is left is small beside W x and s · B A x
CHUNK = 1 << 18  # weights in one block of the norm: what is formed of W + s·BA stays in the cache


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """‖W + s · B A‖ of each row, (out,), in fp32, from W (out, in), A (r, in), B (out, r).

    W + s·BA is formed, some rows at a time. The shorter ‖W‖² + 2s⟨W, BA⟩ + s²‖BA‖² needs as many multiplications and loses
    its digits where BA cancels W.
    """
    rows = max(1, CHUNK // weight.shape[1])
    blocks = zip(torch.split(weight, rows), torch.split(b, rows), strict=True)
    a = a.float()
    return torch.cat([torch.linalg.vector_norm(torch.addmm(w.float(), v.float(), a, alpha=scaling), dim=1) for w, v in blocks])


class DoraWeights(LoraWeights):
    """One DoRA adapter of a linear layer (or transformers' Conv1D): A, B and the magnitude m.

    n is computed once for each value of A, B and W, so that generating text does not pay for it at every token. (A value
    written through `.data` goes unnoticed, by this as by autograd.)
    """

    def __init__(self, base: nn.Module, r: int, scaling: float, **settings: Any) -> None:
        super().__init__(base, r, scaling, **settings)
        self.magnitude = nn.Parameter(torch.empty(self.magnitude_shape()))
        self._norm: tuple[object, Tensor, bool] | None = None

    def magnitude_shape(self) -> tuple[int, ...]:
        """(out,), or for a convolution (1, out, 1…), as its output is laid out."""
        return (len(self.lora_B),) if self.lora_B.ndim == 2 else (1, len(self.lora_B), *self.lora_B.shape[2:])

    @torch.no_grad()
    def reset(self, layer: AdaptedLayer, init: bool | str = True) -> None:
        super().reset(layer, init)
        self._norm = None
        self.magnitude.copy_(row_norms(matrix(layer), *self.factors(), self.scaling).view_as(self.magnitude))

    def forward(self, layer: AdaptedLayer, inner: Forward, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        own: dict[str, Any] = self._parameters  # straight to the tables, as in LoRA
        if inner is layer.base and not self.beside() and is_plain(inner, x, own["lora_A"]):
            base: dict[str, Any] = layer._parameters
            gain, low_rank = self.gain(layer), (own["lora_A"], own["lora_B"], self.scaling)
            z = self.exact(layer, x) if self.cancels() else lora_linear(x, base["weight"], None, low_rank)
            return z * gain if base["bias"] is None else torch.addcmul(base["bias"], z, gain)
        y, bias, gain, seen = inner(x), self._bias(layer, layer.value("bias")), self.gain(layer), self.dropped(x)
        if self.dropout and self.training:  # W then reads the input with its gaps, as B A does
            of_base = self._bias(layer, layer._parameters.get("bias"))
            plain = layer.base(seen.to(x.dtype)) - (0 if of_base is None else of_base)
            return y + ((gain - 1) * plain + gain * self.update(layer, seen)).to(y.dtype)  # type: ignore[no-any-return]
        plain = y if bias is None else y - bias
        h = gain * (plain + self.update(layer, seen))
        return (h if bias is None else h + bias).to(y.dtype)  # type: ignore[no-any-return]

    def _bias(self, layer: AdaptedLayer, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias.view(self.magnitude.shape)

    def gain(self, layer: AdaptedLayer) -> Tensor:
        """m / n."""
        m: Any = self._parameters["magnitude"]
        n = self.norm(layer)
        return m / (n if m.ndim == 1 else n.view_as(m))  # type: ignore[no-any-return]

    def norm(self, layer: AdaptedLayer) -> Tensor:
        """n, (out,)."""
        own: dict[str, Any] = self._parameters
        a, b, w = own["lora_A"], own["lora_B"], layer._parameters.get("weight")
        w = layer.weight if w is None else w
        if torch.compiler.is_compiling() or a.is_inference() or b.is_inference() or w.is_inference():  # neither says when a value changes
            return row_norms(matrix(layer), *self.factors(), self.scaling)
        state = (a._version, a.data_ptr(), b._version, b.data_ptr(), w._version, w.data_ptr())
        if self._norm is None or self._norm[0] != state:
            n = row_norms(matrix(layer), *self.factors(), self.scaling)
            self._norm = (state, n, bool((self.magnitude.detach().abs().flatten() > CANCELLED * n).any()))
        return self._norm[1]

    def cancels(self) -> bool:
        """Whether s · B A took most of some row of W away when n was last computed."""
        return self._norm is not None and self._norm[2]

    def exact(self, layer: AdaptedLayer, x: Tensor) -> Tensor:
        """(W + s · B A) x with the sum first: the two products would cancel each other, and their rounding errors would stay."""
        return F.linear(x, torch.addmm(layer.weight, self.lora_B, self.lora_A, alpha=self.scaling))

    def merge(self, layer: AdaptedLayer, values: dict[str, Tensor]) -> None:
        Part.merge(self, layer, values)
        gain, own = self.gain(layer).flatten(), values["weight"]
        values["weight"] = unmatrix(layer, gain[:, None] * (as_matrix(layer, own).float() + self.delta())).to(own.dtype)
        bias = layer.value("bias")
        beside = 0 if bias is None else values["bias"] - bias  # of adapters before this one
        if self.lora_bias is not None:
            beside = beside + self.lora_bias * self.scaling
        if isinstance(beside, Tensor):
            values["bias"] = with_bias({} if bias is None else {"bias": bias}, gain * beside)

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), ".lora_magnitude_vector": self.magnitude}


class DoraConvWeights(DoraWeights, LoraConvWeights):
    """One DoRA adapter of a convolution without groups: a row of W is all that one output channel reads."""


class DoraEmbeddingWeights(DoraWeights, LoraEmbeddingWeights):
    """One DoRA adapter of an embedding: a row of W, taken as (width, vocabulary), is one coordinate of all tokens."""


def dora_class(kind: type[LoraWeights]) -> type[DoraWeights]:
    """The DoRA form of a LoRA class."""
    return {LoraConvWeights: DoraConvWeights, LoraEmbeddingWeights: DoraEmbeddingWeights}.get(kind, DoraWeights)
