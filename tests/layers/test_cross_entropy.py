"""Loss and gradient at once are those that autograd finds on PyTorch's cross-entropy; by PyTorch's operators and by the kernel."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lora_nb.layers.cross_entropy import loss_and_gradient
from lora_nb.layers.kernels import kernel
from tests.triton import interpreted

HEADS = [(1.0, None), (0.25, None), (1.0, 30.0), (0.5, 4.0)]
CASES = """
import torch
from lora_nb.layers.cross_entropy_triton import BLOCK, agrees, loss_and_gradient
from tests.layers.test_cross_entropy import HEADS, assert_right

torch.manual_seed(0)
count = 0
for sizes in [(1, 5), (3, 259), (2, BLOCK), (2, BLOCK + 1), (0, 7)]:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for head in HEADS:
            assert_right(loss_and_gradient, sizes, head, dtype)
            count += 1
assert agrees(torch.device("cpu"))
print(count)
"""


def assert_right(function, sizes, head, dtype, device="cpu") -> None:
    """In fp32 to a few units of rounding; in 16 bits to the rounding of the gradient."""
    (n, vocabulary), (scale, cap) = sizes, head
    u = (9 * torch.randn(n, vocabulary, device=device)).to(dtype)
    goals = torch.randint(vocabulary, (n,), device=device)
    own = u.float().clone().requires_grad_()
    z = own * scale if cap is None else torch.tanh(own * scale / cap) * cap
    expected = F.cross_entropy(z, goals, reduction="sum")
    (slopes,) = torch.autograd.grad(expected, own)
    loss, gradient = function(u, goals, scale, cap)
    assert gradient.data_ptr() == u.data_ptr()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    rounding = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(gradient.float(), slopes, rtol=rounding, atol=2e-6)


def test_by_hand() -> None:
    """Logits 0 and ln 3 have probabilities 1/4 and 3/4."""
    loss, gradient = loss_and_gradient(torch.tensor([[0.0, math.log(3)]]), torch.tensor([0]))
    assert float(loss) == pytest.approx(math.log(4))
    assert gradient[0].tolist() == pytest.approx([-0.75, 0.75])


@pytest.mark.parametrize("head", HEADS)
def test_by_steps(head) -> None:
    for sizes in [(1, 5), (3, 259)]:
        assert_right(loss_and_gradient, sizes, head, torch.float32)


def test_in_the_interpreter() -> None:
    assert int(interpreted(CASES)) == 60


@pytest.mark.gpu
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(head, dtype) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    fast = kernel("cross_entropy_triton", torch.empty(0, device="cuda").device)
    assert fast is not None
    for sizes in [(3, 259), (64, 128256)]:
        assert_right(fast.loss_and_gradient, sizes, head, dtype, "cuda")
