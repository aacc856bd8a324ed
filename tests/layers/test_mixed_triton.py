"""Each token's low-rank part is its adapter's, as products of matrices give it, whatever the sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lora_nb as ln
from lora_nb.layers.kernels import kernel
from tests.models import fill
from tests.triton import interpreted

CASES = """
import torch
from lora_nb.layers.mixed_triton import add_low_rank, agrees, fits
from tests.layers.test_mixed_triton import assert_right

torch.manual_seed(0)
count = 0
for sizes in [(1, 1, 1, 1, 1), (5, 3, 8, 72, 80), (7, 2, 24, 1100, 33), (20, 10, 16, 520, 513), (3, 3, 128, 130, 70)]:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert_right(add_low_rank, sizes, dtype)
        count += 1
y, a = torch.zeros(2, 4), torch.zeros(1, 8, 4)
assert fits(y, a, a) and not fits(y.T, a, a) and not fits(y, a, torch.zeros(1, 129, 4).mT) and not fits(y, torch.zeros(1, 136, 4), a)
assert agrees(torch.device("cpu"))
print(count)
"""


def assert_right(function, sizes, dtype, device="cpu") -> None:
    """Against one token after another in fp32; one of them has no adapter, and rows of x lie apart."""
    n, groups, rank, width, out = sizes
    x = torch.randn(n, 2 * width, device=device)[:, ::2].to(dtype)
    y, a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((n, out), (groups, rank, width), (groups, rank, out)))
    whose = torch.randint(groups, (n,), device=device)
    whose[n // 2] = -1 if n > 1 else 0
    expected = y.float()
    for i, g in enumerate(whose.tolist()):
        if g >= 0:
            expected[i] += b[g].float().T @ (a[g].float() @ x[i].float())
    before = y.clone()
    assert function(y, x, a, b, whose) is y
    if n > 1:
        assert torch.equal(y[n // 2], before[n // 2])
    rounding = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert (y.float() - expected).abs().max() <= rounding * expected.abs().max()


def test_in_the_interpreter() -> None:
    assert int(interpreted(CASES)) == 15


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    fast = kernel("mixed_triton", torch.empty(0, device="cuda").device)
    assert fast is not None
    for sizes in [(5, 3, 8, 72, 80), (64, 10, 16, 4096, 4096)]:
        assert_right(fast.add_low_rank, sizes, dtype, "cuda")


@pytest.mark.gpu
def test_a_cuda_graph_serves_other_adapters_at_each_replay() -> None:
    """Who has which adapter is read at the replay, from the tensor that it was recorded with."""
    pytest.importorskip("triton", reason="needs Triton")
    fast = kernel("mixed_triton", torch.empty(0, device="cuda").device)
    weight, x = torch.randn(256, 256, device="cuda"), torch.randn(8, 256, device="cuda")
    a, b = torch.randn(3, 16, 256, device="cuda"), torch.randn(3, 16, 256, device="cuda")
    whose = torch.zeros(8, dtype=torch.long, device="cuda")

    def layer() -> Tensor:
        return fast.add_low_rank(x @ weight.T, x, a, b, whose)

    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer()
    for names in ([0] * 8, [2, 1, 0, -1, -1, 0, 1, 2]):
        whose.copy_(torch.tensor(names))
        graph.replay()
        expected = x @ weight.T
        for i, g in enumerate(names):
            if g >= 0:
                expected[i] += b[g].T @ (a[g] @ x[i])
        torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-1)  # a GPU may multiply fp32 in fewer digits


@pytest.mark.gpu
def test_a_layer_takes_it_for_the_rows_of_a_batch() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(72, 80))
    for i, r in enumerate((3, 8, 17)):
        ln.attach(model, ln.LoraConfig(r=r, lora_alpha=5, target_modules=["0"]), f"r{r}")
        fill(model, f"r{r}", seed=i)
    x, names = torch.randn(5, 1, 72), ["r8", None, "r3", "r17", "r8"]
    with torch.no_grad(), ln.rows(model, names):
        expected = model(x)
    model.cuda()
    with torch.no_grad(), ln.rows(model, names):
        torch.testing.assert_close(model(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
