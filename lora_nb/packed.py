"""One forward over rows of unequal length, without padding: texts that begin, texts that go on, and rows that train, side by side.

The model is transformers' own. The tokens of all rows lie in one long row, (1, Σ lengths). What works token by token (embeddings,
linear layers, norms, MLPs: nearly all of the time) does not notice. Attention alone does, so transformers is given another one,
which sends each row to its own keys and values: those that were kept of a text that goes on, or those of the row itself.

(Orca, Yu et al., OSDI 2022, calls this selective batching. transformers' own continuous batching has no place for an adapter of
each row, nor for rows that train.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_nb.attach import layers
from lora_nb.errors import BaseModelError
from lora_nb.layers.adapted import AdaptedLayer
from lora_nb.layers.mixed import Routing, Share

NAME = "lora_nb_packed"
STEP = 64  # positions by which the room for keys and values grows
UNKNOWN = ("position_bias", "sliding_window", "softcap", "s_aux")  # further arguments that change what attention computes
INSTEAD = "Its texts cannot be served together: use ln.generate(…, adapter=[…])."
CURRENT: ContextVar[Pass] = ContextVar("CURRENT")


@dataclass(frozen=True)
class Row:
    """Tokens of one text in one forward.

    `slot` has its keys and values, from a text that began earlier if `start` is above 0; without a slot nothing is kept, as in
    training. `wanted` are the tokens whose logits are asked for, by default the last one.
    """

    adapter: str | None
    ids: Sequence[int]
    slot: int | None = None
    start: int = 0
    wanted: Sequence[int] | None = None

    @property
    def continues(self) -> bool:
        return self.start > 0


class KeyValues:
    """Keys and values of the texts under way, by slot: for each layer (slots, heads, positions, size) twice.

    Texts under way always have the slots from 0 on, so that a batch of them reads its part of it as it lies.
    """

    def __init__(self, slots: int) -> None:
        self.slots, self.room = slots, 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The tables of a layer, (slots, heads, room, size), made when first asked for."""
        if layer not in self.layers:
            _, heads, _, size = like.shape
            self.layers[layer] = tuple(like.new_zeros(self.slots, heads, self.room, size) for _ in range(2))  # type: ignore[assignment]
        return self.layers[layer]

    def grow(self, positions: int) -> None:
        """Room for so many positions in each slot."""
        if positions <= self.room:
            return
        more = -(-positions // STEP) * STEP - self.room
        self.room += more
        self.layers = {i: (F.pad(k, (0, 0, 0, more)), F.pad(v, (0, 0, 0, more))) for i, (k, v) in self.layers.items()}

    def move(self, source: int, target: int, length: int) -> None:
        """Put a text of some length into another slot."""
        for k, v in self.layers.values():
            k[target, :, :length] = k[source, :, :length]
            v[target, :, :length] = v[source, :, :length]

    def clear(self, slot: int) -> None:
        """Forget values that are not finite: what is masked counts nothing, but nothing times infinity is not a number."""
        for k, v in self.layers.values():
            k[slot], v[slot] = 0.0, 0.0

    @property
    def bytes(self) -> int:
        """Memory that it holds."""
        return sum(t.numel() * t.element_size() for pair in self.layers.values() for t in pair)


class Pass:
    """The rows of one forward: those that go on first, a token each, then those that begin, then those that train.

    Args:
        rows: in any order; `order` says in which they are packed.
        kept: keys and values of the texts under way.
    """

    def __init__(self, rows: Sequence[Row], kept: KeyValues | None = None, device: torch.device | str = "cpu") -> None:
        rank = [(row.slot is None, not row.continues, row.adapter or "") for row in rows]
        self.order = sorted(range(len(rows)), key=rank.__getitem__)
        self.rows = [rows[i] for i in self.order]
        self.kept, self.device, self.calls = kept, device, 0
        self.going = [row for row in self.rows if row.continues]
        if kept is not None:
            kept.grow(max((row.start + len(row.ids) for row in self.rows if row.slot is not None), default=0))

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row.ids) for row in self.rows]

    @cached_property
    def wanted(self) -> list[int]:
        """How many logits of each row are wanted."""
        return [1 if row.wanted is None else len(row.wanted) for row in self.rows]

    def inputs(self) -> dict[str, Any]:
        """What the model is called with."""
        ids = [token for row in self.rows for token in row.ids]
        positions = [row.start + i for row in self.rows for i in range(len(row.ids))]
        ends, begin = [], 0
        for row in self.rows:
            ends += [begin + i for i in ((len(row.ids) - 1,) if row.wanted is None else row.wanted)]
            begin += len(row.ids)
        tensors = {"input_ids": ids, "position_ids": positions, "logits_to_keep": ends}
        found = {name: torch.tensor(values, device=self.device) for name, values in tensors.items()}
        return {name: t if name == "logits_to_keep" else t[None] for name, t in found.items()}

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Slot and position of each token of the texts that go on."""
        pairs = (torch.tensor(v, device=self.device) for v in ([r.slot for r in self.going], [r.start for r in self.going]))
        return next(pairs), next(pairs)

    @cached_property
    def seen(self) -> Tensor:
        """(slots, 1, 1, longest), true where a text that goes on has a key; slots of others see their first, and nobody looks."""
        lengths = torch.ones(1 + max(row.slot or 0 for row in self.going), dtype=torch.long)
        lengths[self.places[0].cpu()] = self.places[1].cpu() + 1
        return (torch.arange(max(r.start for r in self.going) + 1) < lengths[:, None])[:, None, None].to(self.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, dropout: float) -> Tensor:
        """(1, heads, tokens, size) → (1, tokens, heads, size)."""
        self.calls += 1
        count = len(self.going)
        pieces = [self._go_on(layer, q[0, :, :count], k[0, :, :count], v[0, :, :count], scale)] if count else []
        start = count
        for row, length in list(zip(self.rows, self.lengths, strict=True))[count:]:
            here = slice(start, start + length)
            start += length
            own_k, own_v = k[:, :, here], v[:, :, here]
            if row.slot is not None and self.kept is not None:
                for table, own in zip(self.kept.of(layer, k), (own_k, own_v), strict=True):
                    table[row.slot, :, :length] = own[0].detach()
            drop = dropout if row.slot is None else 0.0
            y = F.scaled_dot_product_attention(
                q[:, :, here], own_k, own_v, is_causal=length > 1, scale=scale, dropout_p=drop, enable_gqa=q.shape[1] != k.shape[1]
            )
            pieces.append(y[0].transpose(0, 1))
        return torch.cat(pieces)[None]

    def _go_on(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """One token each, (heads, texts, size) → (texts, heads, size), over the keys that were kept and its own."""
        assert self.kept is not None
        slots, positions = self.places
        tables = self.kept.of(layer, k[None])
        for table, own in zip(tables, (k, v), strict=True):
            table[slots, :, positions] = own.detach().transpose(0, 1)
        texts, _, _, longest = self.seen.shape
        heads, groups = k.shape[0], q.shape[0] // k.shape[0]
        ordered = q.new_zeros(texts, heads, groups, q.shape[2])  # heads that share a key are further queries of it
        ordered[slots] = q.detach().transpose(0, 1).reshape(len(slots), heads, groups, -1)
        kept_k, kept_v = (table[:texts, :, :longest] for table in tables)
        y = F.scaled_dot_product_attention(ordered, kept_k, kept_v, attn_mask=self.seen, scale=scale)
        return y.flatten(1, 2)[slots]


def forward(model: Any, batch: Pass, *, routed: bool = False) -> list[Tensor]:
    """Logits by row, in the order of the rows given, of the tokens that are wanted: (wanted, vocabulary).

    Args:
        routed: the caller has seen to it that each row goes through its adapter (`sent`).

    Raises:
        BaseModelError: a model whose attention cannot be replaced.
    """
    with attending(model, batch), nullcontext() if routed else sent([m for _, m in layers(model)], batch):
        try:
            logits = model(**batch.inputs(), use_cache=False).logits[0]
        except (TypeError, AttributeError) as error:  # of a model without the arguments of today's
            if batch.calls:
                raise
            raise _own_attention(model) from error
    if not batch.calls:
        raise _own_attention(model)
    pieces = logits.split(batch.wanted)
    return [pieces[i] for i in sorted(range(len(pieces)), key=batch.order.__getitem__)]


def _own_attention(model: object) -> BaseModelError:
    return BaseModelError(f"{type(model).__name__} computes attention by itself, not through transformers' interface for it. {INSTEAD}")


@torch.no_grad()
def check_model(model: Any) -> None:
    """Compare a few tokens packed with the same tokens alone.

    Raises:
        BaseModelError: they differ, as the model is not made of attention alone, or computes it in a way of its own.
    """
    device, kept = next(model.parameters()).device, KeyValues(2)
    texts = torch.randint(model.config.vocab_size, (2, 4), generator=torch.Generator().manual_seed(0)).tolist()
    alone = [model(input_ids=torch.tensor([text], device=device), use_cache=False).logits[0] for text in texts]
    began = forward(model, Pass([Row(None, text[:n], i) for i, (text, n) in enumerate(zip(texts, (3, 2), strict=True))], kept, device))
    went_on = forward(model, Pass([Row(None, texts[1][2:3], 1, 2), Row(None, texts[0][3:], 0, 3)], kept, device))
    pairs = ((began[0], alone[0][2]), (began[1], alone[1][1]), (went_on[0], alone[1][2]), (went_on[1], alone[0][3]))
    if any((found[0] - expected).abs().max() > 0.05 * expected.abs().max() for found, expected in pairs):
        raise BaseModelError(f"{type(model).__name__} gives other texts when several are packed into one row. {INSTEAD}")


@contextmanager
def sent(adapted: Iterable[AdaptedLayer], batch: Pass, shares: dict[AdaptedLayer, Share] | None = None) -> Iterator[None]:
    """Within, these layers send each row through its adapter.

    Args:
        shares: what an earlier pass found out about the same adapters.
    """
    names = [row.adapter for row in batch.rows]
    routing, chosen = Routing(names, batch.lengths, batch.wanted, batch.device, shares), list(adapted)
    for layer in chosen:
        layer.__dict__["routing"] = routing  # past nn.Module's own bookkeeping, which a step would feel
    try:
        yield
    finally:
        for layer in chosen:
            layer.__dict__["routing"] = None


@contextmanager
def attending(model: Any, batch: Pass) -> Iterator[None]:
    """Within, the model's attention is that of the pass."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    config, token = model.config, CURRENT.set(batch)
    before, config._attn_implementation = config._attn_implementation, NAME  # noqa: SLF001 - transformers' own place for it
    try:
        yield
    finally:
        config._attn_implementation = before  # noqa: SLF001
        CURRENT.reset(token)


def _attention(  # noqa: PLR0917 - as transformers calls it
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:
    """`more` has what other models' attention takes."""
    odd = [name for name in UNKNOWN if more.get(name) is not None]
    if odd:
        raise BaseModelError(f"The attention of this model needs {', '.join(odd)}, which a packed batch does not have.")
    layer: Any = getattr(module, "layer_idx", None)
    return CURRENT.get().attend(layer, query, key, value, scale=scaling, dropout=dropout), None
