"""The product in 16 bits, its two passes, and who does the work; and the kernel, forward and transposed."""

from __future__ import annotations

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import Tensor, nn

import lora_nb as ln
from lora_nb.attach import weights
from lora_nb.fusing import fused
from lora_nb.layers import lora_gpu
from lora_nb.layers.kernels import kernel
from lora_nb.layers.linear4bit import Linear4bit
from lora_nb.layers.lora_gpu import LoraProduct16, over_four_bits, product, suits, suits_four_bits
from lora_nb.layers.lora_linear import lora_linear
from lora_nb.layers.nf4 import dequantize, quantize
from tests.triton import interpreted

S = 2.5
FORMS = [(), ("bias",), ("back",), ("bias", "back")]
CASES = """
import torch
from lora_nb.layers.lora_triton import ROWS, agrees, product
from tests.layers.test_lora_gpu import FORMS, assert_right

torch.manual_seed(0)
count = 0
for sizes in [(1, 1, 1, 1), (5, 72, 80, 3), (ROWS + 2, 65, 300, 16), (ROWS * 9, 40, 257, 24)]:
    for dtype in (torch.float32, torch.float16):  # the interpreter cannot multiply bfloat16
        for form in FORMS:
            assert_right(product, sizes, form, dtype)
            count += 1
assert agrees(torch.device("cpu"))
print(count)
"""


def tensors(sizes: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """x, W, bias, A, B."""
    n, width, out, r = sizes
    return [torch.randn(shape, dtype=dtype, device=device) for shape in ((n, width), (out, width), (out,), (r, width), (out, r))]


def assert_right(function, sizes, form, dtype, device="cpu") -> None:
    """Against the plain expression in fp32. The form: with a bias, and with all of it transposed, as the backward pass has it."""
    x, w, bias, a, b = tensors(sizes, dtype, device)
    if "back" in form:
        x, w, bias, a, b = torch.randn(len(x), len(w), dtype=dtype, device=device), w.T, x[0], b.T, a.T
    y, h = function(x, w, bias if "bias" in form else None, a, b, S)
    low = x.float() @ a.float().T
    expected = x.float() @ w.float().T + S * low @ b.float().T + (bias.float() if "bias" in form else 0)
    assert y.dtype == h.dtype == dtype
    rounding = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for ours, theirs in ((y, expected), (h, low)):
        assert (ours.float() - theirs).abs().max() <= rounding * theirs.abs().max()


def test_in_the_interpreter() -> None:
    assert int(interpreted(CASES)) == 32


@pytest.mark.parametrize("form", FORMS)
def test_by_steps(form) -> None:
    assert_right(product, (5, 72, 80, 3), form, torch.float32)


def test_the_gradients_are_those_of_finite_differences() -> None:
    x, w, bias, a, b = (t.requires_grad_(i != 1) for i, t in enumerate(tensors((5, 12, 20, 3), torch.float64)))
    assert torch.autograd.gradcheck(lambda x, bias, a, b: LoraProduct16.apply(x, w, bias, a, b, S), (x, bias, a, b))


def test_the_lowest_layers_input_needs_no_gradient() -> None:
    x, w, bias, a, b = tensors((5, 12, 20, 3), torch.float64)
    pairs = []
    for function in (LoraProduct16.apply, lambda x, w, bias, a, b, s: lora_linear(x, w, bias, (a, b, s))):
        own = [t.clone().requires_grad_() for t in (a, b)]
        function(x, w, bias, *own, S).square().sum().backward()
        pairs.append([t.grad for t in own])
    torch.testing.assert_close(*pairs)


def test_what_it_is_for() -> None:
    x, w, _, a, _ = tensors((5, 12, 20, 3), torch.bfloat16)
    assert not suits(x, w, a, 0.0)  # on a CPU


@pytest.mark.parametrize("quick", [False, True])
def test_the_quicker_way_is_taken(quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []

    class Fast:
        @staticmethod
        def product(*_):
            return "kernel", "h"

    monkeypatch.setattr(lora_gpu, "kernel", lambda name, _: Fast if name == "lora_triton" else None)
    monkeypatch.setattr(lora_gpu, "quicker", lambda _, key, ours, theirs: keys.append((key, ours()[0], theirs()[0].shape)) or quick)
    x, w, bias, a, b = tensors((lora_gpu.MANY, 12, 20, 3), torch.float32)
    for rows, s in ((x, S), (torch.cat([x, x[1:]]), S)):
        found = product(rows, w, bias, a, b, s)[0]
        assert (found == "kernel") if quick else found.shape == (len(rows), 20)
    assert len({key for key, *_ in keys}) == 1  # a few rows more are no new shape
    assert {kind for _, kind, _ in keys} == {"kernel"}
    product(x[1:], w, bias, a, b, S)
    product(x, w, bias, *(torch.randn(s) for s in ((lora_gpu.MOST + 1, 12), (20, lora_gpu.MOST + 1))), S)
    assert len(keys) == 2  # too few rows, too large a rank: not even measured


# ---- over four bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [False, True])
def test_the_gradients_over_four_bits_are_those_of_finite_differences(double: bool) -> None:
    x, w, bias, a, b = (t.requires_grad_(i != 1) for i, t in enumerate(tensors((5, 12, 20, 3), torch.float64)))
    packed = quantize(w.float(), double_quant=double)
    assert torch.autograd.gradcheck(lambda *own: LoraProduct16.apply(own[0], packed, *own[1:], S), (x, bias, a, b))
    y = LoraProduct16.apply(x, packed, bias, a, b, S)
    torch.testing.assert_close(y, LoraProduct16.apply(x, dequantize(packed, torch.float64), bias, a, b, S), rtol=0, atol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_with_dropout_the_gradients_are_those_of_the_mask_that_was_drawn(packed: bool) -> None:
    x, w, bias, a, b = (t.requires_grad_(i != 1) for i, t in enumerate(tensors((5, 12, 20, 3), torch.float64)))
    given = quantize(w.float()) if packed else w
    w = dequantize(given, torch.float64) if packed else w

    def ours(x: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(7)
        return LoraProduct16.apply(x, given, bias, a, b, S, 0.4)

    torch.manual_seed(7)
    seen = nn.functional.dropout(x, 0.4)
    expected = x @ w.T + bias + S * seen @ a.T @ b.T
    after = torch.rand(1)
    y = ours(x, bias, a, b)
    assert torch.rand(1) == after
    state = torch.get_rng_state()
    pairs = [[z, *torch.autograd.grad(z.sin().sum(), (x, bias, a, b))] for z in (y, expected)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(*pairs)
    assert torch.autograd.gradcheck(ours, (x, bias, a, b))


class Net(nn.Module):
    """One linear layer, where PEFT finds it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def in_four_bits(*, double: bool = True, compute=torch.bfloat16, **more) -> Net:
    """A layer of ours, 128 → 64, with LoRA around it."""
    torch.manual_seed(0)
    layer = Linear4bit(128, 64, compute_dtype=compute)
    layer.hold(quantize(torch.randn(64, 128), double_quant=double))
    nn.init.normal_(layer.bias.requires_grad_(False))
    net = Net(layer)
    ln.attach(net, ln.LoraConfig(r=4, lora_alpha=12, target_modules=["layer"], **more))
    for part in weights(net, "default").values():
        nn.init.normal_(part.lora_B, std=0.3)
    return net.train()


def of_peft(ours: Net, double: bool) -> nn.Module:
    """The same weights and adapter in PEFT around bitsandbytes."""
    layer, part = ours.layer, weights(ours, "default")["layer"]
    state = layer.quantized.state_dict("weight")
    theirs = bnb.nn.Linear4bit(128, 64, bias=True, quant_type="nf4", compute_dtype=torch.bfloat16, compress_statistics=double)
    parts = {key.removeprefix("weight."): t for key, t in state.items() if key != "weight"}
    theirs.weight = bnb.nn.Params4bit.from_prequantized(state["weight"], parts, device="cpu", module=theirs)
    theirs.bias.data.copy_(layer.bias)
    net = Net(theirs)
    net.is_loaded_in_4bit = True
    made = peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=12, target_modules=["layer"]), net)
    for name in ("lora_A", "lora_B"):
        getattr(made.layer, name)["default"].weight.data.copy_(getattr(part, name))
    return made.train()


def learnt(net: nn.Module, *, autocast: torch.dtype | None = torch.bfloat16, dtype=torch.bfloat16) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of x, A and B; and what autograd kept that is large and not x itself."""
    x = torch.randn(3, 50, 128, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    params = [p for n, p in net.named_parameters() if "lora_" in n]
    kept: dict[int, Tensor] = {}
    keeping = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t)
    with keeping, torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = net(x)
    loss = (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
    grads = torch.autograd.grad(loss, [x, *params])
    return [y.detach(), *grads], [t for t in kept.values() if t.numel() >= y.numel() and t.data_ptr() != x.data_ptr()]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU on the CPU, where PyTorch's operators do its work."""
    monkeypatch.setattr(lora_gpu, "DEVICES", {"cpu"})


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("double", [False, True])
def test_over_four_bits_it_is_what_it_was_and_what_peft_has_to_rounding_and_keeps_less(double: bool) -> None:
    net = in_four_bits(double=double)
    plain, kept = learnt(net)
    theirs, _ = learnt(of_peft(net, double))
    with fused(net):
        ours, mine = learnt(net)
    for one, other, peers in zip(ours, plain, theirs, strict=True):
        assert one.dtype == other.dtype
        for twin in (other, peers):
            assert (one.float() - twin.float()).abs().max() <= 2e-2 * twin.float().abs().max()
    assert kept
    assert not mine


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_autocast_all_has_one_type(dtype: torch.dtype) -> None:
    net = in_four_bits(compute=None)
    for part in weights(net, "default").values():
        part.to(dtype)
    plain = learnt(net, autocast=None, dtype=dtype)[0]
    with fused(net):
        for one, other in zip(learnt(net, autocast=None, dtype=dtype)[0], plain, strict=True):
            assert one.dtype == other.dtype == dtype
            assert (one.float() - other.float()).abs().max() <= 2e-2 * other.float().abs().max()


@pytest.mark.usefixtures("here")
def test_dropout_over_four_bits_acts_while_it_trains_and_keeps_no_mask() -> None:
    net, plain = in_four_bits(lora_dropout=0.4), learnt(in_four_bits())[0]
    with fused(net):
        torch.manual_seed(1)
        (once, *_), kept = learnt(net)
        torch.manual_seed(1)
        assert torch.equal(once, learnt(net)[0][0])
        assert not torch.equal(once, learnt(net)[0][0])
        assert not kept
        for one, other in zip(learnt(net.eval())[0], plain, strict=True):
            assert (one.float() - other.float()).abs().max() <= 2e-2 * other.float().abs().max()


@pytest.mark.usefixtures("here")
def test_what_is_more_than_that_goes_its_old_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_nb.fusing.over_four_bits", lambda *_: pytest.fail("taken"))
    changes = [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}]
    for net, settings in [(in_four_bits(**change), {}) for change in changes] + [
        (in_four_bits(), {"autocast": None}),  # an adapter in 32 bits around products in 16
        (in_four_bits(), {"autocast": None, "dtype": torch.float32}),
    ]:
        with fused(net):
            learnt(net, **settings)
    net, twin = in_four_bits(), in_four_bits()
    twin.layer.base.register_forward_hook(lambda _module, _inputs, y: y * 2)
    ln.attach(net, ln.LoraConfig(r=2, lora_alpha=5, target_modules=["layer"]), "second")
    ln.set_active(net, ["default", "second"])
    for model in (net, twin):
        with fused(model):
            learnt(model)
    with fused(twin), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        twin(torch.randn(2, 128))
    ln.set_active(net, [])
    with fused(net), torch.autocast("cpu", torch.bfloat16):
        net(torch.randn(2, 128))


def test_on_a_cpu_it_is_not_taken() -> None:
    x, _, _, a, _ = tensors((5, 12, 20, 3), torch.bfloat16)
    assert not suits_four_bits(x, a, None)


@pytest.mark.usefixtures("here")
def test_the_lowest_layers_weight_is_not_dequantized_on_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(lora_gpu, "dequantize", lambda *given: calls.append(given) or dequantize(*given))
    x, w, bias, a, b = tensors((5, 128, 20, 3), torch.bfloat16)
    for learns, expected in ((False, 1), (True, 2)):
        calls.clear()
        y = over_four_bits(x.detach().requires_grad_(learns), quantize(w), bias, (a.requires_grad_(), b, S))
        y.sum().backward()
        assert len(calls) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    fast = kernel("lora_triton", torch.empty(0, device="cuda").device)
    assert fast is not None
    for sizes in [(1000, 200, 300, 5), (4096, 2048, 8192, 16)]:
        for form in FORMS:
            assert_right(fast.product, sizes, form, dtype, "cuda")


@pytest.mark.gpu
def test_a_layer_on_a_gpu_learns_as_on_a_cpu() -> None:
    grads = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        torch.manual_seed(0)
        x, w, bias, a, b = (t.to(device, dtype) for t in tensors((1024, 256, 512, 16), torch.float32))
        own = [t.requires_grad_() for t in (x, a, b)]
        assert suits(x, w, a, 0.0) == (device == "cuda")
        y = lora_linear(x, w, bias, (a, b, S))
        weights = torch.linspace(-1, 1, y.numel()).view_as(y).to(device)
        (y.float() * weights).sum().backward()
        grads.append([y, *(t.grad for t in own)])
    for one, other in zip(*grads, strict=True):
        assert (one.float() - other.float().cpu()).abs().max() <= 3e-2 * one.float().abs().max()
