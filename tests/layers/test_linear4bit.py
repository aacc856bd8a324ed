"""The frozen linear layer in four bits: its products, what it keeps, and that it can be moved, copied, saved and compiled."""

from __future__ import annotations

import copy
import io
import pickle

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_nb.errors import QuantizationError
from lora_nb.layers.linear4bit import Linear4bit, dense_weight, is_quantized
from lora_nb.layers.nf4 import dequantize, quantize


def layer(out: int = 48, wide: int = 100, *, bias: bool = True, dtype=torch.float32, compute=None, **settings) -> Linear4bit:
    made = Linear4bit(wide, out, bias=bias, compute_dtype=compute)
    made.hold(quantize(torch.randn(out, wide).to(dtype), **settings))
    if bias:
        nn.init.normal_(made.bias)
    return made


class TestProducts:
    @pytest.mark.parametrize("shape", [(7, 100), (2, 3, 100), (100,)])
    @pytest.mark.parametrize("settings", [{}, {"double_quant": True}, {"quant_type": "fp4", "block_size": 128}])
    def test_output_and_gradients_are_those_of_the_dense_weight(self, shape, settings) -> None:
        ours = layer(**settings)
        weight = dequantize(ours.quantized)
        x, twin = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
        bias = ours.bias.detach().clone().requires_grad_()
        y, expected = ours(x), F.linear(twin, weight, bias)
        assert torch.equal(y, expected)
        grad = torch.randn(y.shape)
        y.backward(grad)
        expected.backward(grad)
        torch.testing.assert_close(x.grad, twin.grad)
        torch.testing.assert_close(ours.bias.grad, bias.grad)

    def test_the_training_path_of_bitsandbytes_gives_the_same_bits(self) -> None:
        weight = torch.randn(64, 128).bfloat16()
        theirs = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
        theirs.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", module=theirs).to("cpu")
        ours = Linear4bit(128, 64, bias=False, compute_dtype=torch.bfloat16)
        ours.hold(quantize(weight, double_quant=True))
        grads = []
        for made in (ours, theirs.train()):
            x = torch.randn(9, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
            y = made(x)
            y.sum().backward()
            grads += [y.detach(), x.grad]
        assert torch.equal(grads[0], grads[2])
        assert torch.equal(grads[1], grads[3])

    def test_nothing_dense_is_kept_for_the_backward_pass(self) -> None:
        ours = layer(256, 256, bias=False)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            y = ours(torch.randn(4, 256, requires_grad=True))
        assert max(kept, default=0) <= 4 * 256
        y.sum().backward()

    def test_types(self) -> None:
        for kept, compute, given in [
            (torch.float32, None, torch.bfloat16),
            (torch.bfloat16, torch.float32, torch.bfloat16),
            (torch.float16, torch.bfloat16, torch.float32),
        ]:
            y = layer(dtype=kept, compute=compute)(torch.randn(3, 100, dtype=given))
            assert y.dtype == given
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(compute=torch.float32)(torch.randn(3, 100)).dtype == torch.bfloat16


class TestModule:
    def test_a_change_of_type_leaves_the_weight_alone(self) -> None:
        for double in (False, True):
            ours = layer(double_quant=double)
            before = dequantize(ours.quantized)
            ours.to(torch.bfloat16).half()
            assert torch.equal(dequantize(ours.quantized), before)
            assert ours.bias.dtype == torch.float16

    @pytest.mark.parametrize("double", [False, True])
    def test_copies(self, double: bool) -> None:
        ours, x = layer(double_quant=double), torch.randn(2, 100)
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)):  # noqa: S301 - our own
            assert torch.equal(twin(x), ours(x))
            assert twin.weight.data_ptr() != ours.weight.data_ptr()
            assert not twin.weight.requires_grad

    def test_devices(self) -> None:
        assert layer(double_quant=True).to("meta").quantized.packed.is_meta
        assert layer().cpu()(torch.randn(1, 100)).shape == (1, 48)

    def test_a_linear_layer_by_its_class_and_looks(self) -> None:
        ours = layer()
        assert isinstance(ours, nn.Linear)
        assert (ours.in_features, ours.out_features) == (100, 48)
        assert "nf4, 4.500 bits" in repr(layer(128, 64))
        assert is_quantized(ours)
        assert not is_quantized(nn.Linear(2, 2))

    @pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")  # torch does
    def test_torch_compile(self) -> None:
        ours, x = layer(double_quant=True), torch.randn(5, 100, requires_grad=True)
        expected = torch.autograd.grad(ours(x).square().sum(), x)[0]
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), x)[0], expected)

    def test_an_empty_one_says_so(self) -> None:
        with pytest.raises(QuantizationError, match="empty"):
            Linear4bit(4, 4)(torch.randn(1, 4))


class TestState:
    @pytest.mark.parametrize("double", [False, True])
    def test_round_trip(self, double: bool) -> None:
        ours, twin = layer(double_quant=double), Linear4bit(100, 48)
        twin.load_state_dict(ours.state_dict())
        x = torch.randn(2, 100)
        assert torch.equal(twin(x), ours(x))

    @pytest.mark.parametrize("double", [False, True])
    def test_bitsandbytes_reads_ours_and_we_theirs(self, double: bool) -> None:
        weight = torch.randn(48, 128)
        theirs = bnb.nn.Linear4bit(128, 48, bias=False, quant_type="nf4", compress_statistics=double)
        theirs.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=double).to("cpu")
        ours = Linear4bit(128, 48, bias=False)
        ours.load_state_dict(theirs.state_dict())
        assert torch.equal(dense_weight(ours), dense_weight(theirs))
        state = ours.state_dict()
        stats = {key.removeprefix("weight."): t for key, t in state.items() if key != "weight"}
        back = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
        assert torch.equal(bnb.functional.dequantize_4bit(back.data, back.quant_state), dense_weight(ours))

    def test_what_does_not_fit_changes_nothing(self) -> None:
        ours = layer()
        before = {key: t.clone() for key, t in ours.state_dict().items()}
        other = layer(49).state_dict()
        nan = layer().state_dict()
        nan["weight.absmax"] = torch.full_like(nan["weight.absmax"], float("nan"))
        dense = {"weight": torch.randn(48, 100), "bias": torch.zeros(48)}
        for state, words in [
            (other, "does not fit"),
            (nan, "NaN or infinity"),
            (dense, "load it into the model before quantize"),
            (before | {"bias": torch.zeros(47)}, "bias of"),
            ({key: t for key, t in before.items() if key != "weight.absmax"}, "absmax' is missing"),
            ({"bias": before["bias"]}, "Missing key"),
            (before | {"extra": torch.zeros(1)}, "Unexpected key"),
        ]:
            with pytest.raises(RuntimeError, match=words):
                ours.load_state_dict(state)
            assert all(torch.equal(t, before[key]) for key, t in ours.state_dict().items())

    def test_a_weight_of_another_shape_is_not_held(self) -> None:
        with pytest.raises(QuantizationError, match="does not fit"):
            Linear4bit(100, 48).hold(quantize(torch.randn(100, 48)))


class TestDenseWeight:
    @pytest.mark.parametrize("kind", ["nf4", "fp4"])
    @pytest.mark.parametrize("wide", [128, 96])  # the second is no whole number of blocks, where bitsandbytes itself is wrong
    def test_of_bitsandbytes_four_bits(self, kind: str, wide: int) -> None:
        weight = torch.randn(8, wide)
        theirs = bnb.nn.Linear4bit(wide, 8, bias=False, quant_type=kind)
        theirs.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type=kind).to("cpu")
        assert torch.equal(dense_weight(theirs), dequantize(quantize(weight, double_quant=True, quant_type=kind)))

    def test_of_bitsandbytes_eight_bits(self) -> None:
        weight = torch.randn(16, 32)
        theirs = bnb.nn.Linear8bitLt(32, 16, bias=False, has_fp16_weights=False)
        theirs.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
        before = dense_weight(theirs)
        assert (before - weight).abs().max() < weight.abs().max() / 127
        theirs(torch.randn(1, 32, dtype=torch.float16))  # moves the scales elsewhere
        assert torch.equal(dense_weight(theirs), before)
