"""Hugging Face PEFT reads what lora_nb writes, and lora_nb what PEFT writes; and both then compute the same."""

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lora_nb as ln
from lora_nb.attach import adapters
from lora_nb.errors import AdapterError, AdapterFileError
from tests.interop.conftest import Case, gap, lora_parameters, train, trained

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What PEFT says of its own doings; everything else is an error in these tests.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter"),
]
OF_SAVING = ("Setting `save_embedding_layers` to `True`", "Could not find a config file in tiny")


def written_by_us(case: Case, folder: Path) -> nn.Module:
    model = case.base()
    ln.attach(model, case.lora_nb())
    train(iter(ln.parameters(model).values()))
    ln.save(model, folder)
    assert gap(model, case.original) > 1e-2
    return model


def written_by_peft(case: Case, folder: Path, **more: object) -> nn.Module:
    model = peft.get_peft_model(case.base(), case.peft(**more))
    train(lora_parameters(model))
    with warnings.catch_warnings():
        for words in OF_SAVING:
            warnings.filterwarnings("ignore", words)
        model.save_pretrained(folder)
    assert gap(model, case.original) > 1e-2
    return model


def test_peft_reads_ours(case: Case, tmp_path: Path) -> None:
    ours = written_by_us(case, tmp_path)
    theirs = peft.PeftModel.from_pretrained(case.base(), tmp_path)
    assert gap(theirs, ours) <= 1e-5
    result = theirs.load_adapter(tmp_path, "again")  # PEFT says nothing of keys that it has no place for, but returns them
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert theirs.peft_config["default"].lora_dropout == case.settings.get("lora_dropout", 0)
    assert sum(p.numel() for name, p in theirs.named_parameters() if ".default" in name) == adapters(ours).reports["default"].trainable


def test_we_read_pefts(case: Case, tmp_path: Path) -> None:
    theirs, ours = written_by_peft(case, tmp_path), case.base()
    report = ln.load_adapter(ours, tmp_path)
    assert gap(theirs, ours) <= 1e-5
    assert report.config.lora_dropout == case.settings.get("lora_dropout", 0)
    assert ln.inspect(tmp_path).modules.keys() == report.matched.keys()
    # And what we write of it is the same adapter to PEFT.
    ln.save(ours, tmp_path / "ours")
    assert gap(theirs, peft.PeftModel.from_pretrained(case.base(), tmp_path / "ours")) <= 1e-5


def test_peft_writes_the_whole_embedding_and_we_notice_another(llama: Case, tmp_path: Path) -> None:
    """The file carries the base's own embedding beside the adapter; it must be that of the model at hand."""
    case = Case("embedding", llama.settings | {"target_modules": ["embed_tokens"]}, llama.original)
    written_by_peft(case, tmp_path)
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(tmp_path / WEIGHTS)
    other = case.base()
    with torch.no_grad():
        other.model.embed_tokens.weight[3] += 1
    with pytest.raises(AdapterFileError, match=r"does not place on this model, such as '.*embed_tokens\.base_layer\.weight'"):
        ln.load_adapter(other, tmp_path)


@pytest.mark.parametrize("embeddings", [True, False])
def test_embeddings_saved_on_request(llama: Case, tmp_path: Path, embeddings: bool) -> None:
    theirs, ours = peft.get_peft_model(llama.base(), llama.peft()), llama.base()
    train(lora_parameters(theirs))
    theirs.save_pretrained(tmp_path, save_embedding_layers=embeddings)
    assert ("base_model.model.lm_head.weight" in load_file(tmp_path / WEIGHTS)) == embeddings
    ln.load_adapter(ours, tmp_path)
    assert gap(theirs, ours) <= 1e-5


def test_first_pattern_wins_for_peft_as_for_us(llama: Case, tmp_path: Path) -> None:
    """Unsorted keys: PEFT sorts them when it saves, and then another one is the first."""
    unsorted = {"rank_pattern": {"v_proj": 2, r"layers\.\d\..*": 5}, "alpha_pattern": {"v_proj": 1, r"layers\.\d\..*": 3}}
    case = Case("unsorted", llama.settings | unsorted, llama.original)
    ours = written_by_us(case, tmp_path)
    assert gap(peft.PeftModel.from_pretrained(case.base(), tmp_path), ours) <= 1e-5
    assert adapters(ours).reports["default"].matched["model.layers.0.self_attn.v_proj"].scale == 0.5


def test_all_linear_with_an_excluding_pattern(llama: Case, tmp_path: Path) -> None:
    case = Case("excluded", llama.settings | {"target_modules": "all-linear", "exclude_modules": r".*\.k_proj"}, llama.original)
    theirs, ours = written_by_peft(case, tmp_path), case.base()
    ln.load_adapter(ours, tmp_path)
    assert gap(theirs, ours) <= 1e-5


def test_adapter_in_a_folder_of_its_name(llama: Case, tmp_path: Path) -> None:
    """PEFT puts an adapter that is not called `default` one folder deeper."""
    theirs = peft.get_peft_model(llama.base(), llama.peft(), adapter_name="tone")
    train(lora_parameters(theirs))
    theirs.save_pretrained(tmp_path)
    ours = llama.base()
    with pytest.raises(AdapterFileError, match=r"has no adapter_config\.json"):
        ln.load_adapter(ours, tmp_path)
    ln.load_adapter(ours, tmp_path / "tone", "tone")
    assert gap(theirs, ours) <= 1e-5


def test_two_adapters_side_by_side(llama: Case, tmp_path: Path) -> None:
    """Each from the other's files; switched, not added up."""
    ours, first, second = llama.base(), tmp_path / "first", tmp_path / "second"
    alone = {"first": written_by_peft(llama, first), "second": written_by_us(llama, second)}
    theirs = peft.PeftModel.from_pretrained(llama.base(), first, "first")
    theirs.load_adapter(second, "second")
    for name in alone:
        ln.load_adapter(ours, tmp_path / name, name)
    for name, model in alone.items():
        theirs.set_adapter(name)
        ln.set_active(ours, name)
        assert gap(theirs, ours) <= 1e-5
        assert gap(model, ours) <= 1e-5


def test_training_goes_on_where_peft_stopped(llama: Case, tmp_path: Path) -> None:
    """The same gradients for the same weights: what is read is not only applied but trains."""
    theirs, ours = written_by_peft(llama, tmp_path), llama.base()
    ln.load_adapter(ours, tmp_path)
    ids = torch.arange(3, 21).reshape(2, 9)
    for model in (theirs, ours):
        model.train()(input_ids=ids, labels=ids).loss.backward()
    found = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    own = {name.replace(".adapters.default", ""): p.grad for name, p in ln.parameters(ours).items()}
    assert own.keys() == found.keys()
    assert all(grad.abs().max() > 0 for grad in own.values())
    assert all(torch.allclose(grad, found[name], atol=1e-6) for name, grad in own.items())


def test_16_bits(llama: Case, tmp_path: Path) -> None:
    """An adapter that PEFT was told to keep in the base's bfloat16."""
    theirs = peft.get_peft_model(llama.base().to(torch.bfloat16), llama.peft(), autocast_adapter_dtype=False)
    train(lora_parameters(theirs))
    theirs.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    ours = llama.base()
    ln.load_adapter(ours, tmp_path)
    assert gap(theirs.float(), ours.to(torch.bfloat16).float()) <= 1e-5


# Beside those of `conftest.py`: a base, and settings in the names that both share.
OPTIONS: dict[str, tuple[str, dict]] = {
    "dora": ("llama", {"use_dora": True, "target_modules": "all-linear"}),
    "dora-patterns": ("llama", {"use_dora": True, "use_rslora": True, "lora_dropout": 0.1, "rank_pattern": {"q_proj": 2}}),
    "gpt2-dora": ("gpt2", {"use_dora": True, "target_modules": ["c_attn", "wte"]}),
    "dora-falcon": ("falcon", {"use_dora": True, "target_modules": ["query_key_value", "word_embeddings"], "bias": "lora_only"}),
    "dora-embedding": ("tied", {"use_dora": True, "target_modules": ["embed_tokens", "k_proj"]}),
    "lora_bias": ("llama", {"lora_bias": True, "target_modules": ["q_proj", "down_proj"]}),
    "gpt2-lora_bias": ("gpt2", {"lora_bias": True, "target_modules": "all-linear", "use_rslora": True}),
    "gpt2-bias-all": ("gpt2", {"bias": "all", "target_modules": ["c_attn"]}),
    "gpt2-bias-lora_only": ("gpt2", {"bias": "lora_only", "target_modules": ["c_attn", "mlp.c_proj"]}),
    "modules_to_save": ("llama", {"modules_to_save": ["lm_head", "norm"]}),
    "modules_to_save-block": ("llama", {"modules_to_save": ["layers.1.mlp"], "target_modules": "all-linear"}),
    "tied-together": ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tokens": ("llama", {"trainable_token_indices": [3, 11, 40]}),
    "tokens-tied": ("tied", {"trainable_token_indices": [3, 11, 40]}),
    "gpt2-tokens": ("gpt2", {"trainable_token_indices": {"wte": [5, 9]}, "target_modules": ["c_attn"]}),
    "gpt2-several": (
        "gpt2",
        {"use_dora": True, "bias": "all", "modules_to_save": ["ln_f"], "trainable_token_indices": {"wte": [7]}, "target_modules": ["c_fc"]},
    ),
    "parameters": ("llama", {"target_parameters": ["q_proj.weight", "mlp.up_proj.weight"], "target_modules": ["v_proj"]}),
    "parameters-alone": ("llama", {"target_parameters": ["down_proj.weight"], "target_modules": None, "rank_pattern": {".*1.*": 2}}),
}
# PEFT's own words: of tied weights, of biases that it cannot merge or takes for damaged, of what it saves beside.
SAID = (
    "Model has `tie_word_embeddings=True`",
    "`lora_bias=True` was passed",
    "Adapter 'default': .* LoRA tensor.s. have invalid shape: .*lora_B.bias",
    "The following rank_pattern keys did not match any targeted module",  # though it heeds them, for a parameter
    *OF_SAVING,
)
# Where a weight is tied, PEFT merges what belongs to one of the two layers into both; a bias that has no place is merged by neither.
PEFT_MERGES_INTO_BOTH = ("gpt2-dora", "dora-falcon", "dora-embedding")
NOBODY_MERGES = ("lora_bias",)


@pytest.fixture(params=OPTIONS)
def option(request: pytest.FixtureRequest, originals: dict[str, nn.Module]) -> Case:
    base, settings = OPTIONS[request.param]
    settings = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj"]} | settings
    return Case(request.param, settings, originals[base])


@pytest.fixture
def quiet_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        for words in SAID:
            warnings.filterwarnings("ignore", words)
        yield


@pytest.mark.usefixtures("quiet_peft")
def test_peft_reads_every_option_of_ours(option: Case, tmp_path: Path) -> None:
    ours = option.base()
    report = ln.attach(ours, option.lora_nb())
    assert gap(ours, option.original) <= 1e-5
    ln.save(trained(ours), tmp_path)
    assert gap(ours, option.original) > 1e-2
    theirs = peft.PeftModel.from_pretrained(option.base(), tmp_path, is_trainable=True)
    assert gap(theirs, ours) <= 1e-5
    assert sum(p.numel() for p in {id(p): p for p in theirs.parameters() if p.requires_grad}.values()) == report.trainable
    expected = copy.deepcopy(ours)
    if option.name in NOBODY_MERGES:
        with pytest.raises(AdapterError, match="no bias that could take the adapter's"):
            ln.merge(ours)
        with pytest.raises(RuntimeError, match="the base layer has no bias"):
            theirs.merge_and_unload()
        return
    ln.merge(ours)
    assert gap(ours, expected) <= 1e-4
    if option.name not in PEFT_MERGES_INTO_BOTH:
        assert gap(theirs.merge_and_unload(), expected) <= 1e-4


@pytest.mark.usefixtures("quiet_peft")
def test_we_read_every_option_of_pefts(option: Case, tmp_path: Path) -> None:
    theirs, ours = trained(peft.get_peft_model(option.base(), option.peft())), option.base()
    theirs.save_pretrained(tmp_path)
    report = ln.load_adapter(ours, tmp_path)
    assert gap(theirs, option.original) > 1e-2
    assert gap(theirs, ours) <= 1e-5
    assert report.trainable == sum(p.numel() for p in {id(p): p for p in theirs.parameters() if p.requires_grad}.values())
    ln.save(ours, tmp_path / "ours")
    assert gap(theirs, peft.PeftModel.from_pretrained(option.base(), tmp_path / "ours")) <= 1e-5
    assert not ln.inspect(tmp_path / "ours").warnings


# What only one of the two has: a start that PEFT cannot combine with a bias is no obstacle, as it is over when a file is written.
@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "olora"])
def test_peft_reads_a_bias_beside_every_start(llama: Case, tmp_path: Path, init: str) -> None:
    ours = llama.base()
    ln.attach(ours, ln.LoraConfig(**llama.settings, lora_bias=True, init_lora_weights=init))
    ln.save(trained(ours), tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`lora_bias=True` was passed")
        assert gap(peft.PeftModel.from_pretrained(llama.base(), tmp_path), ours) <= 1e-5


def test_a_bias_beside_dora_is_refused_by_peft(llama: Case, tmp_path: Path) -> None:
    """The one thing that lora_nb computes and PEFT does not read; it says so itself."""
    ours = llama.base()
    ln.attach(ours, ln.LoraConfig(**llama.settings, lora_bias=True, use_dora=True))
    ln.save(trained(ours), tmp_path)
    with pytest.raises(ValueError, match="lora_bias=True is not supported for DoRA"):
        peft.PeftModel.from_pretrained(llama.base(), tmp_path)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'.*path_initial_model_for_weight_conversion"),
        ({"layer_replication": [(0, 2), (1, 3)]}, "layer_replication"),
    ],
    ids=str,
)
def test_options_that_we_lack_are_refused(llama: Case, tmp_path: Path, options: dict, word: str) -> None:
    """Read without them, the adapter would compute something else."""
    peft.get_peft_model(llama.base(), llama.peft(**options)).save_pretrained(tmp_path)
    model = llama.base()
    with pytest.raises(AdapterFileError, match=word):
        ln.load_adapter(model, tmp_path, strict=False)
    assert gap(model, llama.original) == 0
    assert not hasattr(model, "lora_nb_adapters")
    with pytest.raises(AdapterFileError, match=word):
        ln.inspect(tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_the_refusal_advises_makes_it_readable(llama: Case, tmp_path: Path, init: str) -> None:
    """PEFT converts it to plain LoRA, from the start that was saved beforehand."""
    theirs = peft.get_peft_model(llama.base(), llama.peft(init_lora_weights=init))
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = init
    trained(theirs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* changes the base weights of the model")
        theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = llama.base()
    ln.load_adapter(ours, tmp_path / "plain")
    assert gap(theirs, ours) <= 1e-5
    assert gap(ours, llama.original) > 1e-2


@pytest.mark.parametrize("init", ["orthogonal", "gaussian", False])
def test_other_beginnings_are_no_obstacle(llama: Case, tmp_path: Path, init: str | bool) -> None:
    """They leave the base alone."""
    theirs, ours = written_by_peft(llama, tmp_path, init_lora_weights=init), llama.base()
    ln.load_adapter(ours, tmp_path)
    assert gap(theirs, ours) <= 1e-5


def test_other_methods_are_refused(llama: Case, tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    peft.get_peft_model(llama.base(), peft.LoHaConfig(r=4, alpha=10, **settings)).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="peft_type 'LOHA'; lora_nb reads 'LORA'"):
        ln.load_adapter(llama.base(), tmp_path)


def test_config_has_nothing_that_peft_does_not_know(llama: Case, tmp_path: Path) -> None:
    written_by_us(llama, tmp_path)
    said = json.loads((tmp_path / CONFIG).read_text())
    theirs = peft.PeftConfig.from_pretrained(tmp_path).to_dict()
    assert said.items() <= {key: sorted(value) if isinstance(value, set) else value for key, value in theirs.items()}.items()
