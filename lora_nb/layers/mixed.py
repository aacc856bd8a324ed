"""One batch, many adapters: each row of the batch goes through its own, or through none.

    y_i = W x_i + s_a · B_a A_a x_i,    a = the adapter of row i

The product with W does not care whose row it is, so it is done once for all rows; the low-rank parts follow in one of the
ways of `ways.py`. Which token is whose is found once a batch, in a `Routing` that all layers share.

What is more than s · B A x on a linear layer (DoRA, biases, convolutions, embeddings, bottlenecks, whole modules) goes adapter by
adapter: over the base's output, which is still computed once, or through the base again where an adapter has its own copy
of its parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_nb.errors import AdapterError
from lora_nb.layers.adapted import AdaptedLayer, Part, through
from lora_nb.layers.grouped import MULTIPLE
from lora_nb.layers.lora import LoraWeights
from lora_nb.layers.ways import Plan, add_low_rank

_LAID: WeakKeyDictionary[LoraWeights, tuple[object, Tensor, Tensor]] = WeakKeyDictionary()
SINGLES = 3  # adapters that train and go one by one; if there are more, all are stacked in every forward


class Routing:
    """Whose the rows of one batch are.

    Args:
        names: for each row its adapter, or None for the base.
        lengths: tokens of each row, where the rows lie one after another in a single long one, (1, Σ lengths, …); by default
            the batch is (rows, tokens, …).
        kept: how many of these tokens the output head sees, if not all.
        device: of the batch.
        shares: what an earlier batch of the same adapters found out about them.

    It holds what was found out about the batch and about the adapters, so it is for as long as neither changes; adapters
    that train may change.
    """

    def __init__(
        self,
        names: Sequence[str | None],
        lengths: Sequence[int] | None = None,
        kept: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        shares: dict[AdaptedLayer, Share] | None = None,
    ) -> None:
        self.names, self.device = tuple(names), device
        self.lengths = None if lengths is None else tuple(lengths)
        self.kept = self.lengths if kept is None else tuple(kept)
        self.adapters = tuple(sorted({name for name in names if name is not None}))
        self.focus: str | None = None
        self._shares = {} if shares is None else shares
        self._plans: dict[tuple[tuple[str, ...], int], Plan] = {}

    def forward(self, layer: AdaptedLayer, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives for the batch."""
        if self.focus is not None:
            return alone(layer, self.focus, args, kwargs)
        share = self._shares.get(layer)
        if share is None:
            share = self._shares[layer] = Share(layer, self.adapters)
        if not share.names:
            return layer.base(*args, **kwargs)
        if len(share.names) == 1 and self.names.count(share.names[0]) == len(self.names):
            return alone(layer, share.names[0], args, kwargs)
        y = layer.base(*args, **kwargs)
        if share.low_rank or share.singles:
            y = self._low_rank(layer, share, args[0] if args else next(iter(kwargs.values())), y)
        for name in share.others:
            y = self._one_more(layer, name, y, args, kwargs)
        return y

    def _low_rank(self, layer: AdaptedLayer, share: Share, x: Tensor, y: Tensor) -> Tensor:
        flat, out = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        self._check(x)
        in_place = not torch.is_grad_enabled() and not layer.base._forward_hooks
        if share.low_rank:
            a, b = share.stack()
            out = add_low_rank(out, flat.to(a.dtype), a, b, self.plan(share.low_rank, len(flat)), in_place=in_place)
        for name, part in share.singles.items():
            order = self.plan((name,), len(flat)).order
            update = part.update(layer, part.dropped(flat.index_select(0, order)))
            out = out.index_add(0, order, update.to(out.dtype))
        return out.view_as(y)

    def _one_more(self, layer: AdaptedLayer, name: str, y: Any, args: Any, kwargs: Any) -> Any:
        """`y` with the rows of one adapter replaced by what it makes of them."""
        part: Part = layer.adapters[name]  # type: ignore[assignment]
        main = y[0] if isinstance(y, tuple) else y
        dim, places = self._places(name, main)
        args = tuple(self._mine(name, v) for v in args)
        kwargs = {key: self._mine(name, v) for key, v in kwargs.items()}
        with self._only(name):
            before = main.index_select(dim, places)
            if part.replaces:
                new: Any = alone(layer, name, args, kwargs)
            else:
                new = part(layer, lambda *_, **__: before, *args, **kwargs)
        new = new[0] if isinstance(new, tuple) else new
        new = main if new is before else main.index_copy(dim, places, new.to(main.dtype))
        return (new, *y[1:]) if isinstance(y, tuple) else new

    @contextmanager
    def _only(self, name: str) -> Iterator[None]:
        """Within, every row is that adapter's: modules that it calls (a norm) are given its rows alone."""
        self.focus = name
        try:
            yield
        finally:
            self.focus = None

    def _mine(self, name: str, value: Any) -> Any:
        """Of a tensor that has the batch's rows, those of one adapter; anything else as it is."""
        if not isinstance(value, Tensor) or not self._has_rows(value):
            return value
        dim, places = self._places(name, value)
        return value.index_select(dim, places)

    def _has_rows(self, t: Tensor) -> bool:
        if not t.ndim:
            return False
        if self.lengths is None:
            return t.shape[0] >= len(self.names) and t.shape[0] % len(self.names) == 0
        sizes = (sum(self.lengths), sum(self.kept or ()))
        return t.shape[0] in sizes or (t.ndim > 1 and t.shape[0] == 1 and t.shape[1] in sizes)

    def _places(self, name: str, t: Tensor) -> tuple[int, Tensor]:
        """The dimension of `t` that has rows or tokens, and which of them are the adapter's."""
        packed = self.lengths is not None
        dim = 1 if packed and t.ndim > 1 and t.shape[0] == 1 else 0
        self._check(t)
        return dim, self.plan((name,), t.shape[dim]).order

    def plan(self, names: tuple[str, ...], tokens: int) -> Plan:
        """Which of so many tokens are whose, as far as these adapters go.

        Raises:
            AdapterError: the batch has not as many rows as there are names.
        """
        plan = self._plans.get((names, tokens))
        if plan is None:
            plan = self._plans[names, tokens] = Plan.of(self._sizes(tokens), self.names, names, self.device)
        return plan

    def _sizes(self, tokens: int) -> tuple[int, ...]:
        """Tokens of each row."""
        if self.lengths is None and tokens % len(self.names) == 0:
            return (tokens // len(self.names),) * len(self.names)
        for sizes in (self.lengths, self.kept):
            if sizes is not None and sum(sizes) == tokens:
                return sizes
        raise self._wrong(f"{tokens} tokens")

    def _check(self, t: Tensor) -> None:
        """A batch of several dimensions says how many rows it has; one of tokens alone has to be divided."""
        if self.lengths is None and t.ndim > 2 and t.shape[0] != len(self.names):
            raise self._wrong(f"{t.shape[0]} rows")

    def _wrong(self, found: str) -> AdapterError:
        return AdapterError(
            f"Adapters were named for {len(self.names)} rows, but {found} reached a layer. Name one adapter, or None for the base, "
            "for every row of the batch."
        )


class Share:
    """Which of the batch's adapters one layer has, and the low-rank ones of them stacked.

    A few that train beside others are `singles`: the stack of those others is then made once, not in every step.
    """

    def __init__(self, layer: AdaptedLayer, adapters: Sequence[str]) -> None:
        self.names = tuple(name for name in adapters if name in layer.adapters)
        parts: dict[str, Any] = {name: layer.adapters[name] for name in self.names}
        low_rank: dict[str, LoraWeights] = {name: part for name, part in parts.items() if is_low_rank(part)}
        training = {name: part for name, part in low_rank.items() if part.lora_A.requires_grad or part.lora_B.requires_grad}
        self.singles = training if len(training) <= SINGLES else {}
        self.others = tuple(name for name in self.names if name not in low_rank)
        self.low_rank = tuple(name for name in low_rank if name not in self.singles)
        self.parts = [low_rank[name] for name in self.low_rank]
        self.trains = any(name in training for name in self.low_rank)
        self._stack: tuple[Tensor, Tensor] | None = None

    def stack(self) -> tuple[Tensor, Tensor]:
        """A (G, r, in) and s · Bᵀ (G, r, out), shorter ranks filled with zeros; kept unless the adapters train."""
        if self.trains:
            return stacked(self.parts)
        if self._stack is None:
            with torch.no_grad():
                self._stack = stacked(self.parts)
        return self._stack


def is_low_rank(part: Part) -> bool:
    """Whether a part is s · B A x on a linear layer, and nothing more."""
    if type(part) is not LoraWeights or part.replaces or part.lora_bias is not None:
        return False
    return part.start_a is None and not (part.dropout and part.training)


def stacked(parts: Sequence[LoraWeights]) -> tuple[Tensor, Tensor]:
    """A (G, r, in) and s · Bᵀ (G, r, out), r the largest rank rounded up."""
    rank = max(part.r for part in parts)
    rank += -rank % MULTIPLE
    pairs = [laid(part, rank) for part in parts]
    return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])


def laid(part: LoraWeights, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and s · Bᵀ (rank, out) of one adapter, zeros below its own rank; kept until its values change.

    (A value written through `.data` goes unnoticed, by this as by autograd.)
    """
    a, b = part.lora_A, part.lora_B
    if a.requires_grad or b.requires_grad or a.is_inference() or b.is_inference():
        return _filled(a, rank), _filled(b.T * part.scaling, rank)
    state = (rank, part.scaling, *((p._version, p.data_ptr()) for p in (a, b)))
    kept = _LAID.get(part)
    if kept is None or kept[0] != state:
        kept = _LAID[part] = (state, _filled(a.detach(), rank), _filled((b.detach().T * part.scaling).contiguous(), rank))
    return kept[1], kept[2]


def forget(part: Part) -> None:
    """Let go of what is kept of an adapter that will not act for a while."""
    if isinstance(part, LoraWeights):
        _LAID.pop(part, None)


def _filled(m: Tensor, rank: int) -> Tensor:
    return m if len(m) == rank else F.pad(m, (0, 0, 0, rank - len(m)))


def alone(layer: AdaptedLayer, name: str, args: Any, kwargs: Any) -> Any:
    """The layer as if that adapter were the only one that acts."""
    before, layer.active = layer.active, (name,) if name in layer.adapters else ()
    try:
        return through(layer, args, kwargs)
    finally:
        layer.active = before
