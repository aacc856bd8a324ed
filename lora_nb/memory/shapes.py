"""The numbers of an architecture that decide over memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Linear:
    """One linear layer: its path inside the block, sizes, and a bias or none."""

    path: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs + self.outputs * self.bias


@dataclass(frozen=True)
class Stack:
    """Like blocks in a row: the path of their list, how many, their linear layers, and how many parameters are none of these.

    `expert_parameters` are weights of experts that lie in one parameter, which is no linear layer; `cross` says whether
    the blocks look at an encoder as well.
    """

    path: str
    count: int
    linears: tuple[Linear, ...]
    others: int
    expert_parameters: int = 0
    cross: bool = False

    @property
    def parameters(self) -> int:
        return self.count * (sum(linear.parameters for linear in self.linears) + self.others + self.expert_parameters)


@dataclass(frozen=True)
class Shape:
    """An architecture.

    Args:
        width, inner: of the residual stream and of the MLP.
        vocabulary: rows of the embedding; `positions` and token types are in `embedding_parameters`.
        head: the output head; where it is `tied` it has no weight of its own.
        order: where norms stand: before each sublayer, around it (Gemma 2 and 3), behind its sum (BERT), or one or two before
            attention and MLP side by side.
        norm: `"rms"` and `"gemma"` are computed in fp32 by several operations, `"layer"` and `"t5"` are not.
        fused: which projections are one: none, q with k and v, or gate and up as well.
        dropouts: of the hidden states, of the attention's probabilities, while training.
        attention: which kind transformers takes by default: `"eager"` where it has to write it out, `"math"` where no fused
            kernel takes its shapes, as with one key head for all queries.
        experts: how many, and how many of them a token sees.
        causal: whether a token sees those before it only.
        repeats: whether the model repeats keys and values for each query head.
        rotary: what of queries and keys positions turn; where it is a part, the parts are put together in a new order.
        beside: linear layers outside of the stacks, the head not among them, by their whole path.
    """

    name: str
    model_type: str
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    stacks: tuple[Stack, ...]
    embedding_parameters: int
    head: Linear
    tied: bool
    others: int
    order: Literal["pre", "around", "post", "beside", "beside-two"] = "pre"
    norm: Literal["rms", "gemma", "layer", "t5"] = "rms"
    qk_norm: bool = False
    activation: str = "silu"
    gated: bool = True
    fused: Literal["none", "qkv", "qkv+gate"] = "none"
    dropouts: tuple[float, float] = (0.0, 0.0)
    attention: Literal["flash", "eager", "math"] = "flash"
    attention_cap: bool = False
    logit_cap: bool = False
    experts: tuple[int, int] = (1, 1)
    causal: bool = True
    repeats: bool = False
    rotary: Literal["no", "whole", "part"] = "whole"
    beside: tuple[Linear, ...] = ()

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def layers(self) -> int:
        return sum(stack.count for stack in self.stacks)

    @property
    def head_parameters(self) -> int:
        """Its own, beside the embedding's."""
        return self.head.outputs * self.head.bias + (0 if self.tied else self.head.inputs * self.head.outputs)

    @property
    def parameters(self) -> int:
        """All of the model, as transformers counts them."""
        beside = self.embedding_parameters + self.head_parameters + sum(linear.parameters for linear in self.beside)
        return beside + sum(stack.parameters for stack in self.stacks) + self.others

    def linears(self) -> dict[str, Linear]:
        """Every linear layer but the head, by its path in the model."""
        inside = (
            (f"{stack.path}.{i}.{linear.path}", linear) for stack in self.stacks for i in range(stack.count) for linear in stack.linears
        )
        return {**dict(inside), **{linear.path: linear for linear in self.beside}}
