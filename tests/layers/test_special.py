"""Expert weights that lie in one parameter, and single tokens of an embedding: by hand and against PEFT."""

import copy
import warnings
from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import lora_nb as ln
from lora_nb.attach import adapters, parts
from lora_nb.checkpoint import file_tensors
from lora_nb.errors import TargetError
from lora_nb.layers.adapted import adapted
from lora_nb.layers.special import ParameterWeights, TokenWeights
from tests.models import peft_config, tiny_gpt2, tiny_llama, token_ids

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def mixtral() -> PreTrainedModel:
    """Experts as (experts, out, in)."""
    return MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2))


def qwen3_moe() -> PreTrainedModel:
    """The same, with other names above them."""
    more = {"intermediate_size": 48, "moe_intermediate_size": 20, "head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **more))


def gpt_oss() -> PreTrainedModel:
    """Experts as (experts, in, out), said by `is_transposed`; with biases of their own."""
    more = {"intermediate_size": 24, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GptOssForCausalLM(GptOssConfig(**SIZES, **more, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}))


EXPERTS = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}
each_model = pytest.mark.parametrize("make", EXPERTS.values(), ids=EXPERTS)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=token_ids()).logits


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    for p in ln.parameters(model).values():
        p.copy_(torch.randn_like(p) * 0.2)
    return model


def twins(make: Callable[[], PreTrainedModel], config: ln.LoraConfig) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The base; ours, as if it were trained; and PEFT's with the same tensors, each of which has found its place."""
    base = make().eval()
    ours = copy.deepcopy(base)
    ln.attach(ours, config)
    trained(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), for_peft(config)).eval()
    result = peft.set_peft_model_state_dict(theirs, file_tensors(ours, "default"))
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if ".base_layer." not in key and "lm_head" not in key and ".default" in key]
    return base, ours, theirs


def for_peft(config: ln.LoraConfig) -> peft.LoraConfig:
    theirs, tokens = peft_config(config), config.trainable_token_indices
    theirs.trainable_token_indices = {k: list(v) for k, v in tokens.items()} if isinstance(tokens, dict) else tokens and list(tokens)
    return theirs


def gradients(model: nn.Module) -> None:
    ids = token_ids()
    model.train()(input_ids=ids, labels=ids).loss.backward()


# ---- experts -------------------------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize(
    "settings",
    [
        {"target_parameters": ["experts.gate_up_proj"]},
        {"target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"], "use_rslora": True},
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "rank_pattern": {"experts.down_proj": 3}},
        {"target_parameters": ["experts.down_proj"], "target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"experts.down_proj": 5}},
        {"target_parameters": ["layers.1.mlp.experts.down_proj"], "init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_output_and_gradients_are_pefts(make: Callable[[], PreTrainedModel], settings: dict) -> None:
    config = ln.LoraConfig(**{"r": 2, "lora_alpha": 6} | settings)
    base, ours, theirs = twins(make, config)
    assert (logits(ours) - logits(base)).abs().max() > 1e-2
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    for model in (ours, theirs):
        gradients(model)
    peers = {n.removeprefix("base_model.model.").replace(".default", ""): p.grad for n, p in theirs.named_parameters()}
    for path, part in parts(ours, "default").items():
        for end, p in part.tensors().items():
            assert p.grad.any(), path + end
            torch.testing.assert_close(p.grad, peers[path + end], atol=1e-5, rtol=1e-5, msg=path + end)


@each_model
def test_the_output_at_the_start_is_the_bases_bit_for_bit(make: Callable[[], PreTrainedModel]) -> None:
    model = make().eval()
    before = logits(model)
    ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6, target_parameters=["experts.gate_up_proj", "experts.down_proj"]))
    assert torch.equal(logits(model), before)
    ln.detach(model)
    assert torch.equal(logits(model), before)


@each_model
def test_merged_weights_are_pefts_and_give_the_same_output(make: Callable[[], PreTrainedModel]) -> None:
    config = ln.LoraConfig(r=2, lora_alpha=6, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    _, ours, theirs = twins(make, config)
    expected = logits(ours)
    ln.merge(ours)
    theirs = theirs.merge_and_unload()
    torch.testing.assert_close(logits(ours), expected, atol=1e-4, rtol=1e-4)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), p, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@torch.no_grad()
def test_one_expert_by_hand(transposed) -> None:
    """Rank r of expert e is row e·r + k of A and column k·experts + e of B: expert 2 of 3, rank 1 of 2."""
    base = nn.Module()
    base.register_parameter("up", nn.Parameter(torch.zeros((3, 4, 5) if transposed else (3, 5, 4))))  # in 4, out 5
    layer = adapted(base)
    part = layer.add("default", ParameterWeights({"up": base.up}, {"up": (2, 1.5)}, transposed=transposed))
    assert (part.lora_A["up"].shape, part.lora_B["up"].shape) == ((6, 4), (5, 6))
    part.lora_A["up"].zero_()[2 * 2 + 1, 3] = 2.0
    part.lora_B["up"].zero_()[4, 1 * 3 + 2] = 1.0
    values = {"up": base.up}
    part.merge(layer, values)
    expected = torch.zeros(3, 5, 4)
    expected[2, 4, 3] = 1.5 * 2
    assert torch.equal(values["up"], expected.mT if transposed else expected)


@torch.no_grad()
def test_a_parameter_of_two_dimensions_is_a_linear_layers_weight() -> None:
    """Whether the module is named or its weight, the update is the same."""
    model, other = nn.ModuleDict({"m": nn.Linear(6, 9)}), nn.ModuleDict({"m": nn.Linear(6, 9)})
    other.load_state_dict(model.state_dict())
    ln.attach(model, ln.LoraConfig(r=2, lora_alpha=5, target_parameters=["m.weight"]))
    ln.attach(other, ln.LoraConfig(r=2, lora_alpha=5, target_modules=["m"]))
    trained(model)
    tensors = file_tensors(model, "default")
    assert tensors.keys() == file_tensors(other, "default").keys()
    part = other["m"].adapters["default"]
    part.lora_A.copy_(tensors["base_model.model.m.lora_A.weight"])
    part.lora_B.copy_(tensors["base_model.model.m.lora_B.weight"])
    x = torch.randn(3, 6)
    torch.testing.assert_close(model["m"](x), other["m"](x), atol=1e-5, rtol=1e-5)


def test_the_report_names_the_experts_with_the_size_of_one() -> None:
    for make, shape, count in ((mixtral, (32, 24), 4), (gpt_oss, (32, 24), 4), (qwen3_moe, (32, 20), 6)):
        report = ln.attach(make(), ln.LoraConfig(r=2, lora_alpha=6, target_parameters=["experts.down_proj"]))
        found = report.matched["model.layers.1.mlp.experts"]
        assert (found.shape, found.rank, found.scale, found.parameters) == (shape, 2, 3, count * 2 * sum(shape))


def test_two_adapters_on_the_same_experts_add_up() -> None:
    model = mixtral().eval()
    base = dict(model.model.layers[0].mlp.experts.named_parameters())["down_proj"].detach().clone()
    deltas = {}
    for name in ("one", "two"):
        ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6, target_parameters=["experts.down_proj"]), name)
        trained(model)
        deltas[name] = model.model.layers[0].mlp.experts.adapters[name].update("down_proj", base).detach()
    ln.set_active(model, ["one", "two"])
    expected = logits(model)
    ln.merge(model)
    torch.testing.assert_close(model.model.layers[0].mlp.experts.down_proj, base + deltas["one"] + deltas["two"])
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


# ---- tokens --------------------------------------------------------------------------------------------------------

TOKENS = [7, 3, 60]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("settings", [{}, {"target_modules": ["q_proj", "v_proj"]}], ids=["all-linear", "some"])
def test_tokens_that_train_are_pefts(tied, settings: dict) -> None:
    """Where the head is tied to the embedding the same rows give the logits of these tokens, in PEFT as well."""
    config = ln.LoraConfig(r=2, lora_alpha=6, trainable_token_indices=TOKENS, **settings)
    base, ours, theirs = twins(lambda: tiny_llama(tied=tied), config)
    assert (logits(ours) - logits(base))[..., TOKENS].abs().max() > 0.1
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    for model in (ours, theirs):
        gradients(model)
    peers = {n: p.grad for n, p in theirs.named_parameters() if "trainable_tokens_delta" in n and p.grad is not None}
    mine = parts(ours, "default")["model.embed_tokens"].trainable_tokens_delta.grad
    torch.testing.assert_close(mine, next(iter(peers.values())), atol=1e-5, rtol=1e-5)
    assert mine.any(1).all() == tied  # those that are not in the text learn through the head alone


def test_tokens_of_a_tied_gpt2_are_pefts() -> None:
    base, ours, theirs = twins(tiny_gpt2, ln.LoraConfig(r=2, lora_alpha=6, trainable_token_indices={"wte": TOKENS}))
    assert (logits(ours) - logits(base)).abs().max() > 0.1
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


def test_a_tied_head_shares_the_rows_and_the_file_has_them_once() -> None:
    model = tiny_llama(tied=True)
    report = ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], trainable_token_indices=TOKENS))
    found = parts(model, "default")
    assert found["lm_head"].trainable_tokens_delta is found["model.embed_tokens"].trainable_tokens_delta
    assert [key for key in file_tensors(model, "default") if "token" in key] == [
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    ]
    assert (report.matched["model.embed_tokens"].parameters, report.matched["lm_head"].parameters) == (3 * 32, 0)
    assert sum(p.shape == (3, 32) for p in ln.parameters(model).values()) == 1
    assert not report.notes


@torch.no_grad()
def test_only_the_chosen_tokens_change_and_only_their_logits() -> None:
    model = tiny_llama(tied=True)
    base = copy.deepcopy(model)
    ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], trainable_token_indices=TOKENS))
    rows = parts(model, "default")["model.embed_tokens"].trainable_tokens_delta
    assert torch.equal(rows, base.model.embed_tokens.weight[TOKENS])
    assert torch.equal(logits(model), logits(base))
    rows.copy_(torch.randn_like(rows))
    every = torch.arange(61)[None]
    changed = (model.model.embed_tokens(every) != base.model.embed_tokens(every)).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == sorted(TOKENS)
    torch.testing.assert_close(model.model.embed_tokens(every)[0, TOKENS], rows, atol=1e-6, rtol=1e-6)
    hidden = torch.randn(2, 5, 32)
    difference = (model.lm_head(hidden) - base.lm_head(hidden)).abs().amax((0, 1))
    assert (difference > 1e-3).nonzero().flatten().tolist() == sorted(TOKENS)
    torch.testing.assert_close(model.lm_head(hidden)[..., TOKENS], hidden @ rows.T, atol=1e-5, rtol=1e-5)


def test_tokens_merge_into_the_weight_and_stay_tied() -> None:
    model = tiny_llama(tied=True)
    ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], trainable_token_indices=TOKENS))
    trained(model)
    expected, rows = logits(model), parts(model, "default")["model.embed_tokens"].trainable_tokens_delta.detach().clone()
    ln.merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight[TOKENS], rows)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_a_token_that_two_rows_are_asked_for_keeps_to_its_own() -> None:
    """Embedding and head untied, each with tokens of its own."""
    model = tiny_llama()
    ln.attach(
        model, ln.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5], "lm_head": [9, 8]})
    )
    found = {path: part for path, part in parts(model, "default").items() if isinstance(part, TokenWeights)}
    assert {path: part.token_indices.tolist() for path, part in found.items()} == {"model.embed_tokens": [5], "lm_head": [9, 8]}
    assert set(adapters(model).reports["default"].matched) >= {"model.embed_tokens", "lm_head"}


def test_the_head_alone_of_a_tied_pair_keeps_its_rows_to_itself() -> None:
    """As in PEFT: only rows of the input embedding are the head's as well."""
    model = tiny_llama(tied=True)
    report = ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], trainable_token_indices={"lm_head": [5]}))
    assert [path for path, m in report.matched.items() if m.method == "1 tokens"] == ["lm_head"]
    assert report.notes == ("lm_head shares its weight with model.embed_tokens in the base; this adapter changes it for lm_head alone.",)


def test_indices_travel_with_the_device_and_the_type() -> None:
    model = tiny_llama()
    ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], trainable_token_indices=TOKENS))
    part = parts(model.to(torch.bfloat16), "default")["model.embed_tokens"]
    assert part.token_indices.tolist() == TOKENS
    assert part.trainable_tokens_delta.dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16
    assert not [key for key in model.state_dict() if "token_indices" in key]


def test_two_adapters_with_rows_of_the_same_token_act_one_after_the_other() -> None:
    """Each adds its difference from the base's row."""
    model = tiny_llama()
    rows = []
    for name in ("one", "two"):
        ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], trainable_token_indices=[5]), name)
        trained(model)
        rows.append(parts(model, name)["model.embed_tokens"].trainable_tokens_delta.detach())
    ln.set_active(model, ["one", "two"])
    old = model.model.embed_tokens.weight[5].detach()
    new = model.model.embed_tokens(torch.tensor([5]))[0]
    torch.testing.assert_close(new, old + (rows[0][0] - old) + (rows[1][0] - old), atol=1e-5, rtol=1e-5)
    ln.merge(model)
    torch.testing.assert_close(model.model.embed_tokens.weight[5], new, atol=1e-5, rtol=1e-5)


# ---- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_parameters": ["experts.gate_up"]}, ["'experts.gate_up'", "matches no parameter", "Did you mean 'experts.gate_up_proj'?"]),
        ({"target_parameters": ["experts.down_proj"], "r": 21}, ["rank 21", "'model.layers.0.mlp.experts'", "above 20"]),
        ({"target_parameters": ["norm.weight"]}, ["model.norm.weight of 1 dimensions", "two, or three with experts"]),
        ({"trainable_token_indices": [3, 61]}, ["has token 61", "'model.embed_tokens' has 61: 0 to 60"]),
        ({"trainable_token_indices": {"embed_token": [3]}}, ["'embed_token'", "Did you mean 'embed_tokens'?"]),
        ({"trainable_token_indices": [3], "target_modules": ["embed_tokens"]}, ["'model.embed_tokens' would be adapted twice"]),
        ({"target_parameters": ["q_proj.weight"], "target_modules": ["q_proj"]}, ["q_proj' would be adapted twice"]),
        ({"target_parameters": ["experts.down_proj"], "rank_pattern": {"experts": 3}}, ["rank_pattern has the key 'experts'"]),
    ],
    ids=str,
)
def test_misuse_is_refused(settings: dict, says: list[str]) -> None:
    model = qwen3_moe()
    before = dict(model.named_modules())
    with pytest.raises(TargetError) as refusal:
        ln.attach(model, ln.LoraConfig(**{"r": 2, "lora_alpha": 6} | settings))
    assert [part for part in says if part not in str(refusal.value)] == []
    assert dict(model.named_modules()) == before
