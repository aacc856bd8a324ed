"""Low-rank adaptation (Hu et al., 2021, arXiv:2106.09685, section 4.1).

A frozen weight W (out, in) gets a trainable update of rank r:

    h = W x + s · B A x,    A (r, in),  B (out, r),    s = α/r  (or α/√r, arXiv:2312.03732)

B starts at zero, so the model starts as it was; and since ∂L/∂A = s·Bᵀ(∂L/∂h)xᵀ, A's gradient is zero in the first step.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_nb.layers.adapted import AdaptedLayer, Forward, Part
from lora_nb.layers.lora_init import start
from lora_nb.layers.lora_linear import is_frozen, is_plain, lora_linear, product
from lora_nb.layers.matrix import is_conv1d, matrix, shape, unmatrix

CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the number of the weight's dimensions


class LoraWeights(Part):
    """One adapter of one linear layer: the update x ↦ s · (B A x + c).

    Args:
        base: the layer that it belongs to.
        r: rank; at most the smaller of the layer's two sizes.
        scaling: the factor s.
        dropout: probability with which an entry of the input is zeroed while training.
        lora_bias: give B a bias c (out,), zero at the start; there is none otherwise.
        whole: parameters of the base to train beside, such as its bias.

    The matrices are fp32 whatever the layer's type, as small updates vanish in 16 bits; under autocast the products
    are computed in its type. The result has the output's type.

    Initialisations that start from W's own directions (PiSSA, OLoRA) would change the base: what they would take from it
    is kept beside A and B instead, as the constants `start_a` and `start_b`, and the update is s · (B A − B₀ A₀). So the
    base stays as it is, bit for bit.
    """

    lora_bias: nn.Parameter | None
    start_a: Tensor | None
    start_b: Tensor | None

    def __init__(
        self,
        base: nn.Module,
        r: int,
        scaling: float,
        *,
        dropout: float = 0.0,
        lora_bias: bool = False,
        whole: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__(whole)
        self.r, self.scaling, self.dropout = r, scaling, dropout
        a, b = self.shapes(base, r)
        self.lora_A, self.lora_B = nn.Parameter(torch.empty(a)), nn.Parameter(torch.empty(b))
        self.register_parameter("lora_bias", nn.Parameter(torch.empty(b[0])) if lora_bias else None)
        self.register_buffer("start_a", None)
        self.register_buffer("start_b", None)

    @staticmethod
    def shapes(base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and of B."""
        fan_out, fan_in = shape(base)
        return (r, fan_in), (fan_out, r)

    @torch.no_grad()
    def reset(self, layer: AdaptedLayer, init: bool | str = True) -> None:
        """As `init_lora_weights` says (see `lora_init.py`); c zero."""
        super().reset(layer, init)
        self.start_a, self.start_b = start(self.lora_A, self.lora_B, init, lambda: matrix(layer), self.scaling)
        if self.lora_bias is not None:
            nn.init.zeros_(self.lora_bias)

    def forward(self, layer: AdaptedLayer, inner: Forward, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        own: dict[str, Any] = self._parameters  # straight to the tables: in generation nn.Module's look-ups cost as much as these products
        a, b = own["lora_A"], own["lora_B"]
        p = self.dropout if self.training else 0.0
        if inner is layer.base and not self.more():
            base: dict[str, Any] = layer._parameters
            if not p and is_plain(inner, x, a):
                return product(x, base["weight"], base["bias"], (a, b, self.scaling))
            if learns_at(inner, x):
                return lora_linear(x, base["weight"], base["bias"], (a, b, self.scaling), p)
        y = inner(x)
        return y + self.update(layer, self.dropped(x)).to(y.dtype)  # type: ignore[no-any-return]

    def beside(self) -> bool:
        """Whether it is more than s · B A x."""
        return (self.dropout > 0 and self.training) or self.more()

    def more(self) -> bool:
        """Whether it is more than s · B A D(x), with dropout D."""
        return self._parameters["lora_bias"] is not None or self._buffers["start_a"] is not None

    def dropped(self, x: Tensor) -> Tensor:
        """The input as the adapter sees it: in its own type, with entries zeroed while it trains."""
        return F.dropout(x.to(self.lora_A.dtype), self.dropout, self.training)

    def update(self, layer: AdaptedLayer, x: Tensor) -> Tensor:
        """s · (B A x + c), in PEFT's order, so that both round alike."""
        h = self.up(layer, self.down(layer, x, self.lora_A), self.lora_B)
        if self.lora_bias is not None:
            h = h + self.lora_bias.view(-1, *[1] * (self.lora_B.ndim - 2))
        if self.start_a is not None and self.start_b is not None:
            h = h - self.up(layer, self.down(layer, x, self.start_a), self.start_b)
        return h * self.scaling

    def down(self, layer: AdaptedLayer, x: Tensor, a: Tensor) -> Tensor:
        return F.linear(x, a)  # (…, r)

    def up(self, layer: AdaptedLayer, h: Tensor, b: Tensor) -> Tensor:
        return F.linear(h, b)  # (…, out)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A as (r, fan-in) and B as (out, r), the constants that an initialisation left among them."""
        a, b = self.lora_A.flatten(1), self.lora_B.flatten(1)
        if self.start_a is not None and self.start_b is not None:
            a, b = torch.cat([a, self.start_a.flatten(1)]), torch.cat([b, -self.start_b.flatten(1)], 1)
        return a, b

    def delta(self) -> Tensor:
        """The update as a matrix, s · B A, (out, fan-in)."""
        a, b = self.factors()
        return (b @ a) * self.scaling

    def merge(self, layer: AdaptedLayer, values: dict[str, Tensor]) -> None:
        super().merge(layer, values)
        weight = values["weight"]
        values["weight"] = (weight + unmatrix(layer, self.delta())).to(weight.dtype)
        if self.lora_bias is not None:
            values["bias"] = with_bias(values, self.lora_bias * self.scaling)

    def tensors(self) -> dict[str, Tensor]:
        whole = {f".base_layer.{name}": p for name, p in self.whole.items()}
        bias = {".lora_B.bias": self.lora_bias} if self.lora_bias is not None else {}
        return {".lora_A.weight": self.lora_A, ".lora_B.weight": self.lora_B, **bias, **whole}

    def saved(self) -> dict[str, Tensor]:
        """As plain LoRA: constants of the start become further rows of A and columns of B."""
        a, b = self.factors()
        wide = {id(self.lora_A): a.reshape(-1, *self.lora_A.shape[1:]), id(self.lora_B): b.reshape(len(b), -1, *self.lora_B.shape[2:])}
        return {key: wide.get(id(p), p) for key, p in self.tensors().items()}


class LoraConvWeights(LoraWeights):
    """One adapter of a convolution: A (r, in, k…) slides as the base's kernel does, B (out, r/groups, 1…) mixes its channels."""

    @staticmethod
    def shapes(base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        kernel: tuple[int, ...] = base.kernel_size  # type: ignore[assignment]
        return (r, int(base.in_channels), *kernel), (int(base.out_channels), r // int(base.groups), *[1] * len(kernel))  # type: ignore[arg-type]

    def down(self, layer: AdaptedLayer, x: Tensor, a: Tensor) -> Tensor:
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
        return CONV[a.ndim](x, a, None, layer.stride, padding, layer.dilation)

    def up(self, layer: AdaptedLayer, h: Tensor, b: Tensor) -> Tensor:
        return CONV[b.ndim](h, b, groups=layer.groups)

    def merge(self, layer: AdaptedLayer, values: dict[str, Tensor]) -> None:
        if layer.groups > 1:
            raise TypeError(f"each of the {layer.groups} groups reads its own channels, the update reads all of them")
        super().merge(layer, values)


class LoraEmbeddingWeights(LoraWeights):
    """One adapter of an embedding: token i gets s · B A[:, i], with A (r, vocabulary) and B (width, r).

    Here A is zero at the start and B normal, as in PEFT: a lookup touches few columns of A, so B is the one that must
    not be zero for them to learn. The padding token, if the base has one, learns nothing, as in the base. A base that
    scales what it looks up (Gemma) scales the update too.
    """

    @torch.no_grad()
    def reset(self, layer: AdaptedLayer, init: bool | str = True) -> None:
        Part.reset(self, layer, init)
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def dropped(self, x: Tensor) -> Tensor:
        """Token ids are not zeroed."""
        return x

    def update(self, layer: AdaptedLayer, x: Tensor) -> Tensor:
        return super().update(layer, x) * cast("float", getattr(layer, "embed_scale", 1.0))

    def down(self, layer: AdaptedLayer, x: Tensor, a: Tensor) -> Tensor:
        return F.embedding(x, a.T, layer.padding_idx)

    def tensors(self) -> dict[str, Tensor]:
        whole = {f".base_layer.{name}": p for name, p in self.whole.items()}
        return {".lora_embedding_A": self.lora_A, ".lora_embedding_B": self.lora_B, **whole}


def learns_at(base: nn.Module, x: Tensor) -> bool:
    """Whether the product's own backward pass serves: it takes dropout, autocast and a base of another type as well."""
    usual = x.device.type in {"cpu", "cuda"} and not torch.compiler.is_compiling()
    return usual and torch.is_grad_enabled() and is_frozen(base) and x.is_floating_point()


def with_bias(values: dict[str, Tensor], more: Tensor) -> Tensor:
    """The base's bias plus `more`."""
    if "bias" not in values:
        raise TypeError("the layer has no bias that could take the adapter's (lora_bias)")
    return (values["bias"] + more).to(values["bias"].dtype)


def weights_class(module: nn.Module) -> type[LoraWeights] | None:
    """Which of the classes above adapts `module`; None where LoRA has no form for it."""
    if isinstance(module, nn.Embedding):
        return LoraEmbeddingWeights
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and not getattr(module, "transposed", False):
        return LoraConvWeights
    return LoraWeights if isinstance(module, nn.Linear) or is_conv1d(module) else None
