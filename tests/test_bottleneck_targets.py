"""Where bottleneck adapters go, what their settings may say, and that a model carries them through everything a user does with it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lora_nb as ln
from lora_nb.attach import layers
from lora_nb.bottleneck_targets import KNOWN, sites
from lora_nb.errors import ConfigError, TargetError
from lora_nb.layers.bottleneck import Bottleneck
from tests.models import tiny_bert_classifier, tiny_falcon, tiny_gpt2, tiny_llama, token_ids

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 1}
T5 = {"vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
FALCON = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", GROUPED),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**GROUPED, "head_dim": 8}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**GROUPED, "num_local_experts": 2}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**GROUPED, "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "falcon": ("FalconConfig", "FalconForCausalLM", {**FALCON, "parallel_attn": False}),
    "bert": ("BertConfig", "BertForMaskedLM", SIZES),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", SIZES),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaForMaskedLM", SIZES),
    "electra": ("ElectraConfig", "ElectraForMaskedLM", {**SIZES, "embedding_size": 8}),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5),
    "mt5": ("MT5Config", "MT5ForConditionalGeneration", T5),
}
PRESETS = {
    "houlsby": ln.BottleneckConfig.houlsby,
    "pfeiffer": ln.BottleneckConfig.pfeiffer,
    "parallel": ln.BottleneckConfig.parallel,
}
SIDE_BY_SIDE = {  # attention and MLP read the same stream
    "one norm": {},
    "two norms": {"new_decoder_architecture": True, "num_kv_heads": 1},
    "one norm of the new kind": {"new_decoder_architecture": True, "num_kv_heads": 1, "num_ln_in_parallel_attn": 1},
}


def made(kind: str, **settings: object) -> nn.Module:
    """A tiny model with weights large enough that each of its parts shows."""
    config, model, sizes = MODELS[kind]
    out = getattr(transformers, model)(getattr(transformers, config)(**{**sizes, **settings})).eval()
    with torch.no_grad():
        for p in out.parameters():
            p.normal_(std=0.3)
    return out


def inputs(model: nn.Module) -> dict[str, Tensor]:
    ids = token_ids()
    return {"input_ids": ids, "decoder_input_ids": ids[:, :5]} if hasattr(model, "decoder") else {"input_ids": ids}


@torch.no_grad()  # with gradients attention takes another kernel, which rounds differently
def called(model: nn.Module) -> Tensor:
    return model(**inputs(model)).logits


def fill(model: nn.Module, name: str = "default") -> None:
    with torch.no_grad():
        for p in ln.parameters(model, name).values():
            p.normal_(std=0.3)


def seen_by(model: nn.Module, run: Callable[[], object]) -> list[Tensor]:
    """What each adapter looked at, in the order of the forward."""
    seen: list[Tensor] = []
    hooks = [m.down.register_forward_pre_hook(lambda _m, a: seen.append(a[0])) for m in model.modules() if isinstance(m, Bottleneck)]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return seen


# ---- on each model that is known -----------------------------------------------------------------------------------


def test_every_known_kind_is_tested() -> None:
    assert MODELS.keys() == KNOWN.keys() | {"falcon"}


@pytest.mark.parametrize("kind", MODELS)
def test_pfeiffers_adapter_looks_at_what_the_block_gives(kind: str) -> None:
    """On the residual stream behind the MLP, after the norm where there is one: the block's own output."""
    model, given = made(kind), []
    before = called(model)
    ln.attach(model, ln.BottleneckConfig.pfeiffer(4))
    assert torch.equal(called(model), before)
    for path in dict.fromkeys(site.path for site in sites(model, ln.BottleneckConfig.pfeiffer())):
        model.get_submodule(path).register_forward_hook(lambda _m, _a, out: given.append(out[0] if isinstance(out, tuple) else out))
    seen = seen_by(model, lambda: called(model))
    assert len(seen) == len(given) == (4 if "t5" in kind else 2)
    for h, out in zip(seen, given, strict=True):
        torch.testing.assert_close(h, out, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", [k for k in MODELS if "bert" not in k and k != "electra"])
def test_parallel_adapters_look_at_what_the_norm_in_front_looks_at(kind: str) -> None:
    model, streams = made(kind), []
    before = called(model)
    ln.attach(model, ln.BottleneckConfig.parallel(mh_adapter=True))
    assert torch.equal(called(model), before)
    for path, _ in layers(model):
        if "norm" in path or path.endswith(("ln_1", "ln_2")):
            model.get_submodule(path).register_forward_pre_hook(lambda _m, a: streams.append(a[0]))
    seen = seen_by(model, lambda: called(model))
    assert len(seen) == (8 if "t5" in kind else 4)
    assert all(any(h is stream for stream in streams) for h in seen)
    assert len({id(h) for h in seen}) == len(seen)


@pytest.mark.parametrize("settings", SIDE_BY_SIDE.values(), ids=SIDE_BY_SIDE)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_falcon_whose_sublayers_stand_side_by_side(preset: str, settings: dict) -> None:
    model, streams = made("falcon", parallel_attn=True, **settings), []
    before = called(model)
    ln.attach(model, PRESETS[preset](4, mh_adapter=True))
    assert torch.equal(called(model), before)
    for block in model.transformer.h:
        block.register_forward_pre_hook(lambda _m, a: streams.append(a[0]))
    seen = seen_by(model, lambda: called(model))
    assert len(seen) == 4
    if preset == "parallel":
        assert all(seen[2 * i] is seen[2 * i + 1] is streams[i] for i in range(2))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("preset", PRESETS)
def test_detached_the_model_is_what_it_was(kind: str, preset: str) -> None:
    model = made(kind)
    bare, before = copy.deepcopy(model), called(model)
    ln.attach(model, PRESETS[preset](4))
    fill(model)
    assert (called(model) - before).abs().max() > 1e-2
    with ln.disabled(model):
        assert torch.equal(called(model), before)
    ln.detach(model)
    assert torch.equal(called(model), before)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in bare.named_modules()]
    assert model.state_dict().keys() == bare.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), bare.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", ["llama", "mistral", "falcon", "gpt2", "t5"])
@pytest.mark.parametrize("preset", PRESETS)
def test_generating_with_a_cache_gives_the_tokens_that_it_gives_without(kind: str, preset: str) -> None:
    model = made(kind)
    ln.attach(model, PRESETS[preset](4, mh_adapter=True))
    fill(model)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ids = token_ids()
    with_cache, without = (model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=c, **settings) for c in (True, False))
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon", "bert", "t5"])
@pytest.mark.parametrize("preset", PRESETS)
def test_gradient_checkpointing_gives_the_same_gradients(kind: str, preset: str) -> None:
    model = made(kind).train()
    ln.attach(model, PRESETS[preset](4, mh_adapter=True, dropout=0.1))
    fill(model)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)  # the models' dropout, and the adapters'
        model(**inputs(model), use_cache=False).logits.square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in ln.parameters(model).items()})
        model.zero_grad()
    assert all(g.abs().max() > 0 for g in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_hidden_states_and_attentions_are_still_to_be_had(kind: str) -> None:
    """transformers finds them by the class of blocks and attentions: these stay in their places."""
    model = made(kind, attn_implementation="eager")
    ln.attach(model, ln.BottleneckConfig.houlsby(4))
    out = model(input_ids=token_ids(), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3
    assert len(out.attentions) == 2


def test_training_moves_the_adapter_alone() -> None:
    model, tokenizer = ln.load("tiny")
    before = {n: p.clone() for n, p in model.named_parameters()}
    ln.attach(model, ln.BottleneckConfig.pfeiffer(16))
    start = {n: p.clone() for n, p in ln.parameters(model).items()}
    run = ln.train(model, tokenizer, ln.dataset("tone"), ln.TrainConfig(max_steps=12, batch_size=4, seq_len=64, learning_rate=5e-3))
    assert sum(run.losses[-3:]) < sum(run.losses[:3])
    assert all(not torch.equal(p, start[n]) for n, p in ln.parameters(model).items())
    ln.detach(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_several_adapters_are_switched_and_taken_off_singly() -> None:
    model = made("llama")
    before = called(model)
    outputs = {}
    for name, config in {
        "h": ln.BottleneckConfig.houlsby(4),
        "p": ln.BottleneckConfig.parallel(4),
        "l": ln.LoraConfig(r=3, lora_alpha=7),
    }.items():
        ln.attach(model, config, name)
        fill(model, name)
        outputs[name] = called(model)
    ln.set_active(model, ["h", "p", "l"])
    together = called(model)
    assert all((together - out).abs().max() > 1e-2 for out in outputs.values())
    ln.detach(model, "p")
    for name in ("h", "l"):
        ln.set_active(model, name)
        assert torch.equal(called(model), outputs[name])
    ln.detach(model)
    assert torch.equal(called(model), before)


def test_all_linear_means_the_bases_layers_alone() -> None:
    model, bare = made("llama"), made("llama")
    ln.attach(model, ln.BottleneckConfig.houlsby(4))
    config = ln.LoraConfig(r=3, lora_alpha=7)
    assert ln.attach(model, config, "lora").matched.keys() == ln.attach(bare, config).matched.keys()


def test_a_classifier_keeps_its_head() -> None:
    model = tiny_bert_classifier()
    report = ln.attach(model, ln.BottleneckConfig.pfeiffer(4))
    assert list(report.matched) == [f"bert.encoder.layer.{i}.output.dropout" for i in range(3)]
    assert "8" in repr(report).splitlines()[3]


def test_the_report_names_what_carries_an_adapter() -> None:
    report = ln.attach(tiny_llama(), ln.BottleneckConfig.houlsby(8, leave_out=[1]))
    assert list(report.matched) == [f"model.layers.{i}.{m}" for i in (0, 2) for m in ("self_attn.o_proj", "mlp")]
    assert {(m.method, m.shape, m.rank, m.scale, m.parameters) for m in report.matched.values()} == {("bottleneck", (32, 32), 4, 1.0, 292)}


# ---- models that are not known -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["own", "cross"])
def test_an_unknown_block_is_refused_with_the_way_to_name_it(kind: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3)) if kind == "own" else made("gpt2", add_cross_attention=True)
    before = list(model.named_modules())
    with pytest.raises(TargetError, match=r"(?s)placed by themselves in llama.*blocks=Block\(layers="):
        ln.attach(model, ln.BottleneckConfig.pfeiffer())
    assert list(model.named_modules()) == before


def test_what_a_user_names_is_what_is_known() -> None:
    """A Llama described by hand, module by module."""
    by_hand = ln.Block(
        layers="model.layers",
        attention=ln.Sublayer(output="self_attn", reads="input_layernorm"),
        mlp=ln.Sublayer(output="mlp.down_proj", reads="post_attention_layernorm"),
    )
    outputs = []
    for blocks in ((), by_hand):
        model = tiny_llama()
        ln.attach(model, ln.BottleneckConfig.pfeiffer(4, mh_adapter=True, blocks=blocks))
        torch.manual_seed(1)
        fill(model)
        outputs.append(called(model))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)


WRONG_BLOCKS = {
    "list": ({"layers": "layer"}, "means no module of this model.*lists are: model.layers"),
    "several": ({"layers": "0"}, "means several: model.layers.0, other.0"),
    "output": ({"mlp": ln.Sublayer(output="ffn", reads="mlp")}, "'model.layers.0.ffn', but 'model.layers.0' has self_attn, mlp,"),
    "deeper": ({"mlp": ln.Sublayer(output="mlp.down", reads="mlp")}, "'model.layers.0.mlp.down', but 'model.layers.0.mlp' has gate_proj"),
    "blind": ({"mlp": ln.Sublayer(output="mlp")}, "looks at the residual stream: name a module"),
    "twice": ({"mlp": ln.Sublayer(output="mlp", reads="mlp")}, "would carry two parts"),
    "attention": ({"attention": None}, "mh_adapter=True, but the blocks of this model have no attention"),
}


@pytest.mark.parametrize(("wrong", "words"), WRONG_BLOCKS.values(), ids=WRONG_BLOCKS)
def test_wrong_names_are_refused_with_what_is_there(wrong: dict, words: str) -> None:
    model = tiny_llama()
    model.other = nn.ModuleList([nn.Linear(2, 2)])
    right = {
        "layers": "model.layers",
        "attention": ln.Sublayer(output="self_attn", reads="input_layernorm"),
        "mlp": ln.Sublayer(output="mlp", reads="post_attention_layernorm"),
    }
    config = ln.BottleneckConfig.pfeiffer(4, mh_adapter=True, blocks=ln.Block(**{**right, **wrong}))
    with pytest.raises(TargetError, match=words):
        ln.attach(model, config)
    assert not layers(model)


def test_a_model_without_a_config_has_to_say_its_width() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"ffn": nn.Linear(6, 6)})])})
    block = {"layers": "blocks", "mlp": ln.Sublayer(output="ffn")}
    with pytest.raises(TargetError, match="width=256"):
        ln.attach(model, ln.BottleneckConfig.houlsby(mh_adapter=False, blocks=ln.Block(**block)))
    report = ln.attach(model, ln.BottleneckConfig.houlsby(2, mh_adapter=False, blocks=ln.Block(**block, width=6)))
    assert report.matched["blocks.0.ffn"].rank == 3


# ---- settings ------------------------------------------------------------------------------------------------------

IDLE = {
    "leave_out": ({"leave_out": [0, 3]}, "leave_out names layer 3, but the model has layers 0 to 2"),
    "everything": ({"leave_out": [0, 1, 2]}, "leaves no layer of 3 an adapter"),
    "factor": ({"reduction_factor": {"7": 4, "default": 2}}, "reduction_factor names layer 7"),
    "no default": ({"reduction_factor": {"0": 4, "1": 2}}, "says nothing of layer 2"),
    "cross": ({"cross_adapter": True}, "no cross_attention"),
}


@pytest.mark.parametrize(("settings", "words"), IDLE.values(), ids=IDLE)
def test_settings_that_mean_nothing_here_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(TargetError, match=words):
        ln.attach(tiny_gpt2(), ln.BottleneckConfig(**settings))


BAD = {
    "unknown": ({"reduction": 4}, "no field 'reduction'. Did you mean 'reduction_factor'?"),
    "switch": ({"mh_adapter": 1}, "mh_adapter must be True or False"),
    "nothing": ({"output_adapter": False}, "output_adapter must be True, or mh_adapter, or cross_adapter"),
    "factor": ({"reduction_factor": 0}, "reduction_factor must be at least 1/64"),
    "no factor": ({"reduction_factor": {}}, "a number, or a dict"),
    "no layer": ({"reduction_factor": {"first": 3}}, "a number, or a dict"),
    "non_linearity": ({"non_linearity": "rellu"}, "Did you mean 'relu'?"),
    "scaling": ({"scaling": "learnt"}, "a number, 'learned' or 'channel'"),
    "init": ({"init_weights": "mam_adaptor"}, "Did you mean 'mam_adapter'?"),
    "dropout": ({"dropout": 1.0}, "dropout must be in"),
    "leave_out": ({"leave_out": [-1]}, "layer numbers from 0"),
    "blocks": ({"blocks": ["layers"]}, "a Block or several"),
    "twice": ({"residual_before_ln": False}, "leaves out the block's own residual or adds it twice"),
    "lost": ({"original_ln_before": False, "original_ln_after": False}, "leaves out the block's own residual"),
    "lost beside": ({"is_parallel": True, "original_ln_after": False}, "leaves out the block's own residual"),
    "post_add": ({"residual_before_ln": "post_add"}, "residual_before_ln must be True or False"),
}


@pytest.mark.parametrize(("settings", "words"), BAD.values(), ids=BAD)
def test_bad_settings_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ln.BottleneckConfig(**settings)
    assert words in str(refused.value)


BAD_BLOCKS: dict[str, tuple[Callable[[], object], str]] = {
    "path": (lambda: ln.Sublayer(output="mlp."), "a module's path"),
    "no output": (lambda: ln.Sublayer(reads="norm", output=None), "a module's path"),
    "empty": (lambda: ln.Block(layers="h"), "mlp must be given"),
    "no layers": (lambda: ln.Block(layers="", mlp=ln.Sublayer(output="mlp")), "the path of the list"),
    "string": (lambda: ln.Block(layers="h", mlp="mlp"), "a Sublayer, as in"),
    "width": (lambda: ln.Block(layers="h", mlp=ln.Sublayer(output="mlp"), width=0), "width must be"),
}


@pytest.mark.parametrize(("make", "words"), BAD_BLOCKS.values(), ids=BAD_BLOCKS)
def test_bad_blocks_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_a_config_does_not_change_with_what_it_was_made_of() -> None:
    factors, left = {1: 4, "default": 2}, [2, 0, 2]
    config = ln.BottleneckConfig(reduction_factor=factors, leave_out=left)
    factors["default"], left[0] = 9, 9
    assert config.reduction_factor == {"1": 4, "default": 2}
    assert config.leave_out == (0, 2)
    assert [config.factor(i) for i in range(3)] == [2, 4, 2]


def test_falcon_is_placed_by_itself() -> None:
    assert len(ln.attach(tiny_falcon(), ln.BottleneckConfig.houlsby()).matched) == 4
