"""The product's own forward and backward pass give what autograd finds on the plain expression, and keep no more than they say."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lora_nb.layers.adapted import AdaptedLayer, adapted
from lora_nb.layers.lora import LoraWeights
from lora_nb.layers.lora_linear import MANY, LoraProduct, lora_linear

IN, OUT, S = 12, 20, 2.5


def tensors(rows: int, r: int = 4, dtype: torch.dtype = torch.float32, adapter: torch.dtype | None = None) -> list[Tensor]:
    """x, W, bias, A, B; x, A and B ask for a gradient."""
    torch.manual_seed(0)
    x, w, bias = (torch.randn(*shape, dtype=dtype) for shape in ((rows, IN), (OUT, IN), (OUT,)))
    a, b = (torch.randn(*shape, dtype=adapter or dtype) for shape in ((r, IN), (OUT, r)))
    return [x.requires_grad_(), w, bias, a.requires_grad_(), b.requires_grad_()]


def plain(x: Tensor, w: Tensor, bias: Tensor | None, low_rank: tuple[Tensor, Tensor, float], p: float = 0.0) -> Tensor:
    """As PEFT writes it."""
    a, b, s = low_rank
    y = F.linear(x, w, bias)
    return y + (F.linear(F.linear(F.dropout(x.to(a.dtype), p), a), b) * s).to(y.dtype)


def outcome(expression: Callable[..., Tensor], t: list[Tensor], p: float = 0.0) -> list[Tensor]:
    """y and the gradients of x, A and B, for a loss that weighs every output differently."""
    x, w, bias, a, b = t
    for leaf in (x, a, b):
        leaf.grad = None
    torch.manual_seed(1)
    y = expression(x, w, bias, (a, b, S), p)
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    (y.float() * weights).sum().backward()
    return [y, *(leaf.grad for leaf in (x, a, b))]


def assert_like(ours: list[Tensor], theirs: list[Tensor], rounding: float) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert (one - other).abs().max() <= rounding * other.abs().max()


@pytest.mark.parametrize("shape", [(IN,), (1, IN), (1, 1, IN), (2, 1, IN)])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_token_at_a_time_is_what_the_plain_expression_gives(shape: tuple[int, ...], dtype: torch.dtype, rounding: float) -> None:
    _, w, bias, a, b = tensors(1, dtype=dtype)
    x = torch.randn(*shape, dtype=dtype)
    with torch.no_grad():
        for c in (bias, None):
            assert_like([lora_linear(x, w, c, (a, b, S))], [plain(x, w, c, (a, b, S))], rounding)


@pytest.mark.parametrize("r", [1, 3, 16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_gradients_are_those_of_finite_differences(r: int, p: float) -> None:
    x, w, bias, a, b = tensors(5, r, torch.float64)

    def product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(0)
        return LoraProduct.apply(x, w, bias, a, b, S, p)

    assert torch.autograd.gradcheck(product, (x, a, b))


@pytest.mark.parametrize("rows", [1, 300, MANY, MANY + 7])  # one part, several, the effective weight
@pytest.mark.parametrize("r", [4, 16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_it_is_the_plain_expression_to_rounding(rows: int, r: int, p: float) -> None:
    t = tensors(rows, r)
    assert_like(outcome(lora_linear, t, p), outcome(plain, t, p), 2e-6)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_over_a_base_in_16_bits_the_adapter_computes_in_32(p: float) -> None:
    t = tensors(300, dtype=torch.bfloat16, adapter=torch.float32)
    ours, theirs = outcome(lora_linear, t, p), outcome(plain, t, p)
    assert_like(ours[:2], theirs[:2], 2e-2)
    assert_like(ours[2:], theirs[2:], 1e-5)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_under_autocast_it_computes_in_its_type(p: float) -> None:
    t = tensors(300)
    with torch.autocast("cpu", torch.bfloat16):
        assert_like(outcome(lora_linear, t, p), outcome(plain, t, p), 3e-2)


def kept(layer: AdaptedLayer, x: Tensor) -> list[Tensor]:
    """What the layer keeps for the backward pass, parameters aside."""
    found: list[Tensor] = []
    own = {p.data_ptr() for p in layer.parameters()}
    with saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        layer(x)
    return [t for t in found if t.data_ptr() not in own]


def a_layer(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> AdaptedLayer:
    torch.manual_seed(0)
    layer = adapted(nn.Linear(IN, OUT).to(dtype).requires_grad_(requires_grad=False))
    part = layer.add("default", LoraWeights(layer.base, 4, S, dropout=dropout))
    nn.init.normal_(part.lora_B)
    layer.active = ("default",)
    return layer.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_of_the_input_nothing_is_kept_but_itself(dtype: torch.dtype, dropout: float) -> None:
    x = torch.randn(40, IN, dtype=dtype, requires_grad=True)
    assert {t.data_ptr() for t in kept(a_layer(dropout, dtype), x)} == {x.data_ptr()}


def test_many_rows_in_32_bits_keep_the_effective_weight() -> None:
    layer, x = a_layer(), torch.randn(MANY, IN, requires_grad=True)
    (v,) = [t for t in kept(layer, x) if t.data_ptr() != x.data_ptr()]
    part = layer.adapters["default"]
    torch.testing.assert_close(v, layer.weight + S * part.lora_B @ part.lora_A)


def test_the_backward_pass_draws_no_random_numbers() -> None:
    layer, x = a_layer(0.3), torch.randn(40, IN)
    y = layer(x).sum()
    before = torch.get_rng_state()
    y.backward()
    assert torch.equal(torch.get_rng_state(), before)


def gradients(layer: AdaptedLayer, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    torch.manual_seed(2)
    x = torch.randn(4, 15, IN, requires_grad=True)
    layer.zero_grad()
    run(x).square().sum().backward()
    return [x.grad, *(p.grad for p in layer.adapters.parameters())]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(dropout: float, reentrant: bool) -> None:
    layer = a_layer(dropout)
    again = gradients(layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    for one, other in zip(again, gradients(layer, layer), strict=True):
        assert torch.equal(one, other)


def test_a_kept_graph_gives_the_same_twice() -> None:
    layer = a_layer(0.3)
    y = layer(torch.randn(40, IN)).sum()
    once, twice = (torch.autograd.grad(y, list(layer.adapters.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(once, twice, strict=True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # which dynamo does with all of them
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiled_it_gives_the_same(dropout: float) -> None:
    layer = a_layer(dropout)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager")
    if dropout:
        compiled(torch.randn(4, 15, IN)).sum().backward()  # other random numbers; it runs
        return
    for one, other in zip(gradients(compiled, compiled), gradients(layer, layer), strict=True):
        torch.testing.assert_close(one, other)


def test_a_bias_that_trains_gets_its_gradient() -> None:
    x, w, bias, a, b = tensors(7)
    bias.requires_grad_()
    (ours,) = torch.autograd.grad(LoraProduct.apply(x, w, bias, a, b, S, 0.0).square().sum(), bias)
    (theirs,) = torch.autograd.grad(plain(x, w, bias, (a, b, S)).square().sum(), bias)
    torch.testing.assert_close(ours, theirs)
