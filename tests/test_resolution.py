"""All that a config means, beside low-rank updates of modules: whole modules, biases, heads, and what a file may say in vain."""

import copy
import dataclasses
import warnings
from pathlib import Path

import peft
import pytest
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import DistilBertConfig, DistilBertForSequenceClassification

import lora_nb as ln
from lora_nb.configs import LoraConfig
from lora_nb.errors import AdapterFileError, TargetError
from lora_nb.file_targets import spelled_for_peft, without_idle
from lora_nb.resolution import refuse_idle_settings, resolve, with_head
from tests.models import peft_config, peft_layers, tiny_bert_classifier, tiny_gpt2, tiny_llama

R = {"r": 4, "lora_alpha": 12}


def what(model: nn.Module, **settings: object) -> dict[str, str]:
    return {t.name: t.what for t in resolve(model, LoraConfig(**R | settings))}


# ---- the head of a task ------------------------------------------------------------------------------------------------


def heads(model: nn.Module) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", None])
@pytest.mark.parametrize("targets", [["query"], r".*\.(query|value)", ["query", "dense"]], ids=str)
def test_the_head_of_a_task_trains_whole_as_under_get_peft_model(task: str | None, targets: object) -> None:
    config = LoraConfig(**R, target_modules=targets, task_type=task)
    found = resolve(tiny_bert_classifier(), config)
    theirs = peft.get_peft_model(tiny_bert_classifier(), peft_config(config))
    assert {t.name for t in found if t.what == "whole"} == heads(theirs) == ({"classifier"} if task in {"SEQ_CLS", "TOKEN_CLS"} else set())
    assert {t.name for t in found if t.r} == {name.removeprefix("base_model.model.") for name in peft_layers(theirs)}


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_all_linear_leaves_a_head_alone_that_trains_whole(task: str) -> None:
    """PEFT fails at TOKEN_CLS: it adapts the head first and then cannot save it whole."""
    config = LoraConfig(**R, task_type=task)
    found = {t.name: t.what for t in resolve(tiny_bert_classifier(), config)}
    assert found.pop("classifier") == "whole"
    assert set(found.values()) == {"LoRA"}
    if task == "TOKEN_CLS":
        with pytest.raises(TypeError, match="modules_to_save cannot be applied"):
            peft.get_peft_model(tiny_bert_classifier(), peft_config(config))
    else:
        theirs = peft.get_peft_model(tiny_bert_classifier(), peft_config(config))
        assert set(found) == {name.removeprefix("base_model.model.") for name in peft_layers(theirs)}


def test_a_head_that_is_named_as_a_target_is_one() -> None:
    assert what(tiny_bert_classifier(), target_modules=["query", "classifier"], task_type="TOKEN_CLS")["classifier"] == "LoRA"


def test_a_config_whose_head_is_named_already_is_left_as_it_is() -> None:
    modules = dict(tiny_bert_classifier().named_modules())
    for config in (LoraConfig(**R), LoraConfig(**R, task_type="SEQ_CLS", modules_to_save=["classifier"])):
        assert with_head(config, modules) is config
    assert with_head(LoraConfig(**R, task_type="SEQ_CLS", modules_to_save=["pooler"]), modules).modules_to_save == ("pooler", "classifier")


# ---- whole modules and biases ------------------------------------------------------------------------------------------


def test_what_trains_whole_gets_no_update_of_low_rank() -> None:
    found = what(tiny_llama(), modules_to_save=["layers.1", "norm"])
    assert {name for name, method in found.items() if method == "whole"} == {
        name for name, m in tiny_llama().named_modules() if name.startswith("model.layers.1.") and list(m.parameters(recurse=False))
    } | {"model.norm"}
    assert {name for name, method in found.items() if method == "LoRA"} == {
        name
        for name, m in tiny_llama().named_modules()
        if isinstance(m, nn.Linear) and name.startswith(("model.layers.0", "model.layers.2"))
    }


def test_the_most_specific_name_is_no_other() -> None:
    """`norm` is the last one alone, not those whose name ends in it."""
    assert [n for n, method in what(tiny_llama(), modules_to_save=["norm"]).items() if method == "whole"] == ["model.norm"]


def test_biases_are_those_of_the_adapted_layers_or_all() -> None:
    model = tiny_gpt2()
    with_bias = {name for name, m in model.named_modules() if getattr(m, "bias", None) is not None}
    only = resolve(model, LoraConfig(**R, target_modules=["c_attn"], bias="lora_only"))
    assert {t.what for t in only} == {"LoRA"}
    assert all(t.blank().replaces for t in only)
    every = resolve(model, LoraConfig(**R, target_modules=["c_attn"], bias="all"))
    assert {t.name for t in every} == with_bias
    assert {t.name for t in every if t.what == "LoRA"} == {t.name for t in only}
    assert not any(t.blank().replaces for t in resolve(model, LoraConfig(**R, target_modules=["c_attn"])))


def test_targets_of_every_kind_come_in_the_models_order() -> None:
    model = tiny_llama()
    settings = {
        "target_modules": ["v_proj"],
        "modules_to_save": ["lm_head"],
        "trainable_token_indices": [3],
        "target_parameters": ["up_proj.weight"],
    }
    found = what(model, **settings)
    assert list(found) == sorted(found, key=[name for name, _ in model.named_modules()].index)
    assert set(found.values()) == {"LoRA", "whole", "1 tokens"}


# ---- misuse ------------------------------------------------------------------------------------------------------------

GROUPED = {"m": lambda: nn.Conv2d(6, 8, 3, groups=2), "e": lambda: nn.Embedding(9, 7), "up": lambda: nn.Linear(6, 8)}
MISUSE = {
    "a misspelt module to save": ({"modules_to_save": ["lm_haed"]}, ["modules_to_save", "'lm_haed'", "Did you mean 'lm_head'?"]),
    "one of two modules to save misspelt": ({"modules_to_save": ["norm", "nrom"]}, ["'nrom'", "Did you mean 'norm'?"]),
    "a module to save that is a target": (
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
        ["'lm_head'", "drop it"],
    ),
    "a misspelt exclusion": ({"exclude_modules": ["q_prj"]}, ["exclude_modules names 'q_prj'", "Did you mean 'q_proj'?"]),
    "an idle pattern to exclude": ({"exclude_modules": "k_proj"}, ["exclude_modules='k_proj' matches no module", "whole path"]),
    "a token of the vocabulary's end": ({"trainable_token_indices": [61]}, ["token 61", "0 to 60"]),
    "tokens of no embedding": ({"trainable_token_indices": {"wte": [1]}}, ["'wte'", "There are: embed_tokens"]),
    "a misspelt parameter": ({"target_parameters": ["q_proj.weigth"]}, ["'q_proj.weigth'", "Did you mean 'q_proj.weight'?"]),
    "a bias as a parameter": ({"target_parameters": ["norm.weight"]}, ["1 dimensions"]),
    "adapted twice": ({"target_modules": ["up_proj"], "target_parameters": ["up_proj.weight"]}, ["would be adapted twice"]),
    "saved and adapted": (
        {"target_parameters": ["lm_head.weight"], "modules_to_save": ["lm_head"]},
        ["'lm_head' would be adapted twice", "whole"],
    ),
    "saved and its tokens": ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, ["would be adapted twice", "1 tokens"]),
}


@pytest.mark.parametrize("misuse", MISUSE)
def test_misuse_is_refused_with_the_remedy_and_leaves_the_model_alone(misuse: str) -> None:
    settings, says = MISUSE[misuse]
    model = tiny_llama()
    modules, flags = dict(model.named_modules()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(TargetError) as refusal:
        ln.attach(model, LoraConfig(**R | settings))
    assert [part for part in says if part not in str(refusal.value)] == []
    assert dict(model.named_modules()) == modules
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_modules": ["m"], "r": 3}, ["rank 3", "'m'", "2 groups", "multiple of 2"]),
        ({"target_modules": ["m"], "use_dora": True}, ["'m' is a convolution of 2 groups", "DoRA's norm"]),
        ({"target_modules": ["m"], "init_lora_weights": "pissa"}, ["2 groups", "PiSSA's start"]),
        ({"target_modules": ["e"], "lora_bias": True}, ["'e' is an embedding, where lora_bias has no meaning"]),
        ({"target_modules": ["e"], "init_lora_weights": "olora"}, ["'e' is an embedding", "init_lora_weights='olora'"]),
        ({"target_modules": ["e"], "r": 8}, ["rank 8", "9 × 7", "above 7"]),
        ({"target_modules": ["m"], "r": 10}, ["rank 10", "54 × 8", "above 8"]),
    ],
    ids=str,
)
def test_what_a_kind_of_layer_has_no_room_for_is_refused(settings: dict, says: list[str]) -> None:
    model = nn.ModuleDict({name: make() for name, make in GROUPED.items()})
    config = LoraConfig(**R | settings)
    with pytest.raises(TargetError) as refusal:
        refuse_idle_settings(config, resolve(model, config))
    assert [part for part in says if part not in str(refusal.value)] == []


def test_peft_says_nothing_of_most_of_this() -> None:
    """The misuse table of the pains that its users write of: all of it raises here."""
    silent = [
        {"target_modules": ["q_proj", "v_prj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_haed"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 7]},
        {"target_modules": ["k_proj"], "r": 17},
    ]
    for settings in silent:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            peft.inject_adapter_in_model(peft.LoraConfig(**R | settings), tiny_llama())
        with pytest.raises(TargetError):
            ln.attach(tiny_llama(), LoraConfig(**R | settings))


# ---- names in modules_to_save, for which PEFT asks no dot before them ------------------------------------------------------

NORMS = (
    *(f"model.layers.{i}.{name}_layernorm" for i in range(3) for name in ("input", "post_attention")),
    "model.norm",
)


def test_peft_saves_more_than_is_named_and_its_file_is_read_all_the_same(tmp_path: Path) -> None:
    config = peft.LoraConfig(**R, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny_llama(), config)
    assert heads(theirs) == set(NORMS)
    theirs.save_pretrained(tmp_path)
    report = ln.load_adapter(tiny_llama(), tmp_path)
    assert {name for name, m in report.matched.items() if m.method == "whole"} == set(NORMS)


def test_what_we_write_means_no_more_to_peft(tmp_path: Path) -> None:
    for names, written in ((["norm"], ["model.norm"]), (["lm_head"], ["lm_head"]), (["mlp"], ["mlp"])):
        config = LoraConfig(**R, target_modules=["q_proj"], modules_to_save=names)
        assert spelled_for_peft(tiny_llama(), config).modules_to_save == tuple(written)
    model = tiny_llama()
    ln.attach(model, LoraConfig(**R, target_modules=["q_proj"], modules_to_save=["norm"]))
    assert heads(peft.PeftModel.from_pretrained(tiny_llama(), ln.save(model, tmp_path))) == {"model.norm"}


def test_both_layers_of_a_head_train(tmp_path: Path) -> None:
    """DistilBERT's `pre_classifier` starts at random, too; to PEFT its name ends in "classifier"."""
    sizes = {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "num_labels": 3, "max_position_embeddings": 64}

    def make() -> nn.Module:
        return DistilBertForSequenceClassification(DistilBertConfig(**sizes)).eval()

    config = LoraConfig(**R, target_modules=["q_lin"], task_type="SEQ_CLS")
    base = make()
    ours, theirs = copy.deepcopy(base), peft.get_peft_model(copy.deepcopy(base), peft_config(config))
    report = ln.attach(ours, config)
    assert {name for name, m in report.matched.items() if m.method == "whole"} == heads(theirs) == {"pre_classifier", "classifier"}
    read = copy.deepcopy(base)
    theirs.save_pretrained(tmp_path / "theirs")
    assert ln.load_adapter(read, tmp_path / "theirs").trainable == report.trainable
    assert heads(peft.PeftModel.from_pretrained(copy.deepcopy(base), ln.save(ours, tmp_path / "ours"))) == heads(theirs)


# ---- one update for two tied layers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_a_low_rank_update_of_a_tied_pair_is_refused_and_so_is_pefts_file_of_one(name: str, tmp_path: Path) -> None:
    settings = {"target_modules": [name, "q_proj"], "ensure_weight_tying": True}
    says = (
        r"ensure_weight_tying asks for one update of '.*' and '.*', which share a weight.*Name '(embed_tokens|lm_head)' in modules_to_save"
    )
    with pytest.raises(TargetError, match=says):
        ln.attach(tiny_llama(tied=True), LoraConfig(**R | settings))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(Model has `tie_word_embeddings|Setting `save_embedding_layers`|Could not find a config file)")
        peft.get_peft_model(tiny_llama(tied=True), peft.LoraConfig(**R | settings, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(TargetError, match=says):
        ln.load_adapter(tiny_llama(tied=True), tmp_path)
    assert what(tiny_llama(tied=False), **settings)["lm_head" if name == "lm_head" else "model.embed_tokens"] == "LoRA"
    assert set(what(tiny_llama(tied=True), **settings | {"target_modules": ["q_proj"]}).values()) == {"LoRA"}


# ---- what a file may say in vain ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]}, {"target_modules": ("q_proj",)}),
        ({"target_modules": ["q_proj"], "exclude_modules": ["k_prj"]}, {"exclude_modules": None}),
        ({"target_modules": ["q_proj"], "exclude_modules": ["k_prj", "v_proj"]}, {"exclude_modules": ("v_proj",)}),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*\.wte"}, {"exclude_modules": None}),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"}, {}),
        ({"target_modules": ["q_proj"], "modules_to_save": ["classifier", "score", "lm_head"]}, {"modules_to_save": ("lm_head",)}),
        ({"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]}, {}),
        ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, {"modules_to_save": NORMS}),
        ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}, {"target_modules": ("q_proj",)}),
        ({"target_modules": ["q_proj", "v_prj"]}, {}),  # a name that means nothing stays, and is refused
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_haed"]}, {}),
    ],
    ids=str,
)
def test_what_means_nothing_is_dropped_from_a_files_config(settings: dict, changed: dict) -> None:
    config = LoraConfig(**R | settings)
    assert without_idle(tiny_llama(), config) == dataclasses.replace(config, **changed)


@pytest.mark.parametrize("targets", [["query"], ["query", "classifier"], "all-linear"], ids=str)
def test_a_classifiers_adapter_that_peft_wrote_is_read(targets: object, tmp_path: Path) -> None:
    """PEFT takes a head that is named as a target for one to save, and writes both, and two names for the head."""
    config = peft.LoraConfig(**R, target_modules=targets, task_type="SEQ_CLS")
    theirs = peft.get_peft_model(tiny_bert_classifier(), config)
    theirs.save_pretrained(tmp_path)
    report = ln.load_adapter(tiny_bert_classifier(), tmp_path)
    assert report.matched["classifier"].method == "whole"
    assert report.trainable == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


def test_ranks_above_a_layers_size_and_idle_patterns_are_read_though_nobody_may_ask_for_them(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=17, lora_alpha=5, target_modules=["k_proj"], rank_pattern={"v_proj": 3}, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    report = ln.load_adapter(tiny_llama(), tmp_path)
    assert {m.rank for m in report.matched.values()} == {17}


def test_a_file_with_a_misspelt_module_to_save_is_refused(tmp_path: Path) -> None:
    """PEFT wrote it without a word, and without the head that was meant."""
    config = peft.LoraConfig(**R, target_modules=["q_proj"], modules_to_save=["lm_haed"], task_type="CAUSAL_LM")
    peft.get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    with pytest.raises((TargetError, AdapterFileError), match="lm_haed"):
        ln.load_adapter(tiny_llama(), tmp_path)
