"""The maths of LoRA: by hand, by identities, and against PEFT's own layers."""

import math
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from lora_nb.configs import LoraConfig
from lora_nb.layers.adapted import AdaptedEmbedding, AdaptedLayer, AdaptedLinear
from lora_nb.layers.adapted import adapted as stand_in
from lora_nb.layers.lora import LoraWeights, weights_class
from lora_nb.layers.matrix import is_conv1d, matrix
from tests.layers.pairs import an_input as picture
from tests.layers.pairs import assert_near, assert_same, on, pair
from tests.layers.pairs import made as convolution
from tests.models import peft_layers, peft_parameters, under_peft

IN, OUT, VOCABULARY = 12, 20, 30
BASES = {
    "linear": lambda: nn.Linear(IN, OUT),
    "linear without bias": lambda: nn.Linear(IN, OUT, bias=False),
    "conv1d": lambda: Conv1D(OUT, IN),
    "embedding": lambda: nn.Embedding(VOCABULARY, OUT),
    "embedding with padding": lambda: nn.Embedding(VOCABULARY, OUT, padding_idx=3),
    "scaled embedding": lambda: Gemma3TextScaledWordEmbedding(VOCABULARY, OUT, padding_idx=0, embed_scale=5.0),
}
each_base = pytest.mark.parametrize("kind", BASES)


def made(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    base = BASES[kind]().to(dtype)
    if hasattr(base, "bias") and base.bias is not None:
        nn.init.normal_(base.bias)
    return base.requires_grad_(requires_grad=False)


def an_input(base: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    if isinstance(base, nn.Embedding):
        return torch.randint(VOCABULARY, (4, 15))  # sixty draws of thirty tokens: some come twice, some are padding
    return torch.randn(4, 15, IN, dtype=dtype)


def adapted(base: nn.Module, r: int = 4, scaling: float = 3.0, *, dropout: float = 0.0, trained: bool = False) -> AdaptedLayer:
    """`base` with one active adapter, `default`; `trained` gives it random weights."""
    layer = stand_in(base)
    new = add(layer, "default", r, scaling, dropout=dropout)
    layer.active = ("default",)
    if trained:
        nn.init.normal_(new.lora_A)
        nn.init.normal_(new.lora_B)
    return layer


def add(layer: AdaptedLayer, name: str, r: int, scaling: float, *, dropout: float = 0.0, init: bool | str = True) -> LoraWeights:
    return layer.add(name, weights_class(layer)(layer.base, r, scaling, dropout=dropout), init)


def weights(layer: AdaptedLayer, name: str = "default") -> LoraWeights:
    return layer.adapters[name]


# ---- at the start --------------------------------------------------------------------------------------------------


@each_base
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_at_the_start_is_the_bases_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    base = made(kind, dtype)
    x = an_input(base, dtype)
    y = adapted(base)(x)
    assert y.dtype == dtype
    assert torch.equal(y, base(x))


@each_base
def test_in_the_first_step_only_the_matrix_that_starts_at_zero_learns(kind: str) -> None:
    """∂L/∂A = s·Bᵀ(∂L/∂h)xᵀ with B = 0; for an embedding A is the zero one."""
    base = made(kind)
    layer = adapted(base)
    (layer(an_input(base)) * torch.randn(OUT)).sum().backward()
    zero, other = ("lora_A", "lora_B") if isinstance(base, nn.Embedding) else ("lora_B", "lora_A")
    assert not getattr(weights(layer), zero).any()
    assert getattr(weights(layer), zero).grad.abs().max() > 1e-3
    assert torch.equal(getattr(weights(layer), other).grad, torch.zeros_like(getattr(weights(layer), other)))


@each_base
@pytest.mark.parametrize("r", [1, 4, 12])
def test_an_adapter_has_r_times_in_plus_out_parameters(kind: str, r: int) -> None:
    base = made(kind)
    fan_in = VOCABULARY if isinstance(base, nn.Embedding) else IN
    layer = adapted(base, r)
    assert matrix(layer).shape == (OUT, fan_in)
    assert sum(p.numel() for p in weights(layer).parameters()) == r * (fan_in + OUT)


@torch.no_grad()
def same_distribution(one: Tensor, other: Tensor) -> bool:
    """The test of Kolmogorov and Smirnov for two samples, at one per cent."""
    one, other = one.flatten().sort().values, other.flatten().sort().values
    at = torch.cat([one, other])
    share = [torch.searchsorted(sample, at, right=True) / len(sample) for sample in (one, other)]
    return bool((share[0] - share[1]).abs().max() < 1.63 * math.sqrt(1 / len(one) + 1 / len(other)))


def test_the_test_of_distributions_tells_a_small_difference() -> None:
    assert same_distribution(torch.randn(4096), torch.randn(4096))
    assert not same_distribution(torch.randn(4096), 1.2 * torch.randn(4096))


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_a_starts_as_in_peft(init: bool | str) -> None:
    config = LoraConfig(r=16, lora_alpha=48, target_modules=["m"], init_lora_weights=init)
    theirs = peft_parameters(peft_layers(under_peft(nn.ModuleDict({"m": nn.Linear(256, 64)}), config))["m"])
    ours = add(AdaptedLinear(nn.Linear(256, 64)), "default", 16, 3.0, init=init)
    assert same_distribution(ours.lora_A, theirs[0])
    if init == "gaussian":
        assert same_distribution(ours.lora_A, torch.randn(100_000) / 16)
    else:
        assert same_distribution(ours.lora_A, torch.linspace(-1, 1, 100_000) / math.sqrt(256))
        assert ours.lora_A.abs().max() <= 1 / math.sqrt(256)
    assert not ours.lora_B.any()
    assert not theirs[1].any()


def test_an_embeddings_b_starts_as_in_peft() -> None:
    config = LoraConfig(r=16, lora_alpha=48, target_modules=["m"])
    theirs = peft_parameters(peft_layers(under_peft(nn.ModuleDict({"m": nn.Embedding(64, 256)}), config))["m"])
    ours = add(AdaptedEmbedding(nn.Embedding(64, 256)), "default", 16, 3.0)
    assert same_distribution(ours.lora_B, theirs[1])
    assert same_distribution(ours.lora_B, torch.randn(100_000))
    assert not ours.lora_A.any()
    assert not theirs[0].any()


# ---- by hand -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def one_entry(layer: AdaptedLayer, column: int, row: int) -> None:
    """A lets only entry `column` of the input in, at double; B writes it to entry `row` of the output."""
    w = weights(layer)
    w.lora_A.zero_()[1, column] = 2.0
    w.lora_B.zero_()[row, 1] = 1.0


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_one_entry_of_the_input_reaches_one_of_the_output_by_hand(kind: str) -> None:
    base = made(kind)
    layer = adapted(base, scaling=1.5)
    one_entry(layer, column=7, row=13)
    x = torch.arange(IN, dtype=torch.float32)
    expected = torch.zeros(OUT)
    expected[13] = 1.5 * 2 * 7
    torch.testing.assert_close(layer(x) - base(x), expected)


def test_one_token_gets_one_entry_by_hand() -> None:
    base = made("embedding")
    nn.init.zeros_(base.weight)
    layer = adapted(base, scaling=1.5)
    one_entry(layer, column=7, row=13)
    expected = torch.zeros(3, OUT)
    expected[1, 13] = 1.5 * 2
    assert torch.equal(layer(torch.tensor([6, 7, 13])), expected)


# ---- identities ----------------------------------------------------------------------------------------------------


@each_base
def test_delta_is_the_difference_of_outputs_on_the_identity(kind: str) -> None:
    base = made(kind)
    layer = adapted(base, trained=True)
    identity = torch.arange(VOCABULARY) if isinstance(base, nn.Embedding) else torch.eye(IN)
    delta = weights(layer).delta()
    assert delta.shape == (OUT, matrix(layer).shape[1])
    factor = 5.0 if kind == "scaled embedding" else 1.0  # W + delta is what this base would scale
    torch.testing.assert_close(layer(identity) - base(identity), factor * delta.T, atol=1e-5, rtol=1e-5)


@each_base
def test_adapters_add_up_and_only_the_active_ones_act(kind: str) -> None:
    base = made(kind)
    layer, x = adapted(base, trained=True), an_input(base)
    nn.init.normal_(add(layer, "other", 2, 0.7).lora_A)
    nn.init.normal_(weights(layer, "other").lora_B)
    outputs = {}
    for active in ((), ("default",), ("other",), ("default", "other"), ("other", "default")):
        layer.active = active
        outputs[active] = layer(x)
    assert torch.equal(outputs[()], base(x))
    updates = [outputs[(name,)] - base(x) for name in ("default", "other")]
    assert all(u.abs().max() > 0.1 for u in updates)
    torch.testing.assert_close(outputs["default", "other"], base(x) + updates[0] + updates[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs["default", "other"], outputs["other", "default"], atol=1e-5, rtol=1e-5)


def test_the_update_has_the_rank_asked_for() -> None:
    assert torch.linalg.matrix_rank(weights(adapted(made("linear"), 5, trained=True)).delta()) == 5


# ---- dropout -------------------------------------------------------------------------------------------------------


def bare(dropout: float) -> tuple[AdaptedLayer, Tensor, Tensor]:
    """A layer whose update is three times its input, the input, and the update that came out while training."""
    base = nn.Linear(8, 8)
    layer = adapted(base, 8, 3.0, dropout=dropout)
    with torch.no_grad():
        weights(layer).lora_A.copy_(torch.eye(8))
        weights(layer).lora_B.copy_(torch.eye(8))
    x = torch.rand(2000, 8) + 1
    return layer, x, layer.train()(x) - base(x)


def test_dropout_zeroes_entries_of_the_adapters_input_and_scales_the_rest() -> None:
    _, x, update = bare(0.25)
    kept = update.abs() > 1e-4
    torch.testing.assert_close(update[kept], (3 * x / 0.75)[kept], atol=1e-5, rtol=1e-5)
    assert abs(kept.float().mean() - 0.75) < 4 * math.sqrt(0.25 * 0.75 / kept.numel())


def test_dropout_leaves_the_expectation_alone() -> None:
    _, x, update = bare(0.25)
    error = (update - 3 * x).mean(0)
    assert (error.abs() < 5 * (update - 3 * x).std(0) / math.sqrt(len(x))).all()


def test_dropout_rests_while_evaluating_and_differs_from_call_to_call_while_training() -> None:
    layer, x, update = bare(0.25)
    assert not torch.equal(layer(x) - layer.base(x), update)
    layer.eval()
    torch.testing.assert_close(layer(x) - layer.base(x), 3 * x, atol=1e-5, rtol=1e-5)


@each_base
@pytest.mark.parametrize("training", [True, False])
def test_a_new_adapter_is_in_the_bases_mode(kind: str, training) -> None:
    """from_pretrained gives a model in eval mode: an adapter put on it must not drop anything out."""
    layer = adapted(made(kind).train(training), dropout=0.5)
    assert {m.training for m in layer.modules()} == {training}


# ---- against PEFT --------------------------------------------------------------------------------------------------


def both(kind: str, config: LoraConfig, dtype: torch.dtype = torch.float32) -> tuple[SimpleNamespace, SimpleNamespace]:
    """Output and gradients, ours and PEFT's, with the same base, A, B, input and random numbers."""
    base = made(kind, dtype)
    ours = adapted(base, config.r, config.scaling(config.r, config.lora_alpha), dropout=config.lora_dropout, trained=True)
    theirs = peft_layers(under_peft(nn.ModuleDict({"m": base}), config))["m"]
    pairs = (weights(ours).lora_A, weights(ours).lora_B), peft_parameters(theirs)
    with torch.no_grad():
        for p, q in zip(*pairs, strict=True):
            assert p.dtype == q.dtype == torch.float32
            q.copy_(p)
    x, out = an_input(base, dtype), []
    weight = torch.randn(OUT, dtype=dtype)
    for layer, (a, b) in zip((ours, theirs), pairs, strict=True):
        inputs = x.clone().requires_grad_(x.is_floating_point())
        torch.manual_seed(1)
        y = layer.train()(inputs)
        (y * weight).sum().backward()
        out.append(SimpleNamespace(y=y.detach(), a=a.grad, b=b.grad, x=inputs.grad, layer=layer, inputs=x))
    return out[0], out[1]


@each_base
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_output_and_gradients_are_pefts(kind: str, rslora, dropout: float) -> None:
    """Dropout too, number for number; it leaves an embedding's tokens alone in both."""
    config = LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, use_rslora=rslora, target_modules=["m"])
    ours, theirs = both(kind, config)
    assert theirs.layer.scaling["default"] == weights(ours.layer).scaling == (6 if rslora else 3)
    for name in "yab" if "embedding" in kind else "yabx":
        assert getattr(theirs, name).abs().max() > 1
        assert_near(getattr(ours, name), getattr(theirs, name))
    assert (ours.y - ours.layer.base(ours.inputs)).abs().max() > 1


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_on_a_bfloat16_base_adapters_are_fp32_and_gradients_pefts(kind: str) -> None:
    ours, theirs = both(kind, LoraConfig(r=4, lora_alpha=12, target_modules=["m"]), torch.bfloat16)
    for name in "ab":
        assert_near(getattr(ours, name), getattr(theirs, name))
    assert ours.y.dtype == theirs.y.dtype == torch.bfloat16
    # Outputs lie on a coarse grid: as near to the exact sum as PEFT's, which rounds once where we round the update too.
    exact = (
        ours.layer.base(ours.inputs).double()
        + weights(ours.layer).update(ours.layer, ours.inputs.float() if kind != "embedding" else ours.inputs).double()
    )
    errors = [(y.double() - exact).abs().mean() / exact.abs().mean() for y in (ours.y, theirs.y)]
    assert errors[0] < 2**-8
    assert errors[0] < 1.5 * errors[1]


def test_under_autocast_the_output_has_autocasts_type_and_pefts_values() -> None:
    base = made("linear")
    ours = adapted(base, trained=True)
    x = an_input(base)
    exact = ours(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, atol=0.02 * exact.abs().max().item(), rtol=0)


def test_the_padding_token_learns_nothing() -> None:
    layer = adapted(made("embedding with padding"), trained=True)
    layer(torch.tensor([3, 4])).sum().backward()
    learnt = weights(layer).lora_A.grad.any(0)
    assert learnt.nonzero().flatten().tolist() == [4]


# ---- a bias of B's, and the base's own -----------------------------------------------------------------------------

LINEAR = ["linear", "linear without bias", "Conv1D"]
CONVOLUTIONS = ["conv1d", "conv2d", "conv2d without bias", "conv3d"]


@pytest.mark.parametrize("kind", LINEAR + CONVOLUTIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")
def test_with_a_bias_of_b_output_and_gradients_are_pefts(kind: str, dropout: float) -> None:
    assert_same(pair(kind, lora_bias=True, lora_dropout=dropout))


@torch.no_grad()
def test_a_bias_of_b_is_scaled_and_starts_at_zero() -> None:
    layer = on(made("linear"), lora_bias=True)
    part, x = layer.adapters["default"], torch.randn(4, IN)
    assert torch.equal(layer(x), layer.base(x))
    part.lora_bias[13] = 2.0
    expected = torch.zeros(4, OUT)
    expected[:, 13] = 3.0 * 2
    torch.testing.assert_close(layer(x) - layer.base(x), expected)
    values = {"weight": layer.weight, "bias": layer.bias}
    part.merge(layer, values)
    torch.testing.assert_close(values["bias"] - layer.bias, expected[0])


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv1d", "conv2d", "conv3d"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_bias_that_trains_stands_in_for_the_bases(kind: str, dropout: float) -> None:
    """`bias="lora_only"`: PEFT trains the base's own; here it is a copy, and the base stays as it was."""
    p = pair(kind, bias="lora_only", lora_dropout=dropout)
    assert p.theirs.base_layer.bias.requires_grad
    assert_same(p)
    assert torch.equal(p.ours.bias, p.base.bias)
    assert not torch.equal(p.ours.value("bias"), p.base.bias)


# ---- convolutions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_convolution_starts_as_it_was_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    base = convolution(kind, dtype)
    x = picture(base, dtype)
    expected = base(x)
    assert torch.equal(on(base)(x), expected)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_convolutions_output_and_gradients_are_pefts(kind: str, dropout: float) -> None:
    """With stride and padding."""
    assert_same(pair(kind, lora_dropout=dropout, use_rslora=True))


@torch.no_grad()
def test_a_kernel_of_one_pixel_by_hand() -> None:
    """A sees the pixel to the left of channel 2, B writes it to channel 5."""
    layer = on(nn.Conv2d(3, 7, 3, padding=1), r=2, lora_alpha=3)
    part, x = layer.adapters["default"], torch.randn(1, 3, 6, 6)
    part.lora_A.zero_()[1, 2, 1, 0] = 2.0
    part.lora_B.zero_()[5, 1] = 1.0
    expected = torch.zeros(1, 7, 6, 6)
    expected[:, 5, :, 1:] = 1.5 * 2 * x[:, 2, :, :-1]
    torch.testing.assert_close(layer(x) - layer.base(x), expected)


# What PEFT's A has none of: PEFT slides it over another picture than the base sees.
UNLIKE = {
    "dilation": lambda: nn.Conv2d(IN, OUT, 3, padding="same", dilation=2),
    "circular": lambda: nn.Conv2d(IN, OUT, 3, padding=1, padding_mode="circular"),
    "reflect": lambda: nn.Conv1d(IN, OUT, 5, padding=2, padding_mode="reflect"),
    "replicate": lambda: nn.Conv3d(IN, OUT, 3, padding=(1, 0, 1), padding_mode="replicate"),
    "circular, same": lambda: nn.Conv1d(IN, OUT, 4, padding="same", padding_mode="circular"),
}


@pytest.mark.parametrize("kind", UNLIKE)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@torch.no_grad()
def test_the_update_reads_what_the_weight_reads_as_it_does_when_peft_has_merged_it(kind: str, dora) -> None:
    p = pair(UNLIKE[kind](), use_dora=dora)
    x = picture(p.base)
    unmerged = p.theirs(x)
    p.theirs.merge()
    assert_near(p.ours(x), p.theirs(x))
    assert (p.ours(x) - unmerged).abs().max() > 0.1  # before merging, PEFT computes something else


@torch.no_grad()
def test_with_dilation_and_numbers_for_padding_peft_fails() -> None:
    p = pair(nn.Conv2d(IN, OUT, 3, padding=2, dilation=2))
    x = picture(p.base)
    with pytest.raises(RuntimeError, match="must match the size"):
        p.theirs(x)
    p.theirs.merge()
    assert_near(p.ours(x), p.theirs(x))


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1")
def test_in_groups_it_is_pefts_and_neither_can_be_merged(groups: int) -> None:
    """A reads all channels, where each group of the weight reads its own."""
    p = pair(nn.Conv2d(IN, OUT, 3, groups=groups, stride=2), lora_bias=True)
    assert p.part.lora_A.shape == (4, IN, 3, 3)
    assert p.part.lora_B.shape == (OUT, 4 // groups, 1, 1)
    assert_same(p)
    with pytest.raises(NotImplementedError):
        p.theirs.merge()
    with pytest.raises(TypeError, match=f"each of the {groups} groups reads its own channels"):
        p.part.merge(p.ours, {"weight": p.ours.weight, "bias": p.ours.bias})


@pytest.mark.parametrize("kind", [*LINEAR, "embedding", "scaled embedding", *CONVOLUTIONS])
@torch.no_grad()
def test_merged_weights_are_pefts_and_give_the_same_output(kind: str) -> None:
    p = pair(kind)
    x = an_input(p.base) if "conv" not in kind else picture(p.base)
    values = {n: v.detach() for n, v in p.base.named_parameters()}
    p.part.merge(p.ours, values)
    assert values["weight"].shape == p.base.weight.shape
    assert_near(torch.func.functional_call(p.base, values, (x,)), p.ours(x))
    p.theirs.merge()
    assert_near(values["weight"], p.theirs.base_layer.weight)


# ---- standing in for the base --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "ours", "stands_for"),
    [("linear", AdaptedLinear, nn.Linear), ("conv1d", AdaptedLayer, nn.Module), ("scaled embedding", AdaptedEmbedding, nn.Embedding)],
)
def test_which_class_adapts_which_layer(kind: str, ours: type[AdaptedLayer], stands_for: type[nn.Module]) -> None:
    base = made(kind)
    layer = adapted(base)
    assert type(layer) is ours
    assert stand_in(layer) is layer
    assert weights_class(base) is weights_class(layer) is not None
    assert isinstance(layer, stands_for)
    assert is_conv1d(base) is (kind == "conv1d")


@pytest.mark.parametrize(
    "module", [nn.LayerNorm(4), nn.ConvTranspose1d(4, 4, 1), nn.Bilinear(2, 3, 4), nn.ModuleList(), nn.EmbeddingBag(4, 4)]
)
def test_no_class_adapts_other_layers(module: nn.Module) -> None:
    assert weights_class(module) is None


@each_base
def test_what_the_base_has_is_found_on_the_layer(kind: str) -> None:
    base = made(kind)
    layer = adapted(base)
    assert layer.weight is base.weight
    for name in ("in_features", "nf", "num_embeddings", "padding_idx", "scalar_embed_scale"):
        assert hasattr(layer, name) == hasattr(base, name)
        assert getattr(layer, name, None) == getattr(base, name, None)
    with pytest.raises(AttributeError, match="no_such_thing"):
        layer.no_such_thing  # noqa: B018 - it is the look-up that is tested


@each_base
def test_a_new_weight_of_the_layer_is_the_bases_too(kind: str) -> None:
    base = made(kind)
    layer = adapted(base)
    layer.weight = nn.Parameter(torch.zeros_like(base.weight))
    assert base.weight is layer.weight
    layer.to(torch.float64)
    assert base.weight.dtype == torch.float64
    assert base.weight is layer.weight


@each_base
def test_the_base_is_seen_once_among_parameters_and_not_among_modules(kind: str) -> None:
    base = made(kind)
    layer = adapted(base)
    own = [name for name, _ in layer.named_parameters() if not name.startswith("adapters.")]
    assert own == [name for name, _ in base.named_parameters()]
    assert base not in list(layer.modules())
    assert layer.state_dict().keys() == base.state_dict().keys() | {"adapters.default.lora_A", "adapters.default.lora_B"}


def test_a_hook_on_the_base_still_fires() -> None:
    base, seen = made("linear"), []
    base.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    adapted(base)(torch.randn(2, IN))
    assert seen == [(2, OUT)]


def test_peft_is_the_version_that_the_numbers_are_from() -> None:
    assert peft.__version__ == "0.21.2"
