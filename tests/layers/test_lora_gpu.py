"""The product in 16 bits, its two passes, and who does the work; and the kernel, forward and transposed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_nb.layers import lora_gpu
from lora_nb.layers.kernels import kernel
from lora_nb.layers.lora_gpu import LoraProduct16, product, suits
from lora_nb.layers.lora_linear import lora_linear
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
    monkeypatch.setattr(lora_gpu, "quicker", lambda key, ours, theirs: keys.append((key, ours()[0], theirs()[0].shape)) or quick)
    x, w, bias, a, b = tensors((lora_gpu.MANY, 12, 20, 3), torch.float32)
    for rows, s in ((x, S), (torch.cat([x, x[1:]]), S)):
        found = product(rows, w, bias, a, b, s)[0]
        assert (found == "kernel") if quick else found.shape == (len(rows), 20)
    assert len({key for key, *_ in keys}) == 1  # a few rows more are no new shape
    assert {kind for _, kind, _ in keys} == {"kernel"}
    product(x[1:], w, bias, a, b, S)
    product(x, w, bias, *(torch.randn(s) for s in ((lora_gpu.MOST + 1, 12), (20, lora_gpu.MOST + 1))), S)
    assert len(keys) == 2  # too few rows, too large a rank: not even measured


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
