"""Attention of packed rows, document by document, so that packing costs no attention at all between documents.

A mask over the whole row would compute all (row length)² products and throw most of them away; and it keeps a GPU from its fast
kernels. Here the documents of all rows become rows of their own for the attention alone, each on the way

    queries, keys, values (batch, heads, seq, width)  →  (documents, heads, longest, width)  →  causal attention  →  back

while every other layer works on full rows without padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NAME = "lora_nb_packed"  # under which transformers finds it


@dataclass(frozen=True)
class Plan:
    """Where each token of (batch · seq) stands in (documents · longest)."""

    places: Tensor  # (batch · seq,)
    documents: int
    longest: int

    @classmethod
    def of(cls, positions: Tensor) -> Plan:
        """From positions (batch, seq) that start from 0 with each document."""
        starts = (positions == 0).flatten()
        starts[:: positions.shape[1]] = True
        document = starts.cumsum(0) - 1
        first = starts.nonzero()[:, 0]
        within = torch.arange(len(starts), device=starts.device) - first[document]
        longest = int(within.max()) + 1
        return cls(document * longest + within, len(first), longest)

    def apart(self, x: Tensor) -> Tensor:
        """(batch, heads, seq, width) → (documents, heads, longest, width), zeros behind the shorter ones."""
        flat = x.transpose(1, 2).flatten(0, 1)
        rows: Tensor = Spread.apply(flat, self.places, self.documents * self.longest)  # type: ignore[no-untyped-call]
        return rows.view(self.documents, self.longest, *x.shape[1::2]).transpose(1, 2)

    def together(self, x: Tensor, batch: int) -> Tensor:
        """(documents, longest, heads, width) → (batch, seq, heads, width)."""
        flat: Tensor = Collect.apply(x.flatten(0, 1), self.places)  # type: ignore[no-untyped-call]
        return flat.view(batch, -1, *flat.shape[1:])


class Spread(torch.autograd.Function):
    """Rows to places of their own, no two to one: the gradient is a look-up, where PyTorch's own would add into zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, places, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class Collect(torch.autograd.Function):
    """The way back: what `Spread` does is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, ctx.saved_tensors[0], grad), None


class Attention:
    """What transformers calls in place of its own attention; the plan is made once for all layers of a forward."""

    def __init__(self) -> None:
        self.last: tuple[Tensor, Plan] | None = None

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **settings: Any
    ) -> tuple[Tensor, None]:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        positions = settings.pop("position_ids")
        last = self.last  # once: another thread may be training, too
        plan = last[1] if last and last[0] is positions else Plan.of(positions.expand(len(query), -1))
        self.last = positions, plan
        window = settings.get("sliding_window")
        near = None
        if window is not None and plan.longest > window:
            near = torch.ones(plan.longest, plan.longest, dtype=torch.bool, device=query.device).tril().triu(1 - window)[None, None]
        out, _ = sdpa_attention_forward(module, plan.apart(query), plan.apart(key), plan.apart(value), near, **settings)
        return plan.together(out, len(query)), None


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """Within it, packed rows go through attention by documents, where the model's attention is transformers' `sdpa`."""
    config: Any = getattr(model, "config", None)
    if not able(config):
        yield
        return
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, ATTENTION)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    before = config._attn_implementation  # noqa: SLF001 - its setter is transformers' own way to change it in place
    config._attn_implementation = NAME  # noqa: SLF001
    try:
        yield
    finally:
        config._attn_implementation = before  # noqa: SLF001
        ATTENTION.last = None


def able(config: Any) -> bool:
    """Is it plain causal attention, with a sliding window at most, through PyTorch's own function?"""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return getattr(config, "_attn_implementation", None) == "sdpa" and kinds <= {"full_attention", "sliding_attention"}


ATTENTION = Attention()
