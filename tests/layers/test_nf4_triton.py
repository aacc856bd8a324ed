"""The Triton kernel gives the bits that `dequantize` gives, run by Triton's interpreter and, where there is one, on a GPU."""

from __future__ import annotations

import pytest
import torch

from lora_nb.layers.kernels import kernel
from lora_nb.layers.nf4 import dequantize, quantize
from tests.triton import interpreted

CASES = """
import torch
from lora_nb.layers.nf4 import dequantize, quantize
from lora_nb.layers.nf4_triton import agrees, dequantize_triton
from lora_nb.layers.quantized import QuantizedTensor

torch.manual_seed(0)
count = 0
for shape in [(64,), (8, 96), (33, 65), (3, 5, 64), (70, 257)]:
    for block in (32, 64, 256, 4096):
        for double in (False, True):
            for kind in ("nf4", "fp4"):
                q = quantize(torch.randn(shape), block, double, quant_type=kind)
                for dtype in (torch.float32, torch.float16, torch.bfloat16):
                    ours, expected = dequantize_triton(q, dtype), dequantize(q, dtype)
                    if dtype == torch.bfloat16:  # the interpreter, not the GPU, cuts digits off where it should round
                        expected = (dequantize(q, torch.float32).view(torch.int32) & -65536).view(torch.float32).bfloat16()
                    assert ours.dtype == dtype and ours.shape == expected.shape
                    assert torch.equal(ours, expected), (shape, block, double, kind, dtype, (ours.float() - expected.float()).abs().max())
                    count += 1
odd = QuantizedTensor(torch.randint(256, (48, 1), dtype=torch.uint8), torch.rand(2), (96,), torch.float32, block_size=48)
assert torch.equal(dequantize_triton(odd), dequantize(odd))  # of a file: no tile is cut for it
assert agrees(torch.device("cpu"))
print(count)
"""


def test_in_the_interpreter() -> None:
    assert int(interpreted(CASES)) == 240


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    for shape in [(1152, 4304), (8, 96), (4096, 4096)]:
        for double in (False, True):
            q = quantize(torch.randn(shape), 64, double)
            assert kernel("nf4_triton", q.to("cuda").packed.device) is not None
            for dtype in (torch.float32, torch.bfloat16):
                assert torch.equal(dequantize(q.to("cuda"), dtype).cpu(), dequantize(q, dtype))
