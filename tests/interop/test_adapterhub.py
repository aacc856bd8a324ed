"""AdapterHub's files: read to the same outputs, and written to the same bytes.

The fixtures are made by `adapters` 1.3 in an environment of its own: see `tools/make_adapterhub_fixtures.py`, which also lets
that library read what lora_nb writes.
"""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_nb as ln
from lora_nb.attach import adapters
from lora_nb.errors import AdapterFileError, TargetError
from tests.models import tiny_gpt2, tiny_llama

FIXTURES = Path(__file__).parent / "adapterhub"
MODELS = sorted(path.name for path in FIXTURES.iterdir())
CASES = [(path.parent.name, path.name) for path in sorted(FIXTURES.glob("*/*")) if path.is_dir()]
STACKS = ("pfeiffer+houlsby", "houlsby+pfeiffer")
CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"


def model_of(kind: str, name: str | None = None) -> nn.Module:
    """The fixture's model; by another class if its name is given."""
    settings = json.loads((FIXTURES / kind / "config.json").read_text())
    own, config = settings.pop("class"), settings.pop("config")
    model = getattr(transformers, own)(getattr(transformers, config)(**settings)).eval()
    model.load_state_dict(load_file(FIXTURES / kind / "model.safetensors"))
    if name is None:
        return model
    other = getattr(transformers, name)(model.config).eval()
    other.load_state_dict(getattr(model, model.base_model_prefix).state_dict(), strict=False)
    return other


def results(kind: str) -> dict[str, Tensor]:
    return load_file(FIXTURES / kind / "results.safetensors")


@torch.no_grad()
def gap(model: nn.Module, kind: str, what: str) -> float:
    """The largest difference of the logits from AdapterHub's."""
    theirs = results(kind)
    inputs = {name: t for name, t in theirs.items() if name.endswith("input_ids")}
    return float((model(**inputs).logits - theirs[what]).abs().max())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of one of their folders."""
    return Path(shutil.copytree(FIXTURES / "bert" / "pfeiffer", tmp_path / "theirs"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / CONFIG).read_text())
    change(content)
    (folder / CONFIG).write_text(json.dumps(content))


def test_the_fixtures_are_what_the_issue_asks_for() -> None:
    assert {kind.split("-")[0] for kind in MODELS} == {"llama", "mistral", "falcon", "gpt2", "bert", "roberta", "t5"}
    assert all({(kind, preset) for preset in ("pfeiffer", "houlsby", "parallel")} <= set(CASES) for kind in MODELS)


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_we_read_theirs_and_write_the_same(kind: str, case: str, tmp_path: Path) -> None:
    model, theirs = model_of(kind), FIXTURES / kind / case
    assert gap(model, kind, "base") <= 1e-5
    report = ln.load_adapter(model, theirs, case)
    assert gap(model, kind, case) <= 1e-5
    assert (results(kind)[case] - results(kind)["base"]).abs().max() > 0.1
    assert report.trainable == sum(t.numel() for key, t in load_file(theirs / WEIGHTS).items() if "adapter_norm_before" not in key)
    ln.save(model, tmp_path, case)
    ours, original = load_file(tmp_path / WEIGHTS), load_file(theirs / WEIGHTS)
    assert ours.keys() == original.keys()
    assert all(torch.equal(ours[key], original[key]) and ours[key].dtype == original[key].dtype for key in ours)
    said, meant = ((path / CONFIG).read_text() for path in (tmp_path, theirs))
    assert said.replace(f'"lora_nb.{ln.__version__}"', '"adapters.1.3.0"') == meant
    again = model_of(kind)
    ln.load_adapter(again, tmp_path)
    assert gap(again, kind, case) <= 1e-5


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("stack", STACKS)
def test_stacks_are_theirs(kind: str, stack: str) -> None:
    model = model_of(kind)
    for name in stack.split("+"):
        ln.load_adapter(model, FIXTURES / kind / name, name)
    ln.set_active(model, stack.split("+"))
    assert gap(model, kind, stack) <= 1e-5
    ln.set_active(model, stack.split("+")[::-1])
    assert gap(model, kind, stack) > 1e-2


@pytest.mark.parametrize(("kind", "case"), [("bert", "pfeiffer"), ("llama", "houlsby"), ("gpt2", "parallel")])
def test_another_head_before_the_same_base_makes_no_difference(kind: str, case: str, tmp_path: Path) -> None:
    """Their keys start at the model that was saved: `bert.encoder…` with a head, `encoder…` without."""
    headless = {"bert": "BertModel", "llama": "LlamaModel", "gpt2": "GPT2Model"}[kind]
    body, whole = model_of(kind, headless), model_of(kind)
    ln.load_adapter(body, FIXTURES / kind / case)
    ln.load_adapter(whole, FIXTURES / kind / case)
    ids = results(kind)["input_ids"]
    inside = getattr(whole, whole.base_model_prefix)
    with torch.no_grad():
        assert torch.equal(body(ids).last_hidden_state, inside(ids).last_hidden_state)
    ln.save(body, tmp_path)
    again = model_of(kind)
    with pytest.raises(AdapterFileError, match="another base"):  # the same below the head, but the fingerprint is of all of it
        ln.load_adapter(again, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ln.load_adapter(again, tmp_path, strict=False)
    assert gap(again, kind, case) <= 1e-5


def test_what_we_add_lies_in_the_header(tmp_path: Path) -> None:
    model = model_of("bert")
    ln.attach(model, ln.BottleneckConfig.houlsby(4), "tone")
    ln.save(model, tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as f:
        assert f.metadata()["base_fingerprint"] == ln.fingerprint(model)
        assert "bert.encoder.layer.0.attention.output.adapters.tone.adapter_up.bias" in f.keys()  # noqa: SIM118 - not a dict
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", WEIGHTS, CONFIG]
    assert "library_name: adapters" in (tmp_path / "README.md").read_text()


def test_inspect(tmp_path: Path) -> None:
    summary = ln.inspect(FIXTURES / "t5" / "cross")
    assert summary.modules["decoder.block.1.layer.1"] == (4, 16, 16)
    assert len(summary.modules) == 5  # layers 1 and 2 of four are left out
    assert summary.config.cross_adapter
    assert summary.warnings == []
    assert "bottleneck adapter on the sublayers' outputs" in repr(summary)
    assert summary.fingerprint is None
    model = model_of("bert")
    ln.attach(model, ln.BottleneckConfig.parallel(4))
    ln.save(model, tmp_path)
    assert ln.inspect(tmp_path).fingerprint == ln.fingerprint(model)


# ---- blocks of models that are not known ---------------------------------------------------------------------------


def test_blocks_that_a_user_named_come_back_with_the_file(tmp_path: Path) -> None:
    block = ln.Block(layers="model.layers", mlp=ln.Sublayer(output="mlp.down_proj", reads="post_attention_layernorm"))
    model = tiny_llama()
    ln.attach(model, ln.BottleneckConfig.pfeiffer(4, init_weights="bert", blocks=block))
    ln.save(model, tmp_path)
    again = tiny_llama()
    report = ln.load_adapter(again, tmp_path)
    assert report.config == adapters(model).reports["default"].config
    assert all(torch.equal(a, b) for a, b in zip(ln.parameters(model).values(), ln.parameters(again).values(), strict=True))


def test_their_interface_says_where_the_adapters_go() -> None:
    """AdapterHub knows no Falcon; its users name the modules, and the file has the names."""
    model = model_of("falcon")
    report = ln.load_adapter(model, FIXTURES / "falcon" / "houlsby")
    assert "transformer.h.1.mlp.dense_4h_to_h" in report.matched
    assert gap(model, "falcon", "houlsby") <= 1e-5


@pytest.mark.parametrize("case", ["pfeiffer", "houlsby", "parallel"])
@pytest.mark.parametrize("kind", ["falcon", "falcon-sequential"])
def test_without_it_our_own_places_are_the_same(kind: str, case: str, tmp_path: Path) -> None:
    own = Path(shutil.copytree(FIXTURES / kind / case, tmp_path / "own"))
    (own / "adapter_interface.json").unlink()
    model = model_of(kind)
    assert "transformer.h.1.mlp" in ln.load_adapter(model, own).matched
    assert gap(model, kind, case) <= 1e-5


INTERFACES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "norm": (lambda names: names.update(layer_ln_2="ln_mlp"), "layer_ln_2='ln_mlp': norms after a sublayer"),
    "no layers": (lambda names: names.update(model_layers=None), "does not name the model's layers"),
    "path": (lambda names: names.update(layer_output_proj="../mlp"), "a module's path"),
}


@pytest.mark.parametrize(("change", "words"), INTERFACES.values(), ids=INTERFACES)
def test_an_interface_that_we_cannot_follow_is_refused(change: Callable, words: str, tmp_path: Path) -> None:
    theirs = Path(shutil.copytree(FIXTURES / "falcon" / "houlsby", tmp_path / "theirs"))
    content = json.loads((theirs / "adapter_interface.json").read_text())
    change(content["interface"])
    (theirs / "adapter_interface.json").write_text(json.dumps(content))
    with pytest.raises(AdapterFileError, match=words):
        ln.load_adapter(model_of("falcon"), theirs)


def test_an_interface_of_another_model_names_what_is_missing(tmp_path: Path) -> None:
    theirs = Path(shutil.copytree(FIXTURES / "falcon" / "houlsby", tmp_path / "theirs"))
    with pytest.raises(TargetError, match=r"'transformer\.h\.0\.self_attention\.dense', but 'transformer\.h\.0' has ln_1"):
        ln.load_adapter(tiny_gpt2(), theirs)


# ---- refused -------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "gate": (lambda c: c["config"].update(use_gating=True), "use_gating=True, which lora_nb does not support"),
    "compacter": (lambda c: c["config"].update(phm_layer=True), "phm_layer=True"),
    "invertible": (lambda c: c["config"].update(inv_adapter="nice"), "inv_adapter='nice'"),
    "depth": (lambda c: c["config"].update(stochastic_depth=0.1), "stochastic_depth=0.1"),
    "residual": (lambda c: c["config"].update(adapter_residual_before_ln=True), "adapter_residual_before_ln=True"),
    "post_add": (lambda c: c["config"].update(residual_before_ln="post_add"), "residual_before_ln must be True or False"),
    "new": (lambda c: c["config"].update(warp=9), "the setting warp=9, which lora_nb does not know"),
    "lora": (lambda c: c["config"].update(architecture="lora"), "AdapterHub's method 'lora'"),
    "word": (lambda c: c.update(config="pfeiffer"), "config='pfeiffer' where AdapterHub keeps the adapter's settings"),
    "missing": (lambda c: c["config"].pop("non_linearity"), "no non_linearity among its settings"),
    "twice": (lambda c: c["config"].update(residual_before_ln=False), "leaves out the block's own residual"),
    "name": (lambda c: c.update(name="other"), r"none of the 8 tensors that its config asks for, such as '.*adapters\.other\."),
    "size": (lambda c: c["config"].update(reduction_factor=2), r"is \(4, 16\), but this model and the config ask for \(8, 16\)"),
    "fewer": (lambda c: c["config"].update(leave_out=[0]), "It has 4 tensors that its config does not place"),
    "more": (lambda c: c["config"].update(mh_adapter=True), "It lacks 8 of 16 tensors"),
    "model": (lambda c: c.update(model_type="gpt2"), "trained on a model of type 'gpt2', this one is 'bert'"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_files_that_mean_something_else_are_refused(change: Callable, words: str, folder: Path) -> None:
    edit(folder, change)
    model = model_of("bert")
    with pytest.raises(AdapterFileError, match=words):
        ln.load_adapter(model, folder)
    assert gap(model, "bert", "base") <= 1e-5
    assert not hasattr(model, "lora_nb_adapters")


def test_a_pickle_is_refused_with_the_remedy(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_adapter.bin")
    for act in (ln.inspect, lambda path: ln.load_adapter(model_of("bert"), path)):
        with pytest.raises(AdapterFileError, match=r"only pytorch_adapter\.bin, a pickle.*use_safetensors=True"):
            act(folder)


def test_loaded_leniently_what_is_missing_changes_nothing(folder: Path) -> None:
    """Whatever start the file's config names: theirs would be noise."""
    tensors = load_file(folder / WEIGHTS)
    half = {key: t for key, t in tensors.items() if ".layer.0." in key}
    save_file(half, folder / WEIGHTS)
    model = model_of("bert")
    with pytest.raises(AdapterFileError, match="lacks 4 of 8"):
        ln.load_adapter(model, folder)
    with pytest.warns(UserWarning, match="lacks 4 of 8"):
        ln.load_adapter(model, folder, strict=False)
    save_file(half | {key: torch.zeros_like(t) for key, t in tensors.items() if key not in half}, folder / WEIGHTS)
    whole = model_of("bert")
    ln.load_adapter(whole, folder)
    ids = results("bert")["input_ids"]
    assert torch.equal(model(ids).logits, whole(ids).logits)


def test_a_head_of_the_adapters_own_is_not_passed_over(folder: Path) -> None:
    """AdapterHub writes the model's head beside the adapter, too, unless it is told not to: that says nothing new."""
    model = model_of("bert")
    head = {key: t.clone() for key, t in model.state_dict().items() if key.startswith("cls.predictions.transform")}
    save_file(head, folder / "model_head.safetensors")
    ln.load_adapter(model, folder)
    assert gap(model, "bert", "pfeiffer") <= 1e-5
    save_file({key: t + 1 for key, t in head.items()}, folder / "model_head.safetensors")
    with pytest.raises(AdapterFileError, match=r"a trained head \(model_head\.safetensors\)"):
        ln.load_adapter(model_of("bert"), folder)


def test_what_a_file_leaves_out_has_adapterhubs_default_not_ours(folder: Path) -> None:
    """Their `BnConfig` without `original_ln_before` is Houlsby's kind."""
    keep = ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity")
    edit(folder, lambda c: c.update(config={key: c["config"][key] for key in keep}))
    config = ln.inspect(folder).config
    assert config.reading() == "output"
    assert config.init_weights == "bert"


@pytest.mark.parametrize(("written", "meant"), [("gelu", "gelu_new"), ("gelu_orig", "gelu"), ("ReLU", "relu")])
def test_files_from_before_there_was_a_version(written: str, meant: str, folder: Path) -> None:
    """Their names of the activations were others then."""
    edit(folder, lambda c: (c["config"].update(non_linearity=written), c.pop("version")))
    assert ln.inspect(folder).config.non_linearity == meant
