"""A layer with adapters around it, whatever they are: what the rest of the world sees of it, and whole copies of parameters."""

import copy
import io
import pickle
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lora_nb as ln
from lora_nb.attach import adapters, layers, parts
from lora_nb.errors import AdapterError
from lora_nb.layers.adapted import AdaptedLayer, Forward, Part, adapted
from tests.layers.pairs import BASES, an_input, made, on
from tests.models import peft_config, tiny_bert_classifier, tiny_llama, token_ids

each_base = pytest.mark.parametrize("kind", BASES)
EVERY = {"r": 4, "lora_alpha": 12}


class Times(Part):
    """A part that multiplies what comes from beneath."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def reset(self, layer: AdaptedLayer, init: bool | str = True) -> None:
        pass

    def forward(self, layer: AdaptedLayer, inner: Forward, *args: Any, **kwargs: Any) -> Any:
        return self.factor * inner(*args, **kwargs)


class Plus(Times):
    def forward(self, layer: AdaptedLayer, inner: Forward, *args: Any, **kwargs: Any) -> Any:
        return self.factor + inner(*args, **kwargs)


# ---- the order of parts ----------------------------------------------------------------------------------------------


def test_parts_act_from_the_first_to_the_last_each_around_what_is_beneath() -> None:
    layer = adapted(nn.Identity())
    layer.add("times", Times(3.0))
    layer.add("plus", Plus(5.0))
    x = torch.tensor([1.0, 2.0])
    for active, expected in ((), [1, 2]), (("times", "plus"), [8, 11]), (("plus", "times"), [18, 21]), (("plus",), [6, 7]):
        layer.active = active
        assert layer(x).tolist() == expected


def test_a_part_by_itself_does_nothing() -> None:
    layer = adapted(nn.Linear(3, 4))
    layer.add("nothing", Part())
    x = torch.randn(2, 3)
    layer.active = ("nothing",)
    assert torch.equal(layer(x), layer.base(x))
    values = dict(layer.base.named_parameters())
    layer.adapters["nothing"].merge(layer, values)
    assert values["weight"] is layer.weight
    assert not layer.adapters["nothing"].tensors()
    with pytest.raises(TypeError, match="Part is no update of a weight"):
        layer.adapters["nothing"].delta()


def test_whatever_the_base_takes_and_gives_goes_through() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor, *, flip: bool = False) -> dict[str, Tensor]:
            return {"x": -x if flip else x}

    layer = adapted(Odd())
    layer.add("nothing", Part())
    x = torch.randn(3)
    for layer.active in ((), ("nothing",)):
        assert torch.equal(layer(x, flip=True)["x"], -x)


# ---- standing in for the base ----------------------------------------------------------------------------------------


@each_base
def test_state_dict_has_the_bases_names_and_reads_the_bases_own(kind: str) -> None:
    base = made(kind)
    before, other = copy.deepcopy(base.state_dict()), {key: torch.randn_like(t) for key, t in base.state_dict().items()}
    layer = on(base)
    assert {key for key in layer.state_dict() if not key.startswith("adapters.")} == before.keys()
    missing = layer.load_state_dict(other, strict=False).missing_keys
    assert missing == ["adapters.default.lora_A", "adapters.default.lora_B"]
    assert all(torch.equal(t, other[key]) for key, t in base.state_dict().items())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict(layer.state_dict() | {"no_such_thing": torch.ones(1)})


@each_base
def test_copies_pickles_and_files_are_whole_and_their_own(kind: str) -> None:
    layer = on(made(kind), use_dora=True)
    nn.init.normal_(layer.adapters["default"].lora_A)
    x, file = an_input(layer.base), io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    twins = (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False))  # noqa: S301 - our own
    for twin in twins:
        assert torch.equal(twin(x), layer(x))
        assert twin.weight is twin.base.weight
        assert twin.weight is not layer.weight
        with torch.no_grad():
            twin.weight.add_(1.0)
            twin.adapters["default"].lora_B.add_(1.0)
        assert not torch.equal(twin(x), layer(x))
    assert torch.equal(layer.weight, layer.base.weight)


def test_training_mode_and_gradients_reach_the_base() -> None:
    model = nn.ModuleDict({"m": nn.Dropout(0.5)})
    layer = adapted(model["m"])
    model["m"] = layer
    for mode in (True, False, True):
        model.train(mode)
        assert layer.base.training is mode
    assert (layer(torch.ones(100)) == 0).any()


def test_a_child_that_is_replaced_through_the_layer_is_replaced_in_the_base() -> None:
    """A block adapted as a whole and then a linear inside it: the base's forward must see the new one."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inside(x)

    model = nn.ModuleDict({"block": Block()})
    layer = adapted(model["block"])
    model["block"] = layer
    layer.add("nothing", Part())
    ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6, target_modules=["inside"]))
    assert layer.base.inside is layer.inside
    assert isinstance(layer.inside, AdaptedLayer)
    x = torch.randn(3, 4)
    before = layer(x)
    with torch.no_grad():
        layer.inside.adapters["default"].lora_B.fill_(1.0)
    assert not torch.equal(layer(x), before)
    ln.detach(model)
    assert type(layer.base.inside) is type(layer.inside) is nn.Linear


def test_what_neither_has_is_an_attribute_error_and_hasattr_says_no() -> None:
    layer = adapted(nn.Linear(2, 3))
    assert layer.in_features == 2
    assert not hasattr(layer, "no_such_thing")
    with pytest.raises(AttributeError, match="no_such_thing"):
        layer.no_such_thing  # noqa: B018 - it is the look-up that is tested


def test_a_parametrised_base_is_adapted_as_it_is() -> None:
    """Its weight is computed anew in each forward; what stands in must not freeze it."""
    base = parametrizations.weight_norm(nn.Linear(6, 5))
    x = torch.randn(3, 6)
    expected = base(x)
    layer = on(base)
    assert torch.equal(layer(x), expected)


# ---- torch's attention, which never calls its out_proj --------------------------------------------------------------------


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.up = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.attention(x, x, x)[0])


def test_an_adapter_where_the_layer_is_never_called_is_refused_or_left_out() -> None:
    model = Attends()
    with pytest.raises(ln.errors.TargetError, match=r"'attention.out_proj', whose weight nn.MultiheadAttention reads without calling it"):
        ln.attach(model, ln.LoraConfig(**EVERY, target_modules=["out_proj"]))
    assert list(ln.attach(model, ln.LoraConfig(**EVERY)).matched) == ["up"]


def test_a_copy_of_the_whole_attention_is_read_all_the_same() -> None:
    """`modules_to_save` puts values in the base's place, and not a layer."""
    model, x = Attends().eval(), torch.randn(2, 3, 8)
    before = model(x)
    ln.attach(model, ln.LoraConfig(**EVERY, target_modules=["up"], modules_to_save=["attention"]))
    assert torch.equal(model(x), before)
    with torch.no_grad():
        for name, p in ln.parameters(model).items():
            if "attention" in name:
                p.mul_(1.5)
    assert not torch.allclose(model(x), before, atol=1e-3)
    with ln.disabled(model):
        assert torch.equal(model(x), before)


# ---- whole parameters and buffers ----------------------------------------------------------------------------------------


class Net(nn.Module):
    """A convolution, a norm with running statistics, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def saved(**more: object) -> ln.LoraConfig:
    return ln.LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["conv"], "modules_to_save": ["norm", "head"]} | more)


def trained_net(steps: int = 3) -> tuple[Net, Net, Tensor]:
    """A net that an adapter was trained on, a copy of it from before, and a picture."""
    torch.manual_seed(0)
    model = Net()
    before, x = copy.deepcopy(model), torch.randn(6, 3, 8, 8) * 2 + 1
    ln.attach(model, saved())
    optimizer = torch.optim.SGD(ln.parameters(model).values(), lr=0.2)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(x), torch.arange(6) % 5).backward()
        optimizer.step()
    return model, before, x


def test_the_bases_running_statistics_stay_while_the_copys_move() -> None:
    model, before, _ = trained_net()
    assert all(torch.equal(t, before.state_dict()[key]) for key, t in model.state_dict().items() if ".adapters." not in key)
    kept = parts(model, "default")["norm"].copies()
    assert set(kept) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert kept["num_batches_tracked"].item() == 3
    assert (kept["running_mean"] - before.norm.running_mean).abs().max() > 0.05
    with ln.disabled(model):
        model.eval()
        before.eval()
        x = torch.randn(2, 3, 8, 8)
        assert torch.equal(model(x), before(x))
    ln.detach(model)
    assert torch.equal(model(x), before(x))


def test_training_a_module_whole_is_pefts(tmp_path: Any) -> None:
    """Statistics and all, after some steps; and PEFT's file of it is read to the same output."""
    torch.manual_seed(0)
    base, x, y = Net(), torch.randn(6, 3, 8, 8) * 2 + 1, torch.arange(6) % 5
    ours, config = copy.deepcopy(base), saved(task_type=None)
    ln.attach(ours, config)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft_config(config))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_A" in name:
                p.copy_(ours.conv.adapters["default"].lora_A)
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(x), y).backward()
            optimizer.step()
        model.eval()
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path)
    read = copy.deepcopy(base).eval()
    ln.load_adapter(read, tmp_path)
    torch.testing.assert_close(read(x), theirs(x), atol=1e-5, rtol=1e-5)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), ln.save(ours, tmp_path / "ours")).eval()
    torch.testing.assert_close(back(x), ours(x), atol=1e-5, rtol=1e-5)


def test_merging_puts_the_whole_copy_in_place_and_back() -> None:
    model, before, x = trained_net()
    model.eval()
    expected = model(x)
    ln.merge(model, sample=x)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    assert not layers(model)
    ln.unmerge(model)
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-6)
    ln.detach(model)
    assert all(torch.equal(t, before.state_dict()[key]) for key, t in model.state_dict().items())


def test_a_module_to_save_is_all_that_is_in_it() -> None:
    model = tiny_llama()
    report = ln.attach(model, ln.LoraConfig(**EVERY, target_modules=["q_proj"], modules_to_save=["layers.1.mlp", "norm"]))
    whole = {path for path, m in report.matched.items() if m.method == "whole"}
    assert whole == {f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")} | {"model.norm"}
    assert report.trainable == 3 * 32 * 48 + 32 + 3 * 4 * (32 + 32)
    assert all(report.matched[path].rank == 0 for path in whole)


def test_a_modules_own_copy_trains_and_the_bases_does_not() -> None:
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    ln.attach(model, ln.LoraConfig(**EVERY, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]))
    optimizer = torch.optim.AdamW(ln.parameters(model).values(), lr=1e-2)
    for _ in range(2):
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()
    assert all(torch.equal(model.state_dict()[key], t) for key, t in before.items())
    assert not torch.equal(parts(model, "default")["lm_head"].whole["weight"], before["lm_head.weight"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"modules_to_save": ["norm"]}, {"modules_to_save": ["norm"]}),
        ({"bias": "lora_only"}, {"bias": "all"}),
        ({"bias": "lora_only"}, {"modules_to_save": ["conv"], "target_modules": ["head"]}),
    ],
    ids=str,
)
def test_two_whole_copies_of_a_parameter_cannot_act_together(one: dict, other: dict) -> None:
    model = Net()
    ln.attach(model, saved(modules_to_save=[], **one) if "modules_to_save" not in one else saved(**one), "one")
    ln.attach(model, saved(**({"modules_to_save": []} | other)), "two")
    with pytest.raises(
        AdapterError, match=r"'one' and 'two' cannot act together: each has a \w+ of its own for '(norm|conv)'. Activate one"
    ):
        ln.set_active(model, ["one", "two"])
    assert adapters(model).active == ("two",)
    ln.set_active(model, "one")
    assert adapters(model).active == ("one",)


def test_a_whole_copy_and_an_update_can() -> None:
    """The update is added to the copy's output."""
    model, x = Net().eval(), torch.randn(2, 8)
    ln.attach(model, saved(modules_to_save=["head"]), "whole")
    ln.attach(model, saved(modules_to_save=[], target_modules=["head"]), "low_rank")
    with torch.no_grad():
        for name in ("whole", "low_rank"):
            for p in ln.parameters(model, name).values():
                p.normal_()
    whole, update = model.head.adapters["whole"].whole, model.head.adapters["low_rank"]
    for order in (["whole", "low_rank"], ["low_rank", "whole"]):
        ln.set_active(model, order)
        expected = x @ whole["weight"].T + whole["bias"] + x @ update.delta().T
        torch.testing.assert_close(model.head(x), expected, atol=1e-5, rtol=1e-5)


def test_biases_of_all_layers_or_of_the_adapted_ones() -> None:
    """`bias="all"` and `"lora_only"`: as many as in PEFT, under the same keys."""
    for bias in ("all", "lora_only"):
        model, config = tiny_bert_classifier(), ln.LoraConfig(**EVERY, target_modules=["query"], bias=bias, task_type=None)
        report = ln.attach(model, config)
        theirs = peft.get_peft_model(tiny_bert_classifier(), peft_config(config))
        assert report.trainable == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
        keys = {f"base_model.model.{path}{end}" for path, part in parts(model, "default").items() for end in part.tensors()}
        assert keys == set(peft.get_peft_model_state_dict(theirs))


# ---- tied weights --------------------------------------------------------------------------------------------------------


def tied(**more: object) -> tuple[nn.Module, ln.AttachReport]:
    model = tiny_llama(tied=True)
    return model, ln.attach(model, ln.LoraConfig(**EVERY, **{"target_modules": ["q_proj"]} | more))


@torch.no_grad()
def test_ensure_weight_tying_trains_one_copy_for_both() -> None:
    for name in ("embed_tokens", "lm_head"):
        model, report = tied(modules_to_save=[name], ensure_weight_tying=True)
        both = [parts(model, "default")[path].whole["weight"] for path in ("model.embed_tokens", "lm_head")]
        assert both[0] is both[1]
        assert sorted(report.matched[path].parameters for path in ("model.embed_tokens", "lm_head")) == [0, 61 * 32]
        assert sum(p is both[0] for p in ln.parameters(model).values()) == 1
        assert not report.notes
        both[0].add_(0.5)
        hidden = torch.randn(2, 32)
        torch.testing.assert_close(model.lm_head(hidden), hidden @ both[0].T, atol=1e-5, rtol=1e-5)
        assert torch.equal(model.model.embed_tokens(torch.tensor([3])), both[0][[3]])
        twin = copy.deepcopy(model)
        copies = [parts(twin, "default")[path].whole["weight"] for path in ("model.embed_tokens", "lm_head")]
        assert copies[0] is copies[1]


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_without_it_the_report_says_that_the_two_part(name: str) -> None:
    for settings in ({"modules_to_save": [name]}, {"target_modules": [name]}):
        model, report = tied(**settings)
        path = "lm_head" if name == "lm_head" else "model.embed_tokens"
        other = "lm_head" if name == "embed_tokens" else "model.embed_tokens"
        note = f"{path} shares its weight with {other} in the base; this adapter changes it for {path} alone."
        assert report.notes == (note,)
        assert note in repr(report)
        assert note in report._repr_html_()
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_adapter_that_leaves_the_tied_pair_alone_says_nothing() -> None:
    assert not tied()[1].notes
    assert not ln.attach(tiny_llama(), ln.LoraConfig(**EVERY, target_modules=["lm_head", "embed_tokens"])).notes


def test_both_named_without_tying_each_gets_its_own_and_it_is_said() -> None:
    model, report = tied(modules_to_save=["embed_tokens", "lm_head"])
    both = [parts(model, "default")[path].whole["weight"] for path in ("model.embed_tokens", "lm_head")]
    assert both[0] is not both[1]
    assert len(report.notes) == 2
