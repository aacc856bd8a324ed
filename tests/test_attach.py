"""Putting adapters on and taking them off: the base stays what it was, and the model stays the user's own."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from lora_nb.attach import (
    AttachReport,
    acting,
    active_names,
    adapters,
    attach,
    detach,
    disabled,
    layers,
    only_name,
    parameters,
    set_active,
    weights,
)
from lora_nb.configs import LoraConfig
from lora_nb.errors import AdapterError
from lora_nb.layers.adapted import AdaptedEmbedding, AdaptedLayer, AdaptedLinear
from tests.models import (
    fill,
    peft_layers,
    peft_parameters,
    peft_twin,
    tiny_bert,
    tiny_falcon,
    tiny_gpt2,
    tiny_llama,
    token_ids,
)

EVERY = LoraConfig(r=4, lora_alpha=12)
ATTENTION = LoraConfig(r=2, lora_alpha=10, target_modules=["q_proj", "v_proj"])
EMBEDDINGS = LoraConfig(r=4, lora_alpha=12, target_modules=["embed_tokens", "lm_head", "q_proj"])

# A model and a config that reaches every kind of layer that it has.
CASES = {
    "llama": (tiny_llama, EMBEDDINGS),
    "llama, tied": (lambda: tiny_llama(tied=True), EMBEDDINGS),
    "gpt2": (tiny_gpt2, LoraConfig(r=4, lora_alpha=12, target_modules=["wte", "c_attn", "c_proj"])),
    "falcon": (tiny_falcon, EVERY),
    "bert": (tiny_bert, LoraConfig(r=4, lora_alpha=12, target_modules=["word_embeddings", "query", "dense"])),
}
each_case = pytest.mark.parametrize("case", CASES)


def made(case: str) -> tuple[nn.Module, LoraConfig]:
    make, config = CASES[case]
    return make(), config


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def trained_llama(config: LoraConfig = ATTENTION) -> nn.Module:
    model = tiny_llama()
    attach(model, config)
    fill(model)
    return model


# ---- attach --------------------------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attaching_leaves_the_output_as_it_was_bit_for_bit(case: str, dtype: torch.dtype) -> None:
    model, config = made(case)
    before = logits(model.to(dtype))
    attach(model, config)
    assert {p.dtype for p in parameters(model).values()} == {torch.float32}
    assert torch.equal(logits(model), before)
    fill(model)
    assert not torch.allclose(logits(model), before, atol=1e-2)


@each_case
def test_base_names_stay_in_the_state_dict(case: str) -> None:
    model, config = made(case)
    before, parts = model.state_dict(), [name for name, _ in model.named_parameters()]
    attach(model, config)
    after = model.state_dict()
    assert [name for name in after if ".adapters.default." not in name] == list(before)
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in before)
    assert [name for name, _ in model.named_parameters() if ".adapters.default." not in name] == parts


@each_case
def test_detach_restores_modules_tensors_flags_and_modes(case: str) -> None:
    model, config = made(case)
    next(p for _, p in model.named_parameters()).requires_grad_(requires_grad=False)
    modules, before, output = dict(model.named_modules()), tensors(model), logits(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    attach(model, config)
    fill(model)
    model.train()
    model(input_ids=token_ids()).logits.sum().backward()
    detach(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert sorted(set(flags.values())) == [False, True]
    assert list(model.named_modules()) == list(modules.items())
    assert all(m.training for m in model.modules())
    assert torch.equal(logits(model.eval()), output)
    assert not adapters(model).reports
    assert "lora_nb_adapters" not in vars(model)


RICH = {
    "dora": (tiny_llama, {"use_dora": True, "lora_bias": True, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"]}),
    "pissa": (tiny_gpt2, {"init_lora_weights": "pissa", "target_modules": "all-linear"}),
    "biases": (tiny_bert, {"bias": "all", "target_modules": ["query"]}),
    "whole": (tiny_gpt2, {"modules_to_save": ["ln_f", "h.1"], "target_modules": ["c_attn"]}),
    "tied": (lambda: tiny_llama(tied=True), {"modules_to_save": ["lm_head"], "ensure_weight_tying": True, "target_modules": ["q_proj"]}),
    "tokens": (lambda: tiny_llama(tied=True), {"trainable_token_indices": [3, 9], "target_modules": ["q_proj"]}),
    "parameters": (tiny_llama, {"target_parameters": ["up_proj.weight", "q_proj.weight"]}),
}


@pytest.mark.parametrize("case", RICH)
def test_every_option_starts_as_the_base_trains_beside_it_and_comes_off_without_a_trace(case: str) -> None:
    make, settings = RICH[case]
    model = make()
    modules, before, output = list(model.named_modules()), tensors(model), logits(model)
    report = attach(model, LoraConfig(r=4, lora_alpha=12, **settings))
    torch.testing.assert_close(logits(model), output, atol=1e-5, rtol=1e-5)
    own = parameters(model)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in own.values()}
    assert sum(p.numel() for p in own.values()) == report.trainable
    optimizer = torch.optim.AdamW(own.values(), lr=1e-2)
    for _ in range(2):
        model.train()(input_ids=token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()
    assert (logits(model.eval()) - output).abs().max() > 1e-2
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items() if ".adapters." not in name)
    trained = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), trained)
    with disabled(model):
        assert torch.equal(logits(model), output)
    detach(model)
    assert list(model.named_modules()) == modules
    assert list(model.state_dict()) == list(before)
    assert torch.equal(logits(model), output)
    assert all(p.requires_grad for p in model.parameters())


def test_detach_leaves_no_gradient_on_the_base() -> None:
    model = trained_llama()
    model(input_ids=token_ids()).logits.sum().backward()
    detach(model)
    assert all(p.grad is None for p in model.parameters())


def test_generate_works_and_follows_the_adapter() -> None:
    model = tiny_llama()
    asked = {"input_ids": token_ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long), "max_new_tokens": 6, "do_sample": False}
    base = model.generate(**asked)
    attach(model, EMBEDDINGS)
    assert torch.equal(model.generate(**asked), base)
    fill(model)
    assert not torch.equal(model.generate(**asked), base)
    with disabled(model):
        assert torch.equal(model.generate(**asked), base)


def test_adapted_layers_are_what_they_stand_for() -> None:
    model = tiny_llama()
    kinds = {name: nn.Linear if isinstance(m, nn.Linear) else nn.Embedding for name, m in model.named_modules() if hasattr(m, "weight")}
    attach(model, EMBEDDINGS)
    adapted = dict(layers(model))
    assert {type(m) for m in adapted.values()} == {AdaptedLinear, AdaptedEmbedding}
    assert all(isinstance(layer, kinds[name]) for name, layer in adapted.items())
    assert model.get_input_embeddings() is adapted["model.embed_tokens"]
    assert model.get_output_embeddings() is adapted["lm_head"]


def test_only_the_adapter_trains_and_the_base_keeps_its_bytes() -> None:
    model = tiny_llama()
    before = tensors(model)
    report = attach(model, EVERY)
    mine = parameters(model)
    assert {n: id(p) for n, p in model.named_parameters() if p.requires_grad} == {n: id(p) for n, p in mine.items()}
    assert sum(p.numel() for p in mine.values()) == report.trainable
    optimizer = torch.optim.AdamW(mine.values(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items() if name in before)
    assert all(p.grad.any() for p in mine.values())


def test_the_report_says_what_matched() -> None:
    model = tiny_llama()
    base = sum(p.numel() for p in model.parameters())
    config = LoraConfig(
        r=4, lora_alpha=12, target_modules=["k_proj", "down_proj"], rank_pattern={r".*\.1\..*": 2}, alpha_pattern={"k_proj": 6}
    )
    report = attach(model, config, "tone-v2")
    assert {n.rsplit(".", 1)[-1] for n in report.matched} == {"k_proj", "down_proj"}
    k, down = report.matched["model.layers.0.self_attn.k_proj"], report.matched["model.layers.1.mlp.down_proj"]
    assert (k.shape, k.rank, k.scale, k.parameters) == ((16, 32), 4, 1.5, 4 * (16 + 32))
    assert (down.shape, down.rank, down.scale, down.parameters) == ((32, 48), 2, 6, 2 * (32 + 48))
    assert report.trainable == (4 + 2 + 4) * (16 + 32) + (4 + 2 + 4) * (32 + 48)
    assert report.total == base + report.trainable
    assert (report.name, report.config) == ("tone-v2", config)
    share = f"{100 * report.trainable / report.total:.2f} %"
    for text in (repr(report), report._repr_html_()):
        assert f"adapter 'tone-v2': 6 modules, 1,280 of {report.total:,} parameters train ({share})" in text
        assert "model.layers.1.mlp.down_proj" in text
        assert "32 × 48" in text


# ---- against PEFT --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama", "gpt2", "falcon", "bert"])
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_logits_and_gradients_of_whole_models_are_pefts(case: str, rslora) -> None:
    model, config = made(case)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=config.target_modules, use_rslora=rslora, rank_pattern={r".*\.1\..*": 3})
    attach(model, config)
    fill(model)
    twin = peft_twin(model, config)
    ours, theirs = (m(input_ids=token_ids()).logits for m in (model, twin))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with disabled(model):
        assert (ours - logits(model)).abs().max() > 0.1
    for out in (ours, theirs):
        nn.functional.cross_entropy(out.flatten(0, 1), token_ids().flatten()).backward()
    peers = peft_layers(twin)
    for path, w in weights(model, "default").items():
        for p, q in zip((w.lora_A, w.lora_B), peft_parameters(peers[path]), strict=True):
            assert p.grad.any(), path
            torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-5)


# ---- what users do with models -------------------------------------------------------------------------------------


@each_case
def test_a_deep_copy_is_whole_and_its_own(case: str) -> None:
    model, config = made(case)
    attach(model, config)
    fill(model)
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    for path, layer in layers(twin):
        assert layer.base.weight is layer.weight
        assert layer.weight is not model.get_submodule(path).weight
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1.0)
    detach(twin)
    assert torch.equal(logits(model), expected)
    assert len(layers(model)) == len(adapters(model).reports["default"].matched)


@each_case
def test_a_whole_model_goes_through_torch_save(case: str) -> None:
    model, config = made(case)
    base = logits(model)
    attach(model, config)
    fill(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    back = torch.load(file, weights_only=False)
    assert torch.equal(logits(back), logits(model))
    assert back.lora_nb_adapters.reports["default"].config == config
    detach(back)
    assert torch.equal(logits(back), base)


def test_a_state_dict_goes_to_a_model_adapted_alike() -> None:
    model, other = trained_llama(), tiny_llama(seed=1)
    attach(other, ATTENTION)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    detach(other)
    with disabled(model):
        assert torch.equal(logits(other), logits(model))


@each_case
def test_a_change_of_type_reaches_base_and_adapter(case: str) -> None:
    model, config = made(case)
    attach(model, config)
    fill(model)
    before = logits(model)
    model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {layer.base.weight.dtype for _, layer in layers(model)} == {torch.float64}
    torch.testing.assert_close(logits(model).float(), before, atol=1e-4, rtol=1e-4)
    assert logits(model.to(torch.bfloat16)).dtype == torch.bfloat16
    detach(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"], ["q_proj"]], ids="+".join)
def test_tied_embeddings_stay_tied(names: list[str]) -> None:
    model = tiny_llama(tied=True)
    weight = model.lm_head.weight
    assert weight is model.model.embed_tokens.weight
    attach(model, LoraConfig(r=4, lora_alpha=12, target_modules=names))
    fill(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight is weight
    assert sum(p is weight for p in model.parameters()) == 1
    model.tie_weights()
    model.to(torch.float64)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.requires_grad


def test_an_adapter_of_one_tied_layer_leaves_the_other_alone() -> None:
    model = tiny_llama(tied=True)
    attach(model, LoraConfig(r=4, lora_alpha=12, target_modules=["lm_head"]))
    fill(model)
    with disabled(model):
        before = model.model.embed_tokens(token_ids())
    assert torch.equal(model.model.embed_tokens(token_ids()), before)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_a_compiled_model_follows_its_adapters() -> None:
    model, x = trained_llama(EVERY), torch.randn(5, 32)
    part = model.model.layers[0].mlp
    compiled = torch.compile(part, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), part(x), atol=1e-5, rtol=1e-5)
    with disabled(model):
        base = part(x)
        torch.testing.assert_close(compiled(x), base, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(compiled(x), base, atol=1e-3)
    compiled(x).sum().backward()
    assert all(p.grad.any() for name, p in parameters(model).items() if "layers.0.mlp" in name)


# ---- several adapters ----------------------------------------------------------------------------------------------


def two_adapters(first: str = "tone", second: str = "topics") -> nn.Module:
    """`tone` on q_proj and v_proj, `topics` on every linear layer; attached in the order given, `second` active."""
    model, configs, seeds = tiny_llama(), {"tone": ATTENTION, "topics": EVERY}, {"tone": 1, "topics": 2}
    for name in (first, second):
        attach(model, configs[name], name)
        fill(model, name, seeds[name])
    return model


def test_active_adapters_add_up_in_each_layer() -> None:
    model, x = two_adapters(), torch.randn(3, 32)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    outputs = {}
    for names in ((), ("tone",), ("topics",), ("tone", "topics")):
        set_active(model, names)
        outputs[names] = layer(x)
    update = outputs["tone",] + outputs["topics",] - 2 * outputs[()]
    torch.testing.assert_close(outputs["tone", "topics"], outputs[()] + update, atol=1e-5, rtol=1e-5)
    matrices = sum(weights(model, name)["model.layers.0.self_attn.q_proj"].delta() for name in ("tone", "topics"))
    torch.testing.assert_close(outputs["tone", "topics"], outputs[()] + x @ matrices.T, atol=1e-5, rtol=1e-5)


def test_attaching_puts_the_others_at_rest_and_switching_brings_them_back() -> None:
    model = tiny_llama()
    base = logits(model)
    attach(model, ATTENTION, "tone")
    fill(model, "tone")
    tone = logits(model)
    attach(model, EVERY, "topics")
    assert adapters(model).active == ("topics",)
    assert torch.equal(logits(model), base)
    set_active(model, "tone")
    assert torch.equal(logits(model), tone)
    set_active(model, [])
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("active", ["tone", "topics", ["tone", "topics"]], ids=str)
def test_the_order_of_attaching_makes_no_difference(active: str | list[str]) -> None:
    one, other = two_adapters("tone", "topics"), two_adapters("topics", "tone")
    set_active(one, active)
    set_active(other, active)
    assert torch.equal(logits(one), logits(other))


@pytest.mark.parametrize(("gone", "stays"), [("tone", "topics"), ("topics", "tone")])
def test_taking_one_off_leaves_the_other_as_it_was(gone: str, stays: str) -> None:
    model = two_adapters()
    set_active(model, stays)
    expected = logits(model)
    set_active(model, ["tone", "topics"])
    originals = {path: layer.base for path, layer in layers(model)}
    matched = adapters(model).reports[stays].matched.keys()
    detach(model, gone)
    assert adapters(model).active == (stays,)
    assert torch.equal(logits(model), expected)
    assert {path for path, _ in layers(model)} == matched
    assert all(model.get_submodule(path) is base for path, base in originals.items() if path not in matched)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".adapters." not in n)
    detach(model, stays)
    assert all(model.get_submodule(path) is base for path, base in originals.items())
    assert all(p.requires_grad for p in model.parameters())


def test_flags_from_before_the_first_adapter_come_back_after_the_last() -> None:
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(requires_grad=False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    attach(model, ATTENTION, "tone")
    attach(model, EVERY, "topics")
    detach(model, "tone")
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".adapters." not in n)
    detach(model, "topics")
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


@pytest.mark.parametrize("active", [[], ["tone"], ["topics"], ["tone", "topics"]], ids=str)
def test_exactly_the_active_adapters_train(active: list[str]) -> None:
    model = two_adapters()
    set_active(model, active)
    training = {n for n, p in model.named_parameters() if p.requires_grad}
    assert training == {n for name in active for n in parameters(model, name)}
    assert {n.split(".adapters.")[1].split(".")[0] for n in training} == set(active)


def test_an_adapter_attached_again_after_detach_starts_anew() -> None:
    model = trained_llama()
    with disabled(model):
        base = logits(model)
    detach(model, "default")
    attach(model, EVERY)
    assert torch.equal(logits(model), base)


def test_a_name_given_twice_acts_once() -> None:
    model = two_adapters()
    expected = logits(model)
    set_active(model, ["topics", "topics"])
    assert adapters(model).active == ("topics",)
    assert torch.equal(logits(model), expected)


# ---- disabled and acting -------------------------------------------------------------------------------------------


def test_disabled_is_the_base_bit_for_bit_and_ends() -> None:
    model = tiny_llama()
    base = logits(model)
    attach(model, EVERY)
    fill(model)
    adapted = logits(model)
    with disabled(model) as same:
        assert same is model
        assert torch.equal(logits(model), base)
        with disabled(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)


@pytest.mark.parametrize("block", [disabled, lambda model: acting(model, ["tone"])], ids=["disabled", "acting"])
def test_an_exception_within_the_block_brings_the_adapters_back(block) -> None:
    model = two_adapters()
    set_active(model, ["topics", "tone"])
    expected = logits(model)
    with pytest.raises(KeyboardInterrupt), block(model):
        raise KeyboardInterrupt
    assert adapters(model).active == ("topics", "tone")
    assert torch.equal(logits(model), expected)


def test_neither_block_changes_what_trains() -> None:
    model = two_adapters()
    training = {n for n, p in model.named_parameters() if p.requires_grad}
    for block in (disabled(model), acting(model, ["tone"])):
        with block:
            assert {n for n, p in model.named_parameters() if p.requires_grad} == training
        assert {n for n, p in model.named_parameters() if p.requires_grad} == training


def test_acting_lets_one_adapter_act_alone() -> None:
    model = two_adapters()
    set_active(model, "tone")
    tone = logits(model)
    set_active(model, "topics")
    with acting(model, ["tone"]):
        assert torch.equal(logits(model), tone)
    assert adapters(model).active == ("topics",)


def test_an_adapter_taken_off_within_the_block_stays_off() -> None:
    model = two_adapters()
    set_active(model, ["tone", "topics"])
    with disabled(model):
        detach(model, "topics")
    assert adapters(model).active == ("tone",)
    with disabled(model):
        detach(model)
    assert not layers(model)


def test_a_model_without_adapters_can_be_disabled_and_detached() -> None:
    model = tiny_llama()
    before = logits(model)
    with disabled(model):
        assert torch.equal(logits(model), before)
    detach(model)
    set_active(model, [])
    assert torch.equal(logits(model), before)


# ---- names and parameters ------------------------------------------------------------------------------------------


def test_parameters_are_the_models_own_by_their_names_there() -> None:
    model = two_adapters()
    named = dict(model.named_parameters())
    for name, pairs in (("tone", 6), ("topics", 21)):
        mine = parameters(model, name)
        assert len(mine) == 2 * pairs
        assert all(named[path] is p for path, p in mine.items())
    assert parameters(model).keys() == parameters(model, "topics").keys()
    set_active(model, ["tone", "topics"])
    assert parameters(model).keys() == parameters(model, "tone").keys() | parameters(model, "topics").keys()


def test_weights_and_layers_are_found_by_path() -> None:
    model = two_adapters()
    assert list(weights(model, "tone")) == [path for path, _ in layers(model, "tone")] == list(adapters(model).reports["tone"].matched)
    for path, w in weights(model, "tone").items():
        assert model.get_submodule(path).adapters["tone"] is w
    assert len(layers(model)) == 21
    assert all(isinstance(layer, AdaptedLayer) for _, layer in layers(model))


@pytest.mark.parametrize("call", [detach, set_active, parameters, weights, only_name, lambda m, n: acting(m, [n]).__enter__()])
def test_an_unknown_name_is_refused_with_the_nearest(call) -> None:
    model = two_adapters()
    expected = logits(model)
    with pytest.raises(AdapterError, match=r"no adapter 'topic'. Did you mean 'topics'\?"):
        call(model, "topic")
    with pytest.raises(AdapterError, match=r"no adapter 'topic'. None is attached."):
        call(tiny_llama(), "topic")
    assert torch.equal(logits(model), expected)


def test_set_active_with_one_unknown_name_of_two_changes_nothing() -> None:
    model = two_adapters()
    with pytest.raises(AdapterError, match="no adapter 'tons'"):
        set_active(model, ["tone", "tons"])
    assert adapters(model).active == ("topics",)
    assert all(p.requires_grad for p in parameters(model, "topics").values())


@pytest.mark.parametrize("name", ["", "a.b", "_a", "a/b", "a\n", " a", None, 5, "keys", "items", "training", "forward", "T_destination"])
def test_what_cannot_name_an_adapter_is_refused_before_anything_is_done(name: object) -> None:
    model = tiny_llama()
    modules = dict(model.named_modules())
    with pytest.raises(AdapterError, match=r"cannot name an adapter.*as in 'tone-v2'"):
        attach(model, ATTENTION, name)
    assert dict(model.named_modules()) == modules
    assert all(p.requires_grad for p in model.parameters())
    assert not adapters(model).reports


@pytest.mark.parametrize("name", ["a", "tone-v2", "my adapter", "0", "Größe", "default", "base", "weight", "lora_A"])
def test_names_that_people_give_work(name: str) -> None:
    model = tiny_llama()
    assert isinstance(attach(model, ATTENTION, name), AttachReport)
    fill(model, name)
    assert len(parameters(model, name)) == 12
    logits(copy.deepcopy(model))
    detach(model, name)


def test_a_name_that_is_taken_is_refused_and_the_adapter_stays() -> None:
    model = trained_llama()
    expected = logits(model)
    with pytest.raises(AdapterError, match=r"already has an adapter 'default'.*detach\(model, 'default'\)"):
        attach(model, EVERY)
    assert torch.equal(logits(model), expected)
    assert len(layers(model)) == 6


def test_which_adapter_is_meant_without_a_name() -> None:
    model = tiny_llama()
    for call in (active_names, parameters, lambda m: only_name(m, None)):
        with pytest.raises(AdapterError, match=r"no active adapter: call attach\(model"):
            call(model)
    model = two_adapters()
    assert active_names(model) == ("topics",)
    assert (only_name(model, None), only_name(model, "tone")) == ("topics", "tone")
    set_active(model, ["tone", "topics"])
    with pytest.raises(AdapterError, match=r"Several adapters are active \(tone, topics\): say which one with name="):
        only_name(model, None)
    set_active(model, [])
    with pytest.raises(AdapterError, match=r"call set_active\(model, …\) with one of \['tone', 'topics'\]"):
        active_names(model)
