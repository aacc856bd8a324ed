"""The maths of DoRA: by hand, against PEFT's own layers, and where float32 runs out of digits."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lora_nb as ln
from lora_nb.attach import set_active
from lora_nb.errors import AdapterError, TargetError
from lora_nb.layers import dora
from lora_nb.layers.dora import row_norms
from lora_nb.layers.matrix import as_matrix, matrix
from tests.layers.pairs import BASES, IN, OUT, an_input, assert_near, assert_same, made, on, pair

each_base = pytest.mark.parametrize("kind", BASES)
WITH_BIAS = [kind for kind in BASES if getattr(BASES[kind](), "bias", None) is not None]


# ---- at the start --------------------------------------------------------------------------------------------------


@each_base
@pytest.mark.parametrize("training", [True, False])
def test_the_output_at_the_start_is_the_bases(kind: str, training) -> None:
    base = made(kind).train(training)
    x = an_input(base)
    expected = base(x)
    assert_near(on(base, use_dora=True)(x), expected, 1e-6)


@each_base
def test_the_magnitude_starts_as_the_length_of_each_row(kind: str) -> None:
    layer = on(made(kind), use_dora=True)
    part = layer.adapters["default"]
    rows = as_matrix(layer, layer.weight)
    assert rows.shape[0] == OUT
    torch.testing.assert_close(part.magnitude.flatten(), rows.double().square().sum(1).sqrt().float())
    assert part.magnitude.numel() == OUT


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_a_base_in_16_bits_keeps_its_output(kind: str) -> None:
    base = made(kind, torch.bfloat16)
    x = an_input(base, torch.bfloat16)
    expected = base(x)
    y = on(base, use_dora=True)(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, atol=2e-2, rtol=1e-2)  # two roundings of bfloat16


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "olora"])
def test_every_start_of_a_and_b_leaves_the_output_alone(init: str) -> None:
    base = made("linear")
    x = an_input(base)
    expected = base(x)
    layer = on(base, use_dora=True, init_lora_weights=init)
    assert_near(layer(x), expected, 1e-5)
    assert torch.equal(layer.weight, base.weight)


# ---- by hand -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_two_rows_by_hand() -> None:
    """W = [3 4; 0 5] has rows of length 5; B A adds 2 · [0 0; 1.5 0] · … so the second row becomes (12, 5), of length 13."""
    base = nn.Linear(2, 2)
    base.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 5.0]]))
    base.bias.copy_(torch.tensor([0.5, -1.0]))
    layer = on(base, r=1, lora_alpha=2, use_dora=True)
    part = layer.adapters["default"]
    assert part.magnitude.tolist() == [5, 5]
    part.lora_A.copy_(torch.tensor([[1.0, 0.0]]))
    part.lora_B.copy_(torch.tensor([[0.0], [6.0]]))  # s = 2
    part.magnitude.copy_(torch.tensor([10.0, 26.0]))
    x = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(layer(x), torch.tensor([[2 * 7 + 0.5, 2 * 17 - 1], [2 * 3 + 0.5, 2 * 12 - 1.0]]))
    values = {"weight": base.weight.detach(), "bias": base.bias.detach()}
    part.merge(layer, values)
    torch.testing.assert_close(values["weight"], torch.tensor([[6.0, 8.0], [24.0, 10.0]]))
    assert torch.equal(values["bias"], base.bias)


@torch.no_grad()
def test_the_magnitude_alone_scales_a_channel() -> None:
    layer = on(made("conv2d"), use_dora=True)
    x = an_input(layer.base)
    before = layer(x)
    layer.adapters["default"].magnitude[0, 7] *= 3
    bias = layer.bias[7]
    after = layer(x)
    torch.testing.assert_close(after[:, 7] - bias, 3 * (before[:, 7] - bias), atol=1e-5, rtol=1e-5)
    others = [i for i in range(OUT) if i != 7]
    assert torch.equal(after[:, others], before[:, others])


def test_no_gradient_goes_through_the_norm() -> None:
    """∂L/∂A = s · (m/n) Bᵀ g xᵀ, with n held fast (section 4.3 of the paper)."""
    p = pair("linear without bias", use_dora=True)
    x, g = torch.randn(5, IN), torch.randn(5, OUT)
    (p.ours(x) * g).sum().backward()
    gain = (p.part.magnitude / row_norms(p.ours.weight, p.part.lora_A, p.part.lora_B, 3.0)).detach()
    torch.testing.assert_close(p.part.lora_A.grad, 3.0 * p.part.lora_B.T @ (gain * g).T @ x, atol=1e-5, rtol=1e-5)


# ---- against PEFT --------------------------------------------------------------------------------------------------


@each_base
@pytest.mark.parametrize("rslora", [False, True], ids=["dora", "rslora"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_output_and_gradients_are_pefts(kind: str, rslora, dropout: float) -> None:
    """Of A, B, the magnitude and the input; with the same entries dropped out."""
    p = pair(kind, use_dora=True, use_rslora=rslora, lora_dropout=dropout)
    assert_same(p)
    for mine, _ in p.parameters().values():
        mine.grad = None
    x = an_input(p.base)
    assert_near(p.ours.eval()(x), p.theirs.eval()(x))


@pytest.mark.parametrize("kind", WITH_BIAS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_with_a_bias_that_trains_it_is_pefts(kind: str, dropout: float) -> None:
    """`bias="lora_only"`: in PEFT it is the base's own bias, here a copy of it that stands in."""
    p = pair(kind, use_dora=True, bias="lora_only", lora_dropout=dropout)
    assert p.theirs.base_layer.bias.requires_grad
    assert not torch.equal(p.theirs.base_layer.bias, p.base.bias)
    assert_same(p)
    assert torch.equal(p.ours.bias, p.base.bias)


def test_training_together_for_some_steps_stays_pefts() -> None:
    p = pair("linear", use_dora=True)
    pairs = p.parameters().values()
    optimizers = [torch.optim.AdamW([q[i] for q in pairs], lr=1e-2, weight_decay=0.1) for i in (0, 1)]
    for step in range(5):
        x = torch.randn(6, IN, generator=torch.Generator().manual_seed(step))
        for layer, optimizer in zip((p.ours, p.theirs), optimizers, strict=True):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
    for name, (mine, theirs) in p.parameters().items():
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4, msg=name)


# ---- a bias of the adapter's own, which PEFT does not have beside DoRA -----------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "linear without bias", "Conv1D", "conv1d", "conv2d", "conv2d without bias", "conv3d"])
@torch.no_grad()
def test_a_bias_of_b_is_scaled_as_the_rest_is(kind: str) -> None:
    """h = (m / n)(W x + s(B A x + c)) + b."""
    layer = on(made(kind), use_dora=True, lora_bias=True)
    part, x = layer.adapters["default"], an_input(layer.base)
    nn.init.normal_(part.lora_B)
    before = layer(x)
    nn.init.normal_(part.lora_bias)
    gain = part.magnitude.flatten() / part.norm(layer)
    shape = (-1, *[1] * (before.ndim - 2)) if "conv" in kind else (-1,)
    expected = before + (gain * 3.0 * part.lora_bias).view(shape)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


# ---- merging -------------------------------------------------------------------------------------------------------


@each_base
@torch.no_grad()
def test_merged_weights_give_the_same_output(kind: str) -> None:
    p = pair(kind, use_dora=True)
    x = an_input(p.base)
    expected = p.ours(x)
    values = {n: v.detach() for n, v in p.base.named_parameters()}
    p.part.merge(p.ours, values)
    assert_near(torch.func.functional_call(p.base, values, (x,)), expected)
    p.theirs.merge()
    assert_near(values["weight"], p.theirs.base_layer.weight)


@torch.no_grad()
def test_merging_after_another_adapter_is_as_acting_after_it() -> None:
    """LoRA with a bias first, then DoRA around it: what it adds is scaled, too."""
    model = nn.ModuleDict({"m": made("linear")})
    config = {"r": 4, "lora_alpha": 12, "target_modules": ["m"]}
    ln.attach(model, ln.LoraConfig(**config, lora_bias=True), "plain")
    ln.attach(model, ln.LoraConfig(**config, use_dora=True), "dora")
    for name in ("plain", "dora"):
        for p in ln.parameters(model, name).values():
            p.mul_(1.2).add_(torch.randn_like(p) * 0.2)
    x = an_input(model["m"].base)
    for order in (["plain", "dora"], ["dora", "plain"]):
        set_active(model, order)
        expected = model["m"](x)
        ln.merge(model, order)
        assert_near(model["m"](x), expected)
        ln.unmerge(model)


# ---- the norm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_the_norm_is_that_of_the_sum_whatever_the_blocks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w, a, b = torch.randn(64, 48), torch.randn(4, 48), torch.randn(64, 4)
    monkeypatch.setattr(dora, "CHUNK", 48 * rows)
    exact = (w.double() + 3 * b.double() @ a.double()).norm(dim=1)
    torch.testing.assert_close(row_norms(w, a, b, 3.0).double(), exact, atol=1e-5, rtol=1e-5)


def nearly_cancelled() -> tuple[Tensor, Tensor, Tensor]:
    """W = U V plus a thousandth of something else, and A, B with s · B A = −0.999 U V at s = 3."""
    u, v = torch.randn(64, 4), torch.randn(4, 48)
    return u @ v + 1e-3 * torch.randn(64, 48), v, -0.999 / 3 * u


def test_the_norm_keeps_its_digits_where_the_update_nearly_cancels_the_weight() -> None:
    """‖W‖² + 2s⟨W, BA⟩ + s²‖BA‖², the shorter formula, does not."""
    w, a, b = nearly_cancelled()
    exact = (w.double() + 3 * b.double() @ a.double()).norm(dim=1)
    assert (exact / w.double().norm(dim=1)).max() < 3e-3

    def error(norms: Tensor) -> float:
        return float((norms.double() / exact - 1).abs().max())

    ba = b @ a
    short = w.square().sum(1) + 6 * (w * ba).sum(1) + 9 * ba.square().sum(1)
    assert error(row_norms(w, a, b, 3.0)) < 1e-4
    assert error(short.clamp_min(0).sqrt()) > 1e-2


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_the_output_keeps_them_too_which_pefts_does_not(rows: int, gradients) -> None:
    """W x and s · B A x cancel as their weights do: summed afterwards, a thousandth of the digits is left."""
    w, a, b = nearly_cancelled()
    base = nn.Linear(48, 64)
    with torch.no_grad():
        base.weight.copy_(w)
    p = pair(base, use_dora=True)
    with torch.no_grad():
        for (mine, theirs), value in zip((p.parameters()["A"], p.parameters()["B"]), (a, b), strict=True):
            mine.copy_(value)
            theirs.copy_(value)
        p.part.magnitude.copy_(w.norm(dim=1))
        p.theirs.lora_magnitude_vector["default"].weight.copy_(w.norm(dim=1))
    x = torch.randn(rows, 48)
    direction = w.double() + 3 * b.double() @ a.double()
    exact = x.double() @ (direction * (w.double().norm(dim=1) / direction.norm(dim=1))[:, None]).T + base.bias.double()
    with torch.set_grad_enabled(gradients):
        errors = [float((layer(x).detach() - exact).abs().max() / exact.abs().max()) for layer in (p.ours, p.theirs)]
    assert errors[0] < 1e-4  # what float32 leaves of W + sBA
    assert errors[0] < errors[1] / 3


def test_where_little_is_left_of_the_weight_the_gradients_are_still_pefts() -> None:
    p = pair("linear", use_dora=True)
    with torch.no_grad():
        for magnitude in p.parameters()["magnitude"]:
            magnitude.mul_(20)  # as far above the norm as cancelling takes it
    assert_same(p)
    assert p.part.cancels()


class Counted:
    """`row_norms`, and how often it was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        monkeypatch.setattr(dora, "row_norms", self)

    def __call__(self, *args: object) -> Tensor:
        self.calls += 1
        return row_norms(*args)

    def since(self) -> int:
        calls, self.calls = self.calls, 0
        return calls


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda mode: mode.__name__)
def test_the_norm_is_computed_once_per_value(kind: str, mode, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = on(made(kind), use_dora=True)
    nn.init.normal_(layer.adapters["default"].lora_B)
    count, x = Counted(monkeypatch), an_input(layer.base)
    with mode():
        for _ in range(5):
            layer(x)
    assert count.since() == 1


def changes() -> dict[str, object]:
    def step(layer: nn.Module) -> None:
        layer(an_input(layer.base)).square().sum().backward()
        torch.optim.AdamW(layer.adapters.parameters(), lr=0.5).step()

    def load(layer: nn.Module) -> None:
        layer.load_state_dict({key: t + 0.5 for key, t in layer.state_dict().items()})

    @torch.no_grad()
    def copied(layer: nn.Module) -> None:
        layer.adapters["default"].lora_B.copy_(torch.randn(OUT, 4))

    @torch.no_grad()
    def base(layer: nn.Module) -> None:
        layer.weight.mul_(2)

    def replaced(layer: nn.Module) -> None:
        layer.weight = nn.Parameter(torch.randn(OUT, IN), requires_grad=False)

    def retyped(layer: nn.Module) -> None:
        layer.to(torch.bfloat16).to(torch.float32)

    return {f.__name__: f for f in (step, load, copied, base, replaced, retyped)}


@pytest.mark.parametrize("change", changes())
def test_the_norm_follows_every_change(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = on(made("linear"), use_dora=True)
    part = layer.adapters["default"]
    nn.init.normal_(part.lora_B)
    layer(an_input(layer.base))
    changes()[change](layer)
    count = Counted(monkeypatch)
    for _ in range(3):
        layer(an_input(layer.base))
    assert count.since() == 1
    exact = (matrix(layer).double() + part.delta().double()).norm(dim=1).float()
    torch.testing.assert_close(part.norm(layer), exact, atol=1e-5, rtol=1e-5)


def test_a_copy_of_the_layer_follows_its_own_changes() -> None:
    layer = on(made("linear"), use_dora=True)
    x = an_input(layer.base)
    layer(x)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.adapters["default"].lora_B.normal_()
    expected = (matrix(twin).double() + twin.adapters["default"].delta().double()).norm(dim=1).float()
    torch.testing.assert_close(twin.adapters["default"].norm(twin), expected, atol=1e-5, rtol=1e-5)
    assert_near(layer(x), layer.base(x), 1e-6)


# ---- refused -------------------------------------------------------------------------------------------------------


def test_a_convolution_in_groups_is_refused() -> None:
    """PEFT multiplies B as (out/groups, r) by A there, which is no update of these weights."""
    model = nn.ModuleDict({"m": nn.Conv2d(12, 20, 3, groups=4)})
    with pytest.raises(TargetError, match=r"'m' is a convolution of 4 groups.*neither DoRA's norm nor PiSSA's start.*exclude_modules"):
        ln.attach(model, ln.LoraConfig(r=4, lora_alpha=12, target_modules=["m"], use_dora=True))


@torch.no_grad()
def test_a_bias_that_has_no_place_is_not_merged() -> None:
    model = nn.ModuleDict({"m": made("linear without bias")})
    ln.attach(model, ln.LoraConfig(r=4, lora_alpha=12, target_modules=["m"], use_dora=True, lora_bias=True))
    nn.init.normal_(model["m"].adapters["default"].lora_bias)
    with pytest.raises(AdapterError, match=r"no bias that could take the adapter's \(lora_bias\)"):
        ln.merge(model)
