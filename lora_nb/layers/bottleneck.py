"""Bottleneck adapters (Houlsby et al., 2019, arXiv:1902.00751, section 2.1).

A sublayer of a frozen transformer, attention or MLP, adds its output x to the residual stream R. An adapter is a small
network of its own that changes what is added:

    x ↦ x + s · Δ(h),    Δ(h) = U f(D h + d) + u,    D (m, width),  U (width, m),  m = width / reduction factor

The kinds differ in the h that they look at:

    "output"    h = x                    Houlsby et al.: after attention and after the MLP
    "sum"       h = x + R                Pfeiffer et al., 2020, arXiv:2005.00247: after the MLP, on the stream itself
    "residual"  h = R                    He et al., 2021, arXiv:2110.04366: beside the MLP, which reads R as well

Where the sum goes through a norm (BERT: LN(x + R)), "sum" reads h = LN(x + R); "normed" then changes the norm's output,
as x ↦ x + s · Δ(x) behind it. With U and u zero at the start the model starts as it was, whichever the kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_nb.errors import TargetError
from lora_nb.layers.adapted import AdaptedLayer, Forward, Part

Reading = Literal["output", "sum", "residual", "normed"]
INITS = ("mam_adapter", "bert", "houlsby")
# AdapterHub's names, which are those of transformers.
NON_LINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
    "leakyrelu": F.leaky_relu,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "linear": lambda x: x,
}


class Tap(Part):
    """Lets R be seen: keeps the first input of a module until the adapters that read it have taken it.

    Args:
        readers: how many adapters take it in one forward; with the last one it is let go, and its memory with it.
    """

    def __init__(self, readers: int = 1) -> None:
        super().__init__()
        self.readers, self.left = readers, 0
        self.seen: Tensor | None = None

    def forward(self, layer: AdaptedLayer, inner: Forward, *args: Any, **kwargs: Any) -> Any:
        self.seen, self.left = args[0] if args else next(iter(kwargs.values())), self.readers
        return inner(*args, **kwargs)

    def take(self) -> Tensor:
        """R, (batch, seq, width).

        Raises:
            TargetError: the module was not called since R was last taken.
        """
        seen, self.left = self.seen, self.left - 1
        if self.left <= 0:
            self.seen = None
        if seen is None:
            raise TargetError("The module that a Sublayer `reads` was not called before the one whose `output` it names.")
        return seen


class Bottleneck(Part):
    """The adapter of one sublayer: y = x + s · Δ(h), with the input of Δ and its output through norms of their own if asked.

    Args:
        width: size of the residual stream.
        size: m, the size of the bottleneck.
        non_linearity: f.
        scaling: s, a number; `"learned"`, or `"channel"` for one a channel, is trained from 1.
        dropout: probability with which an entry of s · Δ(h) is zeroed while training.
        ln_before, ln_after: the norms.

    Its parameters are fp32 whatever the model's type, as small updates vanish in 16 bits. The result has x's type.
    """

    tap: Tap | None = None
    norm: nn.Module | None = None
    alone: bool = False
    device: torch.device | None = None

    def __init__(
        self,
        width: int,
        size: int,
        *,
        non_linearity: str = "relu",
        scaling: float | str = 1.0,
        dropout: float = 0.0,
        ln_before: bool = False,
        ln_after: bool = False,
    ) -> None:
        super().__init__()
        self.r, self.act, self.dropout = size, NON_LINEARITIES[non_linearity], dropout
        self.norm_before = nn.LayerNorm(width) if ln_before else None
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)
        self.norm_after = nn.LayerNorm(width) if ln_after else None
        self.scale = nn.Parameter(torch.ones(width if scaling == "channel" else 1)) if isinstance(scaling, str) else None
        self.scaling = 1.0 if isinstance(scaling, str) else float(scaling)

    def placed(self, tap: Tap | None, norm: nn.Module | None, *, alone: bool, device: torch.device | None) -> Bottleneck:
        """Look at R through `tap`, at R `alone`, or else at the sum and what `norm` makes of it; on the block's `device`."""
        # Tap and norm have places of their own in the module tree, so here they are beside it.
        self.__dict__.update(tap=tap, norm=norm, alone=alone, device=device)
        return self

    @torch.no_grad()
    def reset(self, layer: AdaptedLayer, init: bool | str = True) -> None:
        """`"mam_adapter"`: D uniform in ±1/√width, U zero. `"bert"`, `"houlsby"`: both normal. Biases are zero."""
        self.to(self.device)
        if init == "bert":
            _each(self, partial(nn.init.normal_, std=0.02))
        elif init == "houlsby":
            _each(self, partial(nn.init.trunc_normal_, std=0.01, a=-0.02, b=0.02))
        else:
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def forward(self, layer: AdaptedLayer, inner: Forward, *args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        if isinstance(out, tuple):
            return (self.adapt(out[0]), *out[1:])
        return self.adapt(out)

    def adapt(self, x: Tensor) -> Tensor:
        """(…, width) → (…, width)."""
        return x + self.update(self.look(x).to(self.down.weight.dtype)).to(x.dtype)

    def look(self, x: Tensor) -> Tensor:
        """h."""
        if self.tap is None:
            return x
        if self.alone:
            return self.tap.take()
        h = x + self.tap.take()
        return h if self.norm is None else self.norm(h)

    def update(self, h: Tensor) -> Tensor:
        """s · Δ(h)."""
        if self.norm_before is not None:
            h = self.norm_before(h)
        h = self.up(self.act(self.down(h))) * (self.scaling if self.scale is None else self.scale)
        h = F.dropout(h, self.dropout, self.training)
        return h if self.norm_after is None else self.norm_after(h)

    def merge(self, layer: AdaptedLayer, values: dict[str, Tensor]) -> None:
        raise TypeError("a bottleneck is not linear: no weights of the base do the same")

    def tensors(self) -> dict[str, Tensor]:
        """By the ends of AdapterHub's keys. A norm before has two of them, as it stands in their list of layers, too."""
        before, down = self.norm_before, f".adapter_down.{0 if self.norm_before is None else 1}"
        modules = {".adapter_norm_before": before, ".adapter_down.0": before, down: self.down, ".adapter_up": self.up}
        modules[".adapter_norm_after"] = self.norm_after
        named: dict[str, Tensor] = {f"{key}.{n}": p for key, m in modules.items() if m is not None for n, p in m.named_parameters()}
        return named if self.scale is None else {".scaling": self.scale, **named}


def _each(part: Bottleneck, fill: Callable[[Tensor], Tensor]) -> None:
    fill(part.down.weight)
    fill(part.up.weight)
