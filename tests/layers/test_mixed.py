"""Each row of a mixed batch is what it would be alone, by every way there is; and so are the gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_nb as ln
from lora_nb.errors import AdapterError
from lora_nb.layers import grouped as grouped_module
from lora_nb.layers import ways
from lora_nb.layers.grouped import Spans, grouped
from lora_nb.layers.mixed import Routing, stacked
from lora_nb.layers.ways import Plan, choose
from lora_nb.routing import routed
from tests.models import fill

IN, OUT = 72, 80
RANKS = {"r1": 1, "r3": 3, "r8": 8, "again": 8, "r17": 17, "r64": 64}
NAMES = [*RANKS, None]


def layer_of(ranks: dict[str, int] = RANKS, width: int = IN, out: int = OUT, dtype: torch.dtype = torch.float32) -> nn.Module:
    """One linear layer in a model, with an adapter of each rank; scales are 5/r."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(width, out))
    for i, (name, r) in enumerate(ranks.items()):
        ln.attach(model, ln.LoraConfig(r=r, lora_alpha=5, target_modules=["0"]), name)
        fill(model, name, seed=i)
    return model.to(dtype)


LAYER = layer_of()


def alone(model: nn.Module, x: Tensor, names: list[str | None]) -> Tensor:
    """Row by row, each in a batch of its own."""
    out = []
    for row, name in zip(x, names, strict=True):
        with ln.disabled(model):
            out.append(model(row[None]) if name is None else _through(model, name, row[None]))
    return torch.cat(out)


def _through(model: nn.Module, name: str, x: Tensor) -> Tensor:
    ln.set_active(model, name)
    return model(x)


@settings(max_examples=1000, deadline=None)
@given(
    names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=9).flatmap(lambda n: st.sampled_from([n, sorted(n, key=str)])),
    tokens=st.integers(1, 4),
    way=st.sampled_from([None, *ways.WAYS]),
    graph=st.booleans(),
    seed=st.integers(0, 9),
)
def test_every_row_is_the_row_alone(names, tokens, way, graph, seed) -> None:
    """Ranks from 1 to 64, adapters repeated, absent and none at all, rows sorted and not."""
    x = torch.randn(len(names), tokens, IN, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = alone(LAYER, x, names)
    chosen = ways.choose
    ways.choose = chosen if way is None else lambda *_, **__: way
    try:
        with torch.set_grad_enabled(graph), ln.rows(LAYER, names):
            assert (LAYER(x) - expected).abs().max() <= 1e-5
            assert (LAYER(x.flatten(0, 1)) - expected.flatten(0, 1)).abs().max() <= 1e-5
    finally:
        ways.choose = chosen


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(st.sampled_from(NAMES), st.integers(1, 5)), min_size=1, max_size=8), seed=st.integers(0, 9))
def test_rows_of_unequal_length_in_one_long_row(rows, seed) -> None:
    names, lengths = [n for n, _ in rows], [k for _, k in rows]
    x = torch.randn(1, sum(lengths), IN, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        pieces = [alone(LAYER, piece[None], [name])[0] for name, piece in zip(names, x[0].split(lengths), strict=True)]
        with routed(LAYER, Routing(names, lengths)):
            ln.set_active(LAYER, [])
            assert torch.allclose(LAYER(x)[0], torch.cat(pieces), atol=1e-5)


def test_by_hand() -> None:
    """x = 2 in, W = 3, A = 5, B = 7, s = 2: 6 for the base, 6 + 2·7·5·2 = 146 with the adapter."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    ln.attach(model, ln.LoraConfig(r=1, lora_alpha=2, target_modules=["0"]), "a")
    ln.attach(model, ln.LoraConfig(r=1, lora_alpha=3, target_modules=["0"]), "b")
    with torch.no_grad():
        model[0].weight.fill_(3)
        for name, values in {"a": (5, 7), "b": (1, 1)}.items():
            for p, value in zip(model[0].adapters[name].parameters(), values, strict=True):
                p.fill_(value)
    with ln.rows(model, ["a", None, "b"]):
        assert model(torch.tensor([[2.0], [2.0], [2.0]])).flatten().tolist() == [146, 6, 12]


@pytest.mark.parametrize("way", ways.WAYS)
@pytest.mark.parametrize("plain", [True, False])
def test_gradients_are_those_of_each_row_alone(way: str, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "choose", lambda *_, **__: way)
    if plain:
        monkeypatch.setattr(grouped_module, "PRODUCT", None)
    names = ["r3", None, "r8", "r3", "r64", "again"]
    x, weigh = torch.randn(6, 4, IN), torch.randn(6, 4, OUT)
    for part in LAYER[0].adapters.values():
        part.requires_grad_(requires_grad=True)
    grads = []
    for mixed in (True, False):
        LAYER.zero_grad()
        own = x.clone().requires_grad_()
        if mixed:
            with ln.rows(LAYER, names):
                (LAYER(own) * weigh).sum().backward()
        else:
            for i, name in enumerate(names):
                LAYER[0].active = () if name is None else (name,)
                (LAYER(own[i : i + 1]) * weigh[i : i + 1]).sum().backward()
        grads.append({"x": own.grad} | {n: p.grad for n, p in LAYER.named_parameters() if p.grad is not None})
    mixed, single = grads
    assert mixed.keys() == single.keys()
    for name, g in single.items():
        assert torch.allclose(mixed[name], g, atol=1e-5), name


def test_a_gradient_that_was_expanded() -> None:
    with ln.rows(LAYER, ["r3", "r8", "r17", "r64", "again"] * 40):
        LAYER(torch.randn(200, IN).requires_grad_()).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_product_is_the_products_of_the_groups(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(12, 16, dtype=dtype), torch.randn(5, 16, 24, dtype=dtype)
    ends = [3, 3, 7, 7, 12]
    spans = Spans(tuple(itertools.pairwise([0, *ends])), torch.tensor(ends, dtype=torch.int32))
    expected = torch.cat([x[s:e] @ one for (s, e), one in zip(spans.places, w, strict=True)])
    assert torch.equal(grouped(x, w, spans), expected)
    monkeypatch.setattr(grouped_module, "PRODUCT", None)
    assert torch.equal(grouped(x, w, spans), expected)


def test_another_adapters_overflow_stays_its_own() -> None:
    model = layer_of({"fine": 3, "huge": 3})
    with torch.no_grad():
        model[0].adapters["huge"].lora_A.fill_(1e38)
    x = torch.full((4, IN), 9.0)
    with torch.no_grad(), ln.rows(model, ["fine", "huge", None, "fine"]):
        y = model(x)
    assert not y[1].isfinite().all()
    assert y[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("way", ways.WAYS)
def test_memory_is_tokens_times_rank_and_outputs(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never tokens × rank × outputs: no tensor of the forward or backward has so many numbers."""
    monkeypatch.setattr(ways, "choose", lambda *_, **__: way)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor))
            return out

    model, rows = layer_of({"a": 8, "b": 8, "c": 8}), ["a", "b", "c", "a"]
    x = torch.randn(4, 100, IN, requires_grad=True)
    with Watch(), ln.rows(model, rows):
        model(x).sum().backward()
    places = 600 if way == "batched" else 400
    assert max(sizes) <= places * max(IN, OUT, 3 * 8)


def test_what_is_chosen() -> None:
    """The crossovers that were measured: one adapter masked, a token each batched, long texts of many adapters grouped."""
    assert choose(8, 8, 8, (1, 16, 2048), 2048, in_order=False) == "masked"
    assert choose(512, 512, 60, (10, 16, 2048), 2048, in_order=False) == "grouped"
    assert choose(512, 512, 13, (100, 16, 256), 256, in_order=False, itemsize=2) == "batched"
    assert choose(512, 512, 413, (100, 16, 256), 256, in_order=False, itemsize=2) == "grouped"
    assert choose(32, 32, 1, (32, 16, 256), 256, in_order=False) == "batched"
    assert choose(16, 0, 0, (2, 8, 256), 256, in_order=False) != "batched"


def test_an_adapter_that_trains_is_read_anew_others_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = layer_of({"a": 3, "b": 4}), torch.randn(2, IN)
    ln.set_active(model, "a")
    with torch.no_grad(), ln.rows(model, ["a", "b"]):
        before = model(x)
        model[0].adapters["a"].lora_B.add_(1.0)
        assert (model(x)[0] - before[0]).abs().max() > 0.1
    ln.set_active(model, [])
    with torch.no_grad():
        model[0].adapters["b"].lora_B.mul_(3.0)
    with torch.no_grad(), ln.rows(model, ["a", "b", "b"]):
        found = model(torch.cat([x, x[1:]]))
    assert torch.allclose(found, alone(model, torch.cat([x, x[1:]]), ["a", "b", "b"]), atol=1e-5)
    ln.set_active(model, [])
    count = []
    monkeypatch.setattr("lora_nb.layers.mixed.stacked", lambda parts: count.append(1) or stacked(parts))
    with torch.no_grad(), ln.rows(model, ["a", "b"]):
        model(x)
        model(x)
    assert len(count) == 1


def test_a_plan_by_hand() -> None:
    uneven = Plan.of([1] * 5, ["b", "a", None, "b", "b"], ("a", "b", "none of them"), "cpu")
    assert uneven.most == 3
    places, back, base = uneven.padded
    assert places.view(3, 3)[:2].tolist() == [[1, 1, 1], [0, 3, 4]]
    assert back.tolist() == [3, 0, 0, 4, 5]
    assert base is not None
    assert base.tolist() == [False, False, True, False, False]
    plan = Plan.of([2, 1, 3], ["b", None, "a"], ("a", "b"), "cpu")
    assert plan.order.tolist() == [3, 4, 5, 0, 1]
    assert plan.whose.tolist() == [1, 1, -1, 0, 0, 0]
    assert plan.spans.places == ((0, 3), (3, 5))
    assert plan.start is None
    assert Plan.of([2, 1, 3], [None, "a", "b"], ("a", "b"), "cpu").start == 2


@pytest.mark.parametrize("x", [torch.randn(4, 6, IN), torch.randn(7, IN)])
def test_another_number_of_rows_is_refused(x: Tensor) -> None:
    with ln.rows(LAYER, ["r3", "r8", None]), pytest.raises(AdapterError, match="named for 3 rows, but"):
        LAYER(x)
