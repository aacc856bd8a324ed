"""Where A and B start: the output is the base's whatever the start, and the base's bytes are untouched, where PEFT changes them."""

import copy
import math
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_nb as ln
from lora_nb.layers.lora_init import start
from lora_nb.layers.matrix import matrix
from tests.layers.pairs import IN, OUT, an_input, assert_near, made, on
from tests.models import peft_layers, peft_parameters, tiny_gpt2, tiny_llama, token_ids, under_peft

LINEAR = ["linear", "linear without bias", "Conv1D"]
CONVOLUTIONS = ["conv1d", "conv2d", "conv3d"]
PLAIN = [True, "gaussian", "orthogonal"]
FROM_WEIGHT = ["pissa", "pissa_niter_4", "olora"]
PREFIX = "base_model.model."


def config(**more: object) -> ln.LoraConfig:
    return ln.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["m"]} | more)


# ---- every start ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LINEAR + CONVOLUTIONS)
@pytest.mark.parametrize("init", PLAIN + FROM_WEIGHT)
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_the_output_stays_the_bases_and_so_do_its_bytes(kind: str, init: bool | str, rslora) -> None:
    base = made(kind)
    before, x = copy.deepcopy(base.state_dict()), an_input(base)
    layer = on(base, init_lora_weights=init, use_rslora=rslora)
    assert_near(layer(x), base(x), 1e-6 if init is not True and init != "gaussian" else 0.0)
    assert all(torch.equal(t, before[name]) for name, t in base.state_dict().items())
    assert layer.weight is base.weight


@pytest.mark.parametrize("init", FROM_WEIGHT)
def test_a_trained_adapter_that_is_set_back_to_its_start_is_the_base_again(init: str) -> None:
    layer = on(made("linear"), init_lora_weights=init)
    part, x = layer.adapters["default"], an_input(layer.base)
    with torch.no_grad():
        part.lora_A.add_(0.5)
        assert not torch.allclose(layer(x), layer.base(x), atol=1e-2)
        part.lora_A.copy_(part.start_a)
        part.lora_B.copy_(part.start_b)
    assert_near(layer(x), layer.base(x), 1e-6)


@pytest.mark.parametrize("init", [*PLAIN, *FROM_WEIGHT])
def test_what_trains_is_a_and_b_of_the_rank_asked_for(init: bool | str) -> None:
    model = nn.ModuleDict({"m": made("linear")})
    report = ln.attach(model, config(init_lora_weights=init))
    assert report.trainable == 4 * (IN + OUT) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert set(ln.parameters(model)) == {"m.adapters.default.lora_A", "m.adapters.default.lora_B"}


@pytest.mark.parametrize("init", FROM_WEIGHT)
def test_the_first_step_is_that_of_peft(init: str) -> None:
    """The gradients of A and of B, both; PEFT's base gives up what ours subtracts."""
    base = made("linear")
    theirs = peft_layers(under_peft(nn.ModuleDict({"m": copy.deepcopy(base)}), config(init_lora_weights=init)))["m"]
    ours, x, g = on(base, init_lora_weights=init), torch.randn(6, IN), torch.randn(6, OUT)
    part, (a, b) = ours.adapters["default"], peft_parameters(theirs)
    with torch.no_grad():  # the signs and a random SVD aside
        for p, q in ((part.lora_A, a), (part.lora_B, b)):
            p.copy_(q)
        part.start_a.copy_(a)
        part.start_b.copy_(b)
    for layer in (ours, theirs):
        (layer(x) * g).sum().backward()
    assert_near(part.lora_A.grad, a.grad)
    assert_near(part.lora_B.grad, b.grad)
    assert a.grad.abs().max() > 0.1


# ---- PiSSA and OLoRA against PEFT -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "init"), [(kind, init) for kind in LINEAR for init in ("pissa", "olora") if (kind, init) != ("Conv1D", "olora")]
)
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_a_and_b_are_pefts_up_to_sign(kind: str, init: str, rslora) -> None:
    """And PEFT's base is another one afterwards."""
    base = made(kind)
    theirs = peft_layers(under_peft(nn.ModuleDict({"m": copy.deepcopy(base)}), config(init_lora_weights=init, use_rslora=rslora)))["m"]
    part = on(base, init_lora_weights=init, use_rslora=rslora).adapters["default"]
    a, b = peft_parameters(theirs)
    signs = torch.sign((part.lora_A * a).sum(1))
    assert signs.abs().all()
    torch.testing.assert_close(part.lora_A, signs[:, None] * a, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(part.lora_B, signs * b, atol=1e-5, rtol=1e-5)
    assert (theirs.base_layer.weight - base.weight).abs().max() > 1e-2


def test_olora_on_conv1d_fails_in_peft_and_works_here() -> None:
    """PEFT takes the QR of W as it is stored there, (in, out), and gets an A that the input does not fit."""
    base = made("Conv1D")
    theirs = peft_layers(under_peft(nn.ModuleDict({"m": copy.deepcopy(base)}), config(init_lora_weights="olora")))["m"]
    with pytest.raises(RuntimeError):
        theirs(an_input(base))
    part = on(base, init_lora_weights="olora").adapters["default"]
    torch.testing.assert_close(part.lora_B @ part.lora_B.T @ base.weight.T, part.lora_B @ part.lora_A, atol=1e-5, rtol=1e-5)


def test_pissa_is_the_best_approximation_of_its_rank() -> None:
    """s · B A is W's truncated SVD (Eckart and Young), in equal parts on both sides."""
    layer = on(made("linear"), init_lora_weights="pissa")
    part, (_, sizes, _) = layer.adapters["default"], torch.linalg.svd(layer.weight)
    rest = layer.weight - 3.0 * part.lora_B @ part.lora_A
    torch.testing.assert_close(torch.linalg.svdvals(rest)[: IN - 4], sizes[4:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(part.lora_A @ part.lora_A.T, torch.diag(sizes[:4] / 3), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(part.lora_B.T @ part.lora_B, torch.diag(sizes[:4] / 3), atol=1e-5, rtol=1e-5)


def test_the_randomised_pissa_is_near_the_exact_one() -> None:
    base = nn.Linear(64, 48)
    with torch.no_grad():  # singular values that fall off, as a trained layer's do
        base.weight.copy_(torch.randn(48, 48) * 2.0 ** -torch.arange(48) @ torch.randn(48, 64))
    exact, fast = (on(copy.deepcopy(base), init_lora_weights=init).adapters["default"] for init in ("pissa", "pissa_niter_4"))
    left = [float((base.weight - 3.0 * part.lora_B @ part.lora_A).detach().norm()) for part in (exact, fast)]
    assert left[0] < left[1] < 1.01 * left[0] < 0.2 * base.weight.detach().norm()


def test_olora_starts_with_an_orthonormal_b() -> None:
    part = on(made("linear"), init_lora_weights="olora").adapters["default"]
    torch.testing.assert_close(part.lora_B.T @ part.lora_B, torch.eye(4), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv3d"])
def test_of_a_kernel_the_flat_matrix_is_taken_apart(kind: str) -> None:
    layer = on(made(kind), init_lora_weights="pissa")
    part, w = layer.adapters["default"], matrix(layer)
    rest = w - 3.0 * part.lora_B.flatten(1) @ part.lora_A.flatten(1)
    torch.testing.assert_close(torch.linalg.svdvals(rest)[:4], torch.linalg.svdvals(w)[4:8], atol=1e-5, rtol=1e-5)


# ---- orthogonal ----------------------------------------------------------------------------------------------------


def test_orthogonal_a_and_b_cancel_without_being_zero() -> None:
    part = on(made("linear"), r=6, init_lora_weights="orthogonal").adapters["default"]
    assert part.lora_A.abs().mean() > 0.01
    assert part.lora_B.abs().mean() > 0.01
    assert (part.lora_B @ part.lora_A).abs().max() < 1e-6
    assert torch.linalg.matrix_rank(part.lora_A) == torch.linalg.matrix_rank(part.lora_B) == 3
    assert part.start_a is None


def test_orthogonal_entries_are_as_large_as_pefts() -> None:
    base = nn.Linear(256, 192)
    ours = on(copy.deepcopy(base), r=32, init_lora_weights="orthogonal").adapters["default"]
    theirs = peft_parameters(peft_layers(under_peft(nn.ModuleDict({"m": base}), config(r=32, init_lora_weights="orthogonal")))["m"])
    for mine, other in zip((ours.lora_A, ours.lora_B), theirs, strict=True):
        assert mine.std().item() == pytest.approx(other.std().item(), rel=0.1)
        assert mine.mean().abs() < 0.01


# ---- the maths at random ---------------------------------------------------------------------------------------------


@given(
    r=st.sampled_from([2, 4, 6]),
    sizes=st.tuples(st.integers(6, 20), st.integers(6, 20)),
    init=st.sampled_from([*PLAIN, *FROM_WEIGHT]),
    scaling=st.floats(0.1, 8),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_the_update_is_zero_at_the_start(r: int, sizes: tuple[int, int], init: bool | str, scaling: float, seed: int) -> None:
    """s(B A − B₀ A₀) = 0 for every size; A's gradient too, where B is zero."""
    torch.manual_seed(seed)
    w, a, b = torch.randn(sizes), torch.empty(r, sizes[1]), torch.empty(sizes[0], r)
    a0, b0 = start(a, b, init, lambda: w, scaling)
    update: Tensor = b @ a - (b0 @ a0 if a0 is not None and b0 is not None else 0)
    assert update.abs().max() < 1e-5
    assert (a0 is None) == (init in PLAIN)
    assert a.abs().sum() > 0
    if init in (True, "gaussian"):
        assert not b.any()
    if init is True:
        assert a.abs().max() <= 1 / math.sqrt(sizes[1])


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("init", FROM_WEIGHT)
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_peft_reads_what_is_saved_to_the_same_output(make, init: str, rslora, tmp_path: Path) -> None:
    """As plain LoRA of twice the rank; ours is trained a little first."""
    model, original = make(), make()
    ends = {"r": 3, "lora_alpha": 7, "rank_pattern": {r".*\.1\..*": 2}, "alpha_pattern": {r".*\.2\..*": 5}}
    ln.attach(model, ln.LoraConfig(**ends, init_lora_weights=init, use_rslora=rslora))
    with torch.no_grad():
        for p in ln.parameters(model).values():
            p.add_(torch.randn_like(p) * 0.05)
        expected = model(input_ids=token_ids()).logits
        assert not torch.allclose(expected, original(input_ids=token_ids()).logits, atol=1e-2)
        theirs = peft.PeftModel.from_pretrained(make(), ln.save(model, tmp_path)).eval()
        torch.testing.assert_close(theirs(input_ids=token_ids()).logits, expected, atol=1e-5, rtol=1e-5)
        ours = make()
        ln.load_adapter(ours, tmp_path)
        torch.testing.assert_close(ours(input_ids=token_ids()).logits, expected, atol=1e-5, rtol=1e-5)
    assert theirs.peft_config["default"].r == 6


@pytest.mark.parametrize("init", FROM_WEIGHT)
def test_the_constants_travel_with_a_copy_and_a_state_dict(init: str) -> None:
    layer = on(made("linear"), init_lora_weights=init)
    twin, x = copy.deepcopy(layer), an_input(layer.base)
    assert torch.equal(twin(x), layer(x))
    assert {"adapters.default.start_a", "adapters.default.start_b"} <= set(layer.state_dict())
