"""Settings of bottleneck adapters, and the names by which a user says where they go in a model that lora_nb does not know."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lora_nb.configs.checks import checked, is_choice, is_count, is_number, require
from lora_nb.errors import ConfigError
from lora_nb.layers.bottleneck import INITS, NON_LINEARITIES, Reading

SWITCHES = (
    "mh_adapter",
    "output_adapter",
    "cross_adapter",
    "original_ln_before",
    "original_ln_after",
    "residual_before_ln",
    "ln_before",
    "ln_after",
    "is_parallel",
)


@checked
@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """One sublayer of a block (attention or MLP), by paths inside the block.

    Args:
        output: the module whose output x is added to the residual stream; of a tuple the first entry is meant.
        reads: the module that is called with the stream R itself as its first argument before that, such as the norm
            in front of the sublayer. Adapters that look at R need it: parallel ones and those of Pfeiffer's kind.
        norm: the norm that the sum R + x goes through (BERT's kind of block); None where it goes through none.
        key: where AdapterHub's files keep the adapter, if not in `attention_adapters`, `output_adapters` or
            `cross_attention_adapters`.

    Raises:
        ConfigError: an unknown field or a value that is not allowed.
    """

    output: str
    reads: str | None = None
    norm: str | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        for name in ("output", "reads", "norm", "key"):
            value = getattr(self, name)
            is_path = isinstance(value, str) and re.fullmatch(r"\w+(\.\w+)*", value) is not None
            require(is_path or (value is None and name != "output"), self, name, "a module's path such as 'self_attn.o_proj'")


@checked
@dataclass(frozen=True, kw_only=True)
class Block:
    """The repeated blocks of a model: `Block(layers="blocks", mlp=Sublayer(output="ffn", reads="norm2"))`.

    Args:
        layers: path, or end of the path, of the list that holds the blocks.
        attention, mlp, cross_attention: where `mh_adapter`, `output_adapter` and `cross_adapter` go.
        width: size of the residual stream; None for the model's `config.hidden_size`.

    Raises:
        ConfigError: an unknown field or a value that is not allowed.
    """

    layers: str
    attention: Sublayer | None = None
    mlp: Sublayer | None = None
    cross_attention: Sublayer | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        require(isinstance(self.layers, str) and bool(self.layers), self, "layers", "the path of the list of blocks, as in 'model.layers'")
        for name in ("attention", "mlp", "cross_attention"):
            require(isinstance(getattr(self, name), Sublayer | None), self, name, "a Sublayer, as in Sublayer(output='ffn')")
        require(any((self.attention, self.mlp, self.cross_attention)), self, "mlp", "given, or attention, or cross_attention")
        require(self.width is None or is_count(self.width), self, "width", "None or a whole number of at least 1")

    def sublayers(self) -> dict[str, Sublayer | None]:
        """By the name of the setting that asks for an adapter there."""
        return {"mh_adapter": self.attention, "cross_adapter": self.cross_attention, "output_adapter": self.mlp}


@checked
@dataclass(frozen=True, kw_only=True)
class BottleneckConfig:
    """Small networks between the sublayers of a frozen model: x ↦ x + s · U f(D h), see `layers/bottleneck.py`.

    Fields are named as in AdapterHub's `adapters` and mean the same, and the three class methods have its defaults but for
    one: `init_weights` is `"mam_adapter"`, with which a new adapter changes nothing, whichever the kind.

    Args:
        mh_adapter, output_adapter, cross_adapter: adapters after attention, after the MLP, after cross-attention.
        reduction_factor: width of the model over width of the bottleneck; a dict gives numbered layers, as in
            `{"1": 8, "default": 16}`, theirs.
        non_linearity: f, such as `"relu"`, `"swish"`, `"gelu"`.
        original_ln_before, original_ln_after, residual_before_ln: where the adapter stands towards the block's own sum and
            norm. Before them: False, True, either. On their result: True, True, True. After them: True, False, False. What
            else they can say would change the model before anything is trained, so it is refused.
        ln_before, ln_after: a norm of the adapter's own on its input, on its output.
        is_parallel: read the sublayer's input R instead of its output.
        scaling: s, a number; `"learned"`, or `"channel"` for one a channel, starts at 1.
        init_weights: `"mam_adapter"` (U zero), `"bert"` (normal, deviation 0.02) or `"houlsby"` (normal, deviation 0.01, cut at
            two deviations); with the last two the model does not start quite as it was.
        dropout: probability with which an entry of the adapter's output is zeroed while training.
        leave_out: numbers of layers without adapters; a decoder is counted on from its encoder.
        blocks: where the adapters go, for a model that lora_nb does not know.

    Raises:
        ConfigError: an unknown field or a value that is not allowed.
    """

    mh_adapter: bool = False
    output_adapter: bool = True
    cross_adapter: bool = False
    reduction_factor: float | Mapping[str, float] = 16
    non_linearity: str = "relu"
    original_ln_before: bool = True
    original_ln_after: bool = True
    residual_before_ln: bool = True
    ln_before: bool = False
    ln_after: bool = False
    is_parallel: bool = False
    scaling: float | Literal["learned", "channel"] = 1.0
    init_weights: Literal["mam_adapter", "bert", "houlsby"] = "mam_adapter"
    dropout: float = 0.0
    leave_out: Sequence[int] = ()
    blocks: Block | Sequence[Block] = ()

    @classmethod
    def pfeiffer(cls, reduction_factor: float | Mapping[str, float] = 16, **settings: Any) -> BottleneckConfig:
        """One adapter a block, on the residual stream behind the MLP (Pfeiffer et al., 2020, arXiv:2005.00247); `seq_bn`."""
        return cls(reduction_factor=reduction_factor, **settings)

    @classmethod
    def houlsby(cls, reduction_factor: float | Mapping[str, float] = 16, **settings: Any) -> BottleneckConfig:
        """Two adapters a block, on the outputs of attention and MLP (Houlsby et al., 2019, arXiv:1902.00751); `double_seq_bn`."""
        kind: dict[str, Any] = {"mh_adapter": True, "original_ln_before": False, "non_linearity": "swish"}
        return cls(reduction_factor=reduction_factor, **(kind | settings))

    @classmethod
    def parallel(cls, reduction_factor: float | Mapping[str, float] = 2, **settings: Any) -> BottleneckConfig:
        """One adapter a block, beside the MLP, with a scale of 4 (He et al., 2021, arXiv:2110.04366); `par_bn`."""
        kind: dict[str, Any] = {"is_parallel": True, "original_ln_before": False, "scaling": 4.0}
        return cls(reduction_factor=reduction_factor, **(kind | settings))

    def __post_init__(self) -> None:
        for name in SWITCHES:
            require(isinstance(getattr(self, name), bool), self, name, "True or False")
        require(
            self.mh_adapter or self.output_adapter or self.cross_adapter, self, "output_adapter", "True, or mh_adapter, or cross_adapter"
        )
        is_choice(self.non_linearity, self, "non_linearity", tuple(NON_LINEARITIES))
        is_choice(self.init_weights, self, "init_weights", INITS)
        scale = self.scaling
        require(
            scale in {"learned", "channel"} if isinstance(scale, str) else is_number(scale),
            self,
            "scaling",
            "a number, 'learned' or 'channel'",
        )
        require(is_number(self.dropout) and 0 <= self.dropout < 1, self, "dropout", "in [0, 1)")
        self._check_layers()
        self._check_blocks()
        self.reading()

    def _check_layers(self) -> None:
        numbers = tuple(self.leave_out) if isinstance(self.leave_out, Sequence | set) else (None,)
        require(all(is_count(i, 0) for i in numbers), self, "leave_out", "layer numbers from 0")
        object.__setattr__(self, "leave_out", tuple(sorted(set(numbers))))
        factors = self.reduction_factor
        if isinstance(factors, Mapping):
            object.__setattr__(self, "reduction_factor", {str(layer): factor for layer, factor in factors.items()})
            ok = bool(factors) and all(layer == "default" or str(layer).isdecimal() for layer in factors)
            require(ok, self, "reduction_factor", "a number, or a dict of layer number or 'default' to number")
        for factor in factors.values() if isinstance(factors, Mapping) else (factors,):
            require(is_number(factor) and factor >= 1 / 64, self, "reduction_factor", "at least 1/64")

    def _check_blocks(self) -> None:
        blocks = (self.blocks,) if isinstance(self.blocks, Block) else tuple(self.blocks)
        require(all(isinstance(block, Block) for block in blocks), self, "blocks", "a Block or several")
        object.__setattr__(self, "blocks", blocks)

    def reading(self) -> Reading:
        """What the adapters look at, as `layers/bottleneck.py` calls it.

        Raises:
            ConfigError: a combination that would change the model before anything is trained.
        """
        before, after = self.original_ln_before, self.original_ln_after
        if self.is_parallel and after:
            return "residual"
        if not self.is_parallel and not before and after:
            return "output"
        if not self.is_parallel and before and after == self.residual_before_ln:
            return "sum" if after else "normed"
        raise ConfigError(
            f"BottleneckConfig(is_parallel={self.is_parallel}, original_ln_before={before}, original_ln_after={after}, "
            f"residual_before_ln={self.residual_before_ln}) leaves out the block's own residual or adds it twice, so that the model "
            "would not start as it was. Take original_ln_after=True, or for an adapter after the norm original_ln_before=True, "
            "original_ln_after=False, residual_before_ln=False."
        )

    def factor(self, layer: int) -> float | None:
        """The reduction factor of one layer; None if the dict has neither the layer nor a default."""
        factors = self.reduction_factor
        return factors.get(str(layer), factors.get("default")) if isinstance(factors, Mapping) else factors
