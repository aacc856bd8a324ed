"""The low-rank part of a batch whose tokens have different adapters, y_i += s_a · B_a A_a x_i, in three ways.

With n tokens, G adapters and the largest rank r:

    masked    all A one below the other: x [A_1; …; A_G]ᵀ, zeros where it is another's, times [B_1; …; B_G]. G times the work
    grouped   tokens sorted by adapter, then a product by groups: no work too much, but sorting, and a small product for each
    batched   every adapter gets as many places as the one that has most tokens, m, and one batched product does all of them

`choose` takes the one that costs least; "batched" only where not too many places stay empty, so that no way forms more
than 4n · (in + out + r) numbers, or n · G·r where "masked" is chosen. Punica (arXiv:2310.18547) and S-LoRA (arXiv:2311.03285) have GPU
kernels of their own for this; here `mixed_triton.py` is one for batches that are generated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_nb.layers.grouped import Spans, grouped
from lora_nb.layers.kernels import kernel

DECODE = 128  # tokens of a batch up to which empty places do not matter, and which the GPU's own kernel is for

# Microseconds on one core of a CPU, by the bytes of a number, as `benchmarks/serving.py --only crossover` finds them.
CALL, SORTED = 15.0, 3e-4  # whatever is done; a number of x or y put in order and back
ONE_BY_ONE = 1.5  # on several cores: small products one after the other share them badly, a batched one well
COSTS = {  # a multiply-add; one more small product; a number of A or B, and in a batched product; a number that a place takes or gives
    4: {"work": 1 / 70_000, "group": 4.0, "read": 3.7e-4, "batch": 1.2e-4, "place": 6e-4},
    2: {"work": 1 / 15_000, "group": 45.0, "read": 2e-4, "batch": 5e-5, "place": 3e-4},
}


@dataclass(frozen=True)
class Plan:
    """Which tokens are whose: `order` sorts those with an adapter by it, `whose` has each one's number in `names`, or −1."""

    order: Tensor
    spans: Spans
    whose: Tensor
    start: int | None  # where they begin, if they lie one after another and in order already

    @classmethod
    def of(cls, sizes: Sequence[int], rows: Sequence[str | None], names: tuple[str, ...], device: torch.device | str) -> Plan:
        """From the tokens of each row and the adapter of each row."""
        number = {name: i for i, name in enumerate(names)}
        begins = [0, *accumulate(sizes)]
        mine: list[list[int]] = [[] for _ in names]
        for i, name in enumerate(rows):
            if name in number:
                mine[number[name]].append(i)
        order = [t for group in mine for i in group for t in range(begins[i], begins[i + 1])]
        ends = list(accumulate(sum(sizes[i] for i in group) for group in mine))
        whose = [number.get(name, -1) if name is not None else -1 for name, size in zip(rows, sizes, strict=True) for _ in range(size)]
        sorted_already = bool(order) and order == list(range(order[0], order[0] + len(order)))
        spans = Spans(tuple(pairwise([0, *ends])), torch.tensor(ends, dtype=torch.int32, device=device))
        places = (torch.tensor(values, dtype=torch.long, device=device) for values in (order, whose))
        return cls(next(places), spans, next(places), order[0] if sorted_already else None)

    @cached_property
    def others(self) -> Tensor:
        """(n, G), true where a token is not that adapter's."""
        return self.whose[:, None] != torch.arange(len(self.spans.places), device=self.whose.device)

    @cached_property
    def chosen(self) -> dict[tuple[int, ...], str]:
        """The way that was chosen, by what the stacks are like: layers of one shape need not weigh it again."""
        return {}

    @cached_property
    def most(self) -> int:
        """Tokens of the adapter that has most."""
        return max((end - begin for begin, end in self.spans.places), default=0)

    @cached_property
    def padded(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The token of each of G · m places (nobody takes what an empty one gives), the place of each token, (n,), and which have none.

        The last is (n,), or None where every token has an adapter.
        """
        most, device = self.most, self.order.device
        picked = [min(begin + i, max(begin, end - 1), len(self.order) - 1) for begin, end in self.spans.places for i in range(most)]
        places = [g * most + i for g, (begin, end) in enumerate(self.spans.places) for i in range(end - begin)]
        back = torch.zeros_like(self.whose).index_copy_(0, self.order, torch.tensor(places, dtype=torch.long, device=device))
        base = self.whose < 0 if len(self.order) < len(self.whose) else None
        return self.order.index_select(0, torch.tensor(picked, dtype=torch.long, device=device)), back, base


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, plan: Plan, *, in_place: bool = False) -> Tensor:
    """y (n, out) plus the low-rank part of x (n, in), by the way that costs least.

    Args:
        a: (G, r, in).
        b: (G, r, out), scaled.
        in_place: y may be written to.
    """
    fast = kernel("mixed_triton", x.device) if in_place and x.shape[0] <= DECODE else None
    if fast is not None and fast.fits(y, a, b):
        return fast.add_low_rank(y, x, a, b, plan.whose)  # type: ignore[no-any-return]
    return WAYS[chosen(plan, a, b)](y, x, a, b, plan, in_place)


def chosen(plan: Plan, a: Tensor, b: Tensor) -> str:
    """`choose` for a plan and its stacks."""
    key = (a.size(1), a.size(2), b.size(2), a.itemsize)
    way = plan.chosen.get(key)
    if way is None:
        tokens, routed, in_order = len(plan.whose), len(plan.order), plan.start is not None
        way = choose(tokens, routed, plan.most, a.shape, b.shape[2], in_order=in_order, itemsize=a.element_size())
        plan.chosen[key] = way
    return way


def choose(tokens: int, routed: int, most: int, shape: Sequence[int], out: int, *, in_order: bool, itemsize: int = 4) -> str:
    """The way that costs least.

    Args:
        tokens, routed, most: how many there are, how many of them have an adapter, and how many the adapter that has most.
        shape: A's (G, r, in).
        in_order: the tokens lie sorted by adapter already.
        itemsize: bytes of a number.
    """
    groups, rank, width = shape
    cost, size = COSTS.get(itemsize, COSTS[4]), rank * (width + out)
    costs = {
        "masked": CALL + tokens * groups * size * cost["work"] + groups * size * cost["read"],
        "grouped": 2 * CALL + routed * size * cost["work"] + groups * (cost["group"] + size * cost["read"]),
    }
    costs["grouped"] += 0 if in_order else routed * (width + out) * SORTED
    if torch.get_num_threads() > 1:
        costs["grouped"] *= ONE_BY_ONE
    places = groups * most
    if routed and places <= max(4 * tokens, DECODE):
        costs["batched"] = 1.5 * CALL + places * (size * cost["work"] + (width + out) * cost["place"]) + groups * size * cost["batch"]
    return min(costs, key=lambda way: costs[way])


def masked(y: Tensor, x: Tensor, a: Tensor, b: Tensor, plan: Plan, in_place: bool) -> Tensor:  # noqa: PLR0917 - one signature for all ways
    """G times the work in two large products."""
    groups, rank, _ = a.shape
    h = x @ a.flatten(0, 1).T  # (n, G·r)
    others = plan.others[..., None]
    # Filled, not multiplied: a value that another's adapter lets overflow must not become NaN here.
    h = (h.view(-1, groups, rank).masked_fill_ if in_place else h.view(-1, groups, rank).masked_fill)(others, 0.0).flatten(1)
    if y.dtype != h.dtype:
        return _added(y, h @ b.flatten(0, 1), in_place)
    return y.addmm_(h, b.flatten(0, 1)) if in_place else torch.addmm(y, h, b.flatten(0, 1))


def by_group(y: Tensor, x: Tensor, a: Tensor, b: Tensor, plan: Plan, in_place: bool) -> Tensor:  # noqa: PLR0917
    """The work that has to be done, in two small products for each adapter."""
    count = len(plan.order)
    if plan.start is None:
        update = grouped(grouped(x.index_select(0, plan.order), a.mT, plan.spans), b, plan.spans).to(y.dtype)
        return y.index_add_(0, plan.order, update) if in_place else y.index_add(0, plan.order, update)
    here = slice(plan.start, plan.start + count)
    update = grouped(grouped(x[here], a.mT, plan.spans), b, plan.spans)
    if in_place:
        y[here] += update
        return y
    return y + F.pad(update.to(y.dtype), (0, 0, plan.start, len(y) - plan.start - count))


def batched(y: Tensor, x: Tensor, a: Tensor, b: Tensor, plan: Plan, in_place: bool) -> Tensor:  # noqa: PLR0917
    """Two products for all adapters at once, each with the same number of places for its tokens."""
    places, back, base = plan.padded
    h = torch.bmm(x.index_select(0, places).view(a.shape[0], -1, x.shape[1]), a.mT)  # (G, m, r)
    update = torch.bmm(h, b).flatten(0, 1).index_select(0, back)  # (n, out)
    return _added(y, update if base is None else update.masked_fill(base[:, None], 0.0), in_place)


def _added(y: Tensor, update: Tensor, in_place: bool) -> Tensor:
    return y.add_(update) if in_place else y + update.to(y.dtype)


WAYS: dict[str, Callable[..., Tensor]] = {"masked": masked, "grouped": by_group, "batched": batched}
