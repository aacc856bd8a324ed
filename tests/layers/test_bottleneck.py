"""The maths of bottleneck adapters, on blocks small enough to write out."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import get_activation

import lora_nb as ln
from lora_nb.errors import AdapterError, TargetError
from lora_nb.layers.adapted import adapted
from lora_nb.layers.bottleneck import NON_LINEARITIES, Bottleneck, Tap
from lora_nb.layers.lora import LoraWeights

WIDTH = 12


class Ffn(nn.Module):
    """A sublayer that ends in a dropout; with `pair` it gives something beside its output, as attention does."""

    def __init__(self, *, pair: bool = False) -> None:
        super().__init__()
        self.linear, self.dropout, self.pair = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), pair

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, str]:
        y = self.dropout(self.linear(x))
        return (y, "beside") if self.pair else y


class PreNorm(nn.Module):
    """R + attn(norm1(R)), then the same with the MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), Ffn(pair=True)
        self.norm2, self.ffn = nn.LayerNorm(WIDTH), Ffn()

    def forward(self, x: Tensor) -> Tensor:
        y, beside = self.attn(self.norm1(x))
        assert beside == "beside"
        x = x + y
        return x + self.ffn(self.norm2(x))


class PostNorm(nn.Module):
    """norm1(R + attn(R)), then the same with the MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm1, self.ffn, self.norm2 = Ffn(pair=True), nn.LayerNorm(WIDTH), Ffn(), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x)[0])
        return self.norm2(x + self.ffn(x))


BLOCKS = {
    PreNorm: ln.Block(
        layers="blocks",
        attention=ln.Sublayer(output="attn", reads="norm1"),
        mlp=ln.Sublayer(output="ffn", reads="norm2"),
        width=WIDTH,
    ),
    PostNorm: ln.Block(
        layers="blocks",
        attention=ln.Sublayer(output="attn", reads="attn.linear", norm="norm1"),
        mlp=ln.Sublayer(output="ffn", reads="ffn.linear", norm="norm2"),
        width=WIDTH,
    ),
}
PLUS = {"original_ln_before": True, "original_ln_after": False, "residual_before_ln": False}
KINDS = {
    "output": ln.BottleneckConfig.houlsby,
    "sum": ln.BottleneckConfig.pfeiffer,
    "residual": ln.BottleneckConfig.parallel,
    "normed": ln.BottleneckConfig.pfeiffer,
}


class Model(nn.Module):
    def __init__(self, kind: type[nn.Module], layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def config(kind: type[nn.Module], reading: str, **settings: object) -> ln.BottleneckConfig:
    return KINDS[reading](3, blocks=BLOCKS[kind], **({"mh_adapter": True} | (PLUS if reading == "normed" else {}) | settings))


def fill(model: nn.Module, name: str = "default", spread: float = 0.5) -> None:
    with torch.no_grad():
        for p in ln.parameters(model, name).values():
            p.copy_(torch.randn(p.shape) * spread)


def bottlenecks(model: nn.Module, name: str = "default") -> list[Bottleneck]:
    """In the order of the forward."""
    return [m for n, m in model.named_modules() if isinstance(m, Bottleneck) and n.endswith(f".{name}")]


def delta(part: Bottleneck, h: Tensor) -> Tensor:
    """s · Δ(h), from the parameters."""
    inside = NON_LINEARITIES["swish"](part.down.weight @ h.unsqueeze(-1) + part.down.bias.unsqueeze(-1))
    return part.scaling * ((part.up.weight @ inside).squeeze(-1) + part.up.bias)


def by_hand(block: nn.Module, reading: str, parts: tuple[Bottleneck, Bottleneck], r: Tensor) -> Tensor:
    """The block's output, sublayer by sublayer, as `layers/bottleneck.py` says it."""
    for part, sublayer, norm in zip(parts, (block.attn, block.ffn), (block.norm1, block.norm2), strict=True):
        post = isinstance(block, PostNorm)
        x = sublayer.linear(r if post else norm(r))
        after = norm if post else lambda z: z
        if reading == "normed":
            y = after(r + x)
            r = y + delta(part, y)
        else:
            h = {"output": x, "sum": after(r + x), "residual": r}[reading]
            r = after(r + x + delta(part, h))
    return r


@pytest.mark.parametrize("kind", [PreNorm, PostNorm])
@pytest.mark.parametrize("reading", KINDS)
def test_each_kind_by_hand(kind: type[nn.Module], reading: str) -> None:
    model, x = Model(kind).eval(), torch.randn(2, 5, WIDTH)
    bare = copy.deepcopy(model)
    settings = config(kind, reading, non_linearity="swish", scaling=2.5)
    assert settings.reading() == reading
    ln.attach(model, settings)
    fill(model)
    parts = bottlenecks(model)
    expected = x
    for i, block in enumerate(bare.blocks):
        expected = by_hand(block, reading, (parts[2 * i], parts[2 * i + 1]), expected)
    assert (expected - bare(x)).abs().max() > 0.3
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_one_entry_by_hand() -> None:
    """D lets entry 3 in, at double; U writes it to entry 5, at half: 1.5 · ½ · relu(2 · 4 − 1) = 5.25."""
    layer = adapted(nn.Identity())
    part = layer.add("default", Bottleneck(WIDTH, 2, scaling=1.5))
    layer.active = ("default",)
    with torch.no_grad():
        part.down.weight.zero_()[1, 3] = 2.0
        part.down.bias[1] = -1.0
        part.up.weight[5, 1] = 0.5
    x = torch.zeros(WIDTH)
    x[3] = 4.0
    expected = x.clone()
    expected[5] = 5.25
    assert torch.equal(layer(x), expected)
    x[3] = -4.0
    assert torch.equal(layer(x), x)


# ---- at the start --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PreNorm, PostNorm])
@pytest.mark.parametrize("reading", KINDS)
@pytest.mark.parametrize("options", [{}, {"ln_before": True, "ln_after": True}, {"scaling": "learned"}, {"scaling": "channel"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_new_adapter_changes_no_bit(kind: type[nn.Module], reading: str, options: dict, dtype: torch.dtype) -> None:
    model, x = Model(kind).to(dtype).eval(), torch.randn(2, 5, WIDTH, dtype=dtype)
    before = model(x)
    ln.attach(model, config(kind, reading, **options))
    assert torch.equal(model(x), before)
    assert {p.dtype for p in ln.parameters(model).values()} == {torch.float32}
    fill(model)
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize(("init", "spread"), [("bert", 0.02), ("houlsby", 0.0088)])  # 0.88 is left of a deviation cut at two
def test_asked_for_another_start_the_weights_are_adapterhubs(init: str, spread: float) -> None:
    part = adapted(nn.Linear(400, 400)).add("default", Bottleneck(400, 100), init)
    for p in (part.down.weight, part.up.weight):
        assert abs(p.std().item() / spread - 1) < 0.02
        assert abs(p.mean().item()) < 0.0005
    assert (part.down.weight.abs().max() <= 0.02) == (init == "houlsby")
    assert not part.down.bias.any()
    assert not part.up.bias.any()


def test_the_usual_start() -> None:
    part = adapted(nn.Linear(400, 400)).add("default", Bottleneck(400, 100))
    assert not part.up.weight.any()
    assert abs(part.down.weight.std().item() * math.sqrt(3) * math.sqrt(400) - 1) < 0.02  # uniform in ±1/√width
    assert part.down.weight.abs().max() <= 1 / math.sqrt(400)


def test_in_the_first_step_only_the_second_matrix_learns() -> None:
    """∂L/∂D = s · f'(·) Uᵀ(∂L/∂y)hᵀ, and U = 0."""
    model = Model(PreNorm).train()
    ln.attach(model, config(PreNorm, "output"))
    model(torch.randn(2, 5, WIDTH)).square().sum().backward()
    for part in bottlenecks(model):
        assert not part.down.weight.grad.any()
        assert part.up.weight.grad.abs().max() > 1e-3
    own = set(ln.parameters(model))
    assert own == {n for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("factor", "size"), [(3, 4), (5, 2), (12, 1), (100, 1), (0.5, 24)])
def test_counts(factor: float, size: int) -> None:
    """m = ⌊width / factor⌋, at least 1; D, U and both biases."""
    report = ln.attach(Model(PreNorm), ln.BottleneckConfig.houlsby(factor, blocks=BLOCKS[PreNorm]))
    assert {m.rank for m in report.matched.values()} == {size}
    assert len(report.matched) == 4
    assert report.trainable == 4 * (2 * size * WIDTH + size + WIDTH)


@pytest.mark.parametrize(
    ("options", "more"),
    [({"ln_before": True}, 2 * WIDTH), ({"ln_after": True}, 2 * WIDTH), ({"scaling": "learned"}, 1), ({"scaling": "channel"}, WIDTH)],
)
def test_counts_with_options(options: dict, more: int) -> None:
    plain = ln.attach(Model(PreNorm), config(PreNorm, "output"))
    assert ln.attach(Model(PreNorm), config(PreNorm, "output", **options)).trainable == plain.trainable + 4 * more


# ---- several, and around them --------------------------------------------------------------------------------------


def test_stacked_adapters_act_in_the_order_of_their_names() -> None:
    """The second reads what the first has made; so the order makes a difference."""
    layer, x = adapted(nn.Linear(WIDTH, WIDTH)), torch.randn(3, WIDTH)
    first, second = (layer.add(name, Bottleneck(WIDTH, 4, non_linearity="swish"), "bert") for name in "ab")
    for part in (first, second):
        nn.init.normal_(part.down.weight)
        nn.init.normal_(part.up.weight)
    y = layer.base(x)
    expected = y + delta(first, y)
    expected = expected + delta(second, expected)
    layer.active = ("a", "b")
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    layer.active = ("b", "a")
    assert (layer(x) - expected).abs().max() > 0.1


def test_beside_lora_on_the_same_layer() -> None:
    """Behind it, it reads LoRA's update as well; in front of it, LoRA adds to what it has made."""
    layer, x = adapted(nn.Linear(WIDTH, WIDTH)), torch.randn(3, WIDTH)
    part = layer.add("bottleneck", Bottleneck(WIDTH, 4, non_linearity="swish"))
    lora = layer.add("lora", LoraWeights(layer.base, 2, 1.5))
    for p in (part.up.weight, lora.lora_B):
        nn.init.normal_(p)
    y, update = layer.base(x), x @ lora.delta().T
    layer.active = ("lora", "bottleneck")
    torch.testing.assert_close(layer(x), y + update + delta(part, y + update), atol=1e-5, rtol=1e-5)
    layer.active = ("bottleneck", "lora")
    torch.testing.assert_close(layer(x), y + delta(part, y) + update, atol=1e-5, rtol=1e-5)
    assert update.abs().max() > 0.1


def test_a_dropout_that_carries_an_adapter_follows_the_models_mode() -> None:
    """The base is out of the tree, where `eval()` does not see it."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)).train()
    model[1] = adapted(model[1])
    x = torch.randn(2, WIDTH)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model[0](x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_dropout_zeroes_entries_of_the_adapters_output_while_training() -> None:
    layer = adapted(nn.Identity())
    part = layer.add("a", Bottleneck(WIDTH, 4, dropout=0.25, scaling=2.0))
    nn.init.ones_(part.up.bias)
    layer.active = ("a",)
    x = torch.zeros(4000, WIDTH)
    y = layer.train()(x)
    assert torch.unique(y).tolist() == pytest.approx([0, 2 / 0.75])
    assert abs((y == 0).float().mean().item() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / y.numel())
    assert torch.unique(layer.eval()(x)).tolist() == [2.0]


def test_a_tap_lets_go_of_what_was_taken() -> None:
    layer, x = adapted(nn.LayerNorm(WIDTH)), torch.randn(2, WIDTH)
    tap = layer.add("a", Tap(readers=2))
    layer.active = ("a",)
    assert torch.equal(layer(input=x), layer.base(x))
    assert tap.take() is x
    assert tap.take() is x
    assert tap.seen is None
    with pytest.raises(TargetError, match="was not called before"):
        tap.take()


@pytest.mark.parametrize("reading", ["sum", "residual"])
def test_nothing_of_a_forward_is_kept(reading: str) -> None:
    model = Model(PreNorm)
    ln.attach(model, config(PreNorm, reading))
    model(torch.randn(2, 5, WIDTH))
    taps = [m for m in model.modules() if isinstance(m, Tap)]
    assert len(taps) == 4
    assert all(tap.seen is None for tap in taps)
    with ln.disabled(model):
        model(torch.randn(2, 5, WIDTH))
    assert all(tap.seen is None for tap in taps)


def test_a_copy_of_the_model_reads_its_own_stream() -> None:
    model, x = Model(PreNorm).eval(), torch.randn(2, 5, WIDTH)
    ln.attach(model, config(PreNorm, "residual"))
    fill(model)
    twin = copy.deepcopy(model)
    expected = model(x)
    fill(model)
    assert torch.equal(twin(x), expected)


def test_merging_is_refused() -> None:
    model = Model(PreNorm).eval()
    ln.attach(model, config(PreNorm, "output"))
    with pytest.raises(AdapterError, match="not linear"):
        ln.merge(model)


@pytest.mark.parametrize("name", NON_LINEARITIES)
def test_non_linearities_are_those_of_transformers(name: str) -> None:
    x = torch.linspace(-4, 4, 101)
    theirs = F.leaky_relu if name == "leakyrelu" else get_activation(name)
    torch.testing.assert_close(NON_LINEARITIES[name](x), theirs(x), atol=1e-6, rtol=1e-5)
