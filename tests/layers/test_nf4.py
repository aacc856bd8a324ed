"""Four bits: the levels, the bytes and the numbers of bitsandbytes, and what is right where bitsandbytes 0.50 is not."""

from __future__ import annotations

import dataclasses
import gc
import random

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import numpy as np
import pytest
import torch

from lora_nb.errors import QuantizationError
from lora_nb.layers import recycled
from lora_nb.layers.nf4 import SIZES, dequantize, dequantize_textbook, quantize, quantize_textbook, sorted_levels
from lora_nb.layers.quantized import LEVELS, QuantizedTensor, dynamic_map, fp4_levels, nf4_levels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Dettmers et al., 2023, appendix E.
PUBLISHED = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


def reference(q: QuantizedTensor) -> np.ndarray:
    """ŵ in float64, by hand: nibble, level, scale of the block that the weight lies in."""
    packed = q.packed.flatten().numpy()
    index = np.stack([packed >> 4, packed & 15], 1).flatten()[: q.numel()]
    levels = LEVELS[q.quant_type].double().numpy()
    scales = q.absmax.double().numpy()
    if q.nested_absmax is not None and q.nested_code is not None:
        nested = q.nested_absmax.double().numpy()[np.arange(len(q.absmax)) // q.nested_block_size]
        scales = q.nested_code.double().numpy()[q.absmax.numpy()] * nested + q.nested_offset
    return (levels[index] * scales[np.arange(q.numel()) // q.block_size]).reshape(q.shape)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


class TestLevels:
    def test_nf4_is_the_published_table(self) -> None:
        assert nf4_levels().tolist() == PUBLISHED

    @pytest.mark.parametrize(("kind", "levels"), [("nf4", nf4_levels), ("fp4", fp4_levels)])
    def test_both_are_bitsandbytes_own(self, kind, levels) -> None:
        assert torch.equal(levels(), bnbf.get_4bit_type(kind, "cpu"))

    def test_the_dynamic_map_is_bitsandbytes_own(self) -> None:
        assert torch.equal(dynamic_map(), bnbf.create_dynamic_map())

    def test_they_do_not_depend_on_the_default_device(self) -> None:
        with torch.device("meta"):
            assert nf4_levels().tolist() == PUBLISHED


class TestByHand:
    def test_one_block(self) -> None:
        weight = torch.zeros(32)
        weight[:5] = torch.tensor([2.0, -2.0, 0.0, 0.5, -0.1])
        q = quantize(weight, 32)
        assert q.absmax.tolist() == [2.0]
        # 1 → 15, −1 → 0; 0 → 7, 0.25 is next to 0.2461 → 10; −0.05 lies nearer to −0.0911 than to 0 → 6
        assert [hex(b) for b in q.packed.flatten()[:3].tolist()] == ["0xf0", "0x7a", "0x67"]
        assert dequantize(q)[:5].tolist() == [2.0, -2.0, 0.0, 2 * PUBLISHED[10], 2 * PUBLISHED[6]]

    @pytest.mark.parametrize("kind", ["nf4", "fp4"])
    def test_a_weight_on_a_border_goes_down_and_one_above_it_up(self, kind: str) -> None:
        levels, _, borders = sorted_levels(kind)
        block = torch.cat([torch.ones(1), borders, torch.nextafter(borders, torch.tensor(2.0)), torch.zeros(1)])
        for made in (quantize(block, 32, quant_type=kind), quantize_textbook(block, 32, quant_type=kind)):
            values = dequantize(made)
            assert torch.equal(values[1:16], levels[:-1])
            assert torch.equal(values[16:31], levels[1:])

    def test_zeros_stay_zeros(self) -> None:
        for double in (False, True):
            assert dequantize(quantize(torch.zeros(3, 50), 64, double)).abs().max() == 0

    def test_requantizing_changes_nothing(self) -> None:
        once = dequantize(quantize(torch.randn(64, 64)))
        assert torch.equal(dequantize(quantize(once)), once)


def cases(n: int = 200):
    """Shapes, types and settings at random, with blocks of zeros among them; whole rows of blocks in half of them."""
    draw = random.Random(4)
    for i in range(n):
        block = draw.choice(SIZES[:6])
        last = block * draw.randint(1, 6) if i % 2 else draw.randint(1, 700)
        shape = (*(draw.randint(1, 40) for _ in range(draw.choice([0, 1, 1, 2]))), last)
        generator = torch.Generator().manual_seed(i)
        weight = torch.randn(shape, generator=generator) * draw.choice([1e-3, 1.0, 30.0])
        if draw.random() < 0.2:
            weight.view(-1)[: 2 * block] = 0
        yield weight.to(draw.choice(DTYPES)), block, draw.random() < 0.5, draw.choice(["nf4", "nf4", "fp4"])


def test_200_random_tensors_to_the_bit_as_bitsandbytes() -> None:
    compared = 0
    for weight, block, double, kind in cases():
        packed, state = bnbf.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=double)
        ours = quantize(weight, block, double, quant_type=kind)
        theirs = {f"w.{key}": t for key, t in state.as_dict(packed=True).items()} | {"w": packed}
        written = ours.state_dict("w")
        assert written.keys() == theirs.keys()
        assert all(written[k].dtype == t.dtype and torch.equal(written[k], t) for k, t in theirs.items()), (weight.shape, block, kind)
        values = dequantize(ours)
        assert values.shape == weight.shape
        assert values.dtype == weight.dtype
        if weight.shape[-1] % block == 0:  # else bitsandbytes 0.50 is wrong, see below
            compared += 1
            assert torch.equal(values, bnbf.dequantize_4bit(packed, state).view(weight.shape)), (weight.shape, block, kind)
    assert compared > 90


@pytest.mark.parametrize("threads", [1, 2])
def test_textbook_and_fast_give_the_same_bits(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for weight, block, double, kind in [
            *cases(60),
            (torch.randn(600, 1000), 64, True, "nf4"),
            (torch.randn(520, 1024), 4096, False, "fp4"),
        ]:
            fast, slow = (f(weight, block, double, quant_type=kind) for f in (quantize, quantize_textbook))
            for field in dataclasses.fields(fast):
                a, b = getattr(fast, field.name), getattr(slow, field.name)
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            for dtype in (None, torch.float32, torch.bfloat16, torch.float64):
                assert torch.equal(dequantize(fast, dtype), dequantize_textbook(fast, dtype))
    finally:
        torch.set_num_threads(before)


class TestWhereBitsandbytesIsWrong:
    """Version 0.50 on a CPU takes the scales row by row; when a row is no whole number of blocks they are other ones."""

    @pytest.mark.parametrize("shape", [(1152, 4304), (8, 96)])  # SigLIP's second MLP layer; the smallest such case
    @pytest.mark.parametrize("double", [False, True])
    def test_rows_that_are_no_whole_number_of_blocks(self, shape, double: bool) -> None:
        weight = torch.randn(shape)
        ours = quantize(weight, 64, double)
        values = dequantize(ours)
        assert np.abs(values.double().numpy() - reference(ours)).max() < 1e-6  # one rounding to fp32
        assert 0.08 < relative(values, weight) < 0.1

    @pytest.mark.parametrize("double", [False, True])
    def test_a_state_dict_after_an_evaluation(self, double: bool) -> None:
        from lora_nb.layers.linear4bit import Linear4bit, dense_weight

        torch.manual_seed(2)
        weight = torch.randn(128, 256)
        ours = quantize(weight, 64, double)
        theirs = bnb.nn.Linear4bit(256, 128, bias=False, quant_type="nf4", compress_statistics=double)
        theirs.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=double).to("cpu")
        before = {key: t.clone() for key, t in theirs.state_dict().items()}
        theirs.eval()
        layer = Linear4bit(256, 128, bias=False)
        layer.hold(ours)
        layer.eval()
        with torch.no_grad():
            theirs(torch.randn(1, 256))  # where the processor has bfloat16 products it packs its weights anew, in place
            layer(torch.randn(1, 256))
        assert all(torch.equal(layer.state_dict()[key], before[key]) for key in before)
        assert np.abs(dense_weight(layer).double().numpy() - reference(ours)).max() < 1e-6
        assert relative(dense_weight(theirs), torch.from_numpy(reference(ours))) < 3e-3

    def test_one_dimension_keeps_its_shape(self) -> None:
        assert dequantize(quantize(torch.randn(100))).shape == (100,)


class TestSizes:
    def test_double_quantization_takes_4_127_bits(self) -> None:
        weight = torch.randn(512, 512)
        assert abs(quantize(weight, double_quant=True).bits_per_parameter - 4.127) < 5e-4
        assert quantize(weight).bits_per_parameter == 4.5

    # Of Gaussian weights, 1024 × 1024; the relative L2 error 0.0920 and bitsandbytes' own tests' mean absolute errors.
    @pytest.mark.parametrize(("block", "mean_absolute"), [(32, 0.067746), (64, 0.072798), (128, 0.076831), (4096, 0.092547)])
    def test_errors_on_gaussian_weights(self, block: int, mean_absolute: float) -> None:
        weight = torch.randn(1024, 1024)
        values = dequantize(quantize(weight, block))
        assert float((values - weight).abs().mean()) == pytest.approx(mean_absolute, abs=5e-4)
        if block == 64:
            assert relative(values, weight) == pytest.approx(0.0920, abs=5e-4)
            assert relative(dequantize(quantize(weight, block, double_quant=True)), weight) == pytest.approx(0.0920, abs=5e-4)
            assert float((dequantize(quantize(weight, quant_type="fp4")) - weight).abs().mean()) == pytest.approx(0.096543, abs=5e-4)


def said(old: bytes, new: bytes):
    """The description with some of its bytes replaced."""
    return lambda t: torch.tensor(list(bytes(t.tolist()).replace(old, new)), dtype=torch.uint8)


STATE = "w.quant_state.bitsandbytes__nf4"
# What is wrong → key, how it comes about, and what the refusal says.
DAMAGES = {
    "a byte too few": ("w", lambda t: t[:-1], "packed is"),
    "signed bytes": ("w", lambda t: t.view(torch.int8), "packed is"),
    "a scale too few": ("w.absmax", lambda t: t[:-1], "absmax is"),
    "other levels": ("w.quant_map", lambda t: t.flip(0), "not the table of 'nf4'"),
    "eight levels": ("w.quant_map", lambda t: t[:8], "not the table of 'nf4'"),
    "scales of scales NaN": ("w.nested_absmax", lambda t: torch.full_like(t, float("nan")), "NaN or infinity"),
    "scales of scales missing": ("w.nested_absmax", lambda t: t[:0], "nested_absmax is"),
    "another map": ("w.nested_quant_map", lambda t: t * 0.9, "not the signed dynamic map"),
    "text cut short": (STATE, lambda t: t[:-3], "cannot be read"),
    "another shape": (STATE, said(b"[8, 96]", b"[8, 95]"), "cut short"),
    "another type": (STATE, said(b"nf4", b"nf5"), "described as"),
    "blocks of -1": (STATE, said(b'"blocksize": 64', b'"blocksize": -1'), "is damaged|cut short"),
    "blocks of 0": (STATE, said(b'"blocksize": 64', b'"blocksize": 0'), "is damaged"),
    "no shape": (STATE, said(b'"shape"', b'"shapes"'), "is damaged"),
    "float64": (STATE, said(b"float32", b"float64"), "is damaged"),
}


class TestRefusals:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("place", [0, -1])
    def test_weights_that_are_not_finite(self, bad: float, place: int) -> None:
        weight = torch.randn(9, 50)
        weight.view(-1)[place] = bad
        for make in (quantize, quantize_textbook):
            with pytest.raises(QuantizationError, match="NaN or infinity"):
                make(weight)

    @pytest.mark.parametrize(
        ("weight", "settings", "words"),
        [
            (torch.randn(4, 4).double(), {}, "convert it to float32"),
            (torch.zeros(4, dtype=torch.int8), {}, "convert it to float32"),
            (torch.empty(0, 8), {}, "nothing in it"),
            (torch.randn(8), {"block_size": 60}, "block_size=60: there are 32, 64"),
            (torch.randn(8), {"quant_type": "nf3"}, "'nf3': there are 'nf4', 'fp4'"),
        ],
    )
    def test_what_cannot_be_quantized(self, weight, settings, words: str) -> None:
        with pytest.raises(QuantizationError, match=words):
            quantize(weight, **settings)

    @pytest.mark.parametrize("double", [False, True])
    @pytest.mark.parametrize("damage", list(DAMAGES))
    def test_damaged_states(self, double: bool, damage: str) -> None:
        key, change, words = DAMAGES[damage]
        state = quantize(torch.randn(8, 96), 64, double).state_dict("w")
        if key not in state:
            pytest.skip("only with double quantization")
        state[key] = change(state[key])
        with pytest.raises(QuantizationError, match=words):
            QuantizedTensor.from_state_dict(state, "w")

    def test_nan_scales(self) -> None:
        q = quantize(torch.randn(8, 96))
        broken = dataclasses.replace(q, absmax=torch.full_like(q.absmax, float("nan")))
        with pytest.raises(QuantizationError, match="NaN or infinity"):
            broken.checked()
        with pytest.raises(QuantizationError, match="NaN or infinity"):
            dequantize(broken)
        with pytest.raises(QuantizationError, match="NaN or infinity"):
            QuantizedTensor.from_state_dict(broken.state_dict("w"), "w")

    @pytest.mark.parametrize(
        "key", ["w", "w.absmax", "w.quant_map", "w.nested_absmax", "w.nested_quant_map", "w.quant_state.bitsandbytes__nf4"]
    )
    def test_something_missing(self, key: str) -> None:
        state = quantize(torch.randn(8, 64), 64, double_quant=True).state_dict("w")
        del state[key]
        with pytest.raises(QuantizationError, match=r"missing|0 descriptions"):
            QuantizedTensor.from_state_dict(state, "w")

    def test_something_more(self) -> None:
        state = quantize(torch.randn(8, 64)).state_dict("w") | {"w.zero_point": torch.zeros(1)}
        with pytest.raises(QuantizationError, match="zero_point"):
            QuantizedTensor.from_state_dict(state, "w")


VIEWS = {
    "transposed": lambda t: t.T,
    "a part": lambda t: t[3:9, 5],
    "numpy": lambda t: t.numpy(),
    "parameter": torch.nn.Parameter,
    "detached": lambda t: t.view(-1).detach(),
}


class TestRecycledMemory:
    """A result's memory is used again once nobody holds it, and never before."""

    def test_a_held_result_keeps_its_values(self) -> None:
        qs = [quantize(torch.randn(600, 512)) for _ in range(3)]
        held = [dequantize(q) for q in qs]
        assert all(torch.equal(h, dequantize_textbook(q)) for h, q in zip(held, qs, strict=True))
        assert len({h.data_ptr() for h in held}) == 3

    @pytest.mark.parametrize("name", list(VIEWS))
    def test_so_does_a_view_of_one_that_is_gone(self, name: str) -> None:
        view = VIEWS[name]
        q, other = quantize(torch.randn(600, 512)), quantize(torch.randn(600, 512))
        kept = view(dequantize(q))
        gc.collect()
        dequantize(other)
        assert torch.equal(torch.as_tensor(kept), torch.as_tensor(view(dequantize_textbook(q))))

    def test_memory_of_a_dropped_result_is_used_again(self) -> None:
        q = quantize(torch.randn(600, 512))
        place = dequantize(q).data_ptr()
        assert dequantize(q).data_ptr() == place

    def test_it_can_be_given_back(self) -> None:
        dequantize(quantize(torch.randn(600, 512)))
        assert recycled.release() >= 600 * 512 * 4
        assert recycled.release() == 0

    def test_what_is_kept_has_a_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        recycled.release()
        monkeypatch.setattr(recycled, "LARGEST", 3 << 20)
        for n in range(5):
            recycled.empty((1 << 18) + n, torch.float32)
        assert sum(recycled.KEPT) <= 3 << 20


def test_on_the_meta_device_shapes_come_out() -> None:
    q = quantize(torch.empty(8, 96, device="meta"), 64, double_quant=True)
    assert dequantize(q).shape == (8, 96)
    assert dequantize(q).is_meta
    assert q.bits_per_parameter == quantize(torch.randn(8, 96), 64, double_quant=True).bits_per_parameter


@pytest.mark.gpu
def test_on_a_gpu_the_bits_are_those_of_the_cpu() -> None:
    for weight, block, double, kind in cases(60):
        cpu, gpu = (quantize(w, block, double, quant_type=kind) for w in (weight, weight.cuda()))
        assert torch.equal(gpu.packed.cpu(), cpu.packed)
        assert torch.equal(dequantize(cpu.to("cuda")).cpu(), dequantize(cpu))
