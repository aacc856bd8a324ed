"""Loading bases: what is read, what is refused and in which words, and the fingerprint by which an adapter knows its base."""

import builtins
import copy
import json
import pickle
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lora_nb as ln
from lora_nb.bases import EMBEDDED, base_name, base_parameters, fingerprint
from lora_nb.errors import BaseModelError

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def tiny() -> tuple:
    return ln.load("tiny")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers wrote: a random model, and the embedded base's tokenizer."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=6144)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED["tiny"]).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "base"))


def set_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(*args: object, **kwargs: object) -> str:
    with pytest.raises(BaseModelError) as caught:
        ln.load(*args, **kwargs)
    return str(caught.value)


class TestLoad:
    def test_embedded_base(self, tiny: tuple) -> None:
        model, tokenizer = tiny
        assert type(model) is LlamaForCausalLM
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not model.training
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert base_name(model) == "tiny"
        assert tokenizer.pad_token_id is not None
        text = "Could you please tell me"
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert tokenizer.decode(ids[0], skip_special_tokens=True) == text
        loss = model(input_ids=ids, labels=ids).loss
        assert loss < torch.log(torch.tensor(float(model.config.vocab_size))) / 1.5  # it has learnt something: these are its weights

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_dtype_and_device_asked_for(self, saved: Path, dtype: torch.dtype) -> None:
        model, _ = ln.load(saved, dtype=dtype, device=torch.device("cpu"))
        assert {(p.dtype, p.device.type) for p in model.parameters()} == {(dtype, "cpu")}
        assert ln.load(saved, device="meta")[0].device.type == "meta"

    @pytest.mark.parametrize("kind", [str, Path])
    def test_folder_that_transformers_saved(self, saved: Path, kind: type) -> None:
        model, tokenizer = ln.load(kind(saved))
        written = load_file(saved / "model.safetensors")
        assert model.state_dict().keys() == written.keys()
        assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in written.items())
        assert base_name(model) == str(saved)
        assert len(tokenizer) == 6144

    def test_shards_are_read_and_a_missing_one_is_noticed(self, saved: Path, tmp_path: Path) -> None:
        whole, tokenizer = ln.load(saved)
        whole.save_pretrained(tmp_path, max_shard_size="200kB")
        tokenizer.save_pretrained(tmp_path)
        shards = sorted(tmp_path.glob("model-*.safetensors"))
        assert len(shards) > 1
        assert fingerprint(ln.load(tmp_path)[0]) == fingerprint(whole)
        shards[-1].unlink()
        assert "save model and tokenizer again" in refusal(tmp_path)

    def test_padding_falls_back_to_the_end_token(self, folder: Path) -> None:
        file = folder / "tokenizer_config.json"
        said = json.loads(file.read_text())
        del said["pad_token"]
        file.write_text(json.dumps(said))
        tokenizer = ln.load(folder)[1]
        assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None


class TestNames:
    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("/no/such/folder", ["There is no folder '/no/such/folder'", "'owner/model'", "'tiny'"]),
            ("./nowhere", ["There is no folder", "Hub id"]),
            ("~/nowhere", ["There is no folder"]),
            (" ", ["There is no folder"]),
            ("", ["has no config.json"]),
            ("x" * 5000, ["File name too long", "'tiny'"]),
            ("a\0b", ["Check the spelling"]),
            ("two words", ["Check the spelling"]),
            (EMBEDDED["tiny"] / "config.json", ["is a file", "config.json and *.safetensors"]),
        ],
        ids=repr,
    )
    def test_no_base_can_have_that_name(self, name: str | Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        message = refusal(name)
        assert all(word in message for word in words), message
        assert len(message) < 800

    @pytest.mark.parametrize(("name", "hint"), [("tinny", "Did you mean 'tiny'?"), ("owner/no-such-model", "load('tiny')")])
    def test_offline(self, name: str, hint: str) -> None:
        """The tests run with HF_HUB_OFFLINE=1."""
        message = refusal(name)
        assert "the Hub cannot be reached" in message
        assert hint in message

    def test_no_connection(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Online by the settings, but nobody answers: port 9 of this machine refuses."""
        constants, nowhere = huggingface_hub.constants, "http://127.0.0.1:9"
        for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.delenv(variable, raising=False)
            monkeypatch.delenv(variable.lower(), raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", nowhere)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(time, "sleep", Mock())  # huggingface_hub waits half a minute between its attempts
        huggingface_hub.close_session()
        message = refusal("owner/no-such-model")
        huggingface_hub.close_session()
        assert "the Hub cannot be reached" in message
        assert "load('tiny')" in message

    def test_errors_of_the_network_library_come_in_our_words(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class ProxyError(Exception):
            """As httpx has it: under none of Python's own network errors."""

        monkeypatch.setattr(AutoConfig, "from_pretrained", Mock(side_effect=ProxyError("403 Forbidden")))
        assert "the Hub cannot be reached (ProxyError: 403 Forbidden)" in refusal("owner/model")

    def test_hub_without_such_a_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answer = OSError("owner/model is not a model identifier listed on 'https://huggingface.co/models'\nIf this is a private …")
        monkeypatch.setattr(AutoConfig, "from_pretrained", Mock(side_effect=answer))
        message = refusal("owner/model")
        assert "is not a model identifier" in message
        assert "`hf auth login`" in message

    @pytest.mark.parametrize("device", ["nonsense", "mps" if torch.cuda.is_available() else "cuda"])
    def test_device_that_is_not_there(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # said before anything is loaded
        assert "Leave it out to get the device that is there" in refusal("tiny", device=device)


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def drop_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def config_text(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(text)


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: set_config(folder, **changes)


def cut(length: int) -> Callable[[Path], None]:
    def at(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:length])

    return at


def oversized_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 62) + file.read_bytes()[8:])


def change_tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def of(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return of


AGAIN = "save model and tokenizer again"
DAMAGE = {
    "no config": (drop_config, "has no config.json"),
    "no weights": (drop_weights, "no weights. lora_nb reads safetensors: save the model again"),
    "no tokenizer": (drop_tokenizer, AGAIN),
    "tokenizer of another form": (lambda folder: (folder / "tokenizer.json").write_text("[]"), AGAIN),
    "config not JSON": (config_text("{"), AGAIN),
    "config a list": (config_text("[]"), AGAIN),
    "config null": (config_text("null"), AGAIN),
    "config nested": (config_text("[" * 100_000), AGAIN),
    "config without model_type": (config_text("{}"), AGAIN),
    "architecture unknown": (config(model_type="nonesuch"), "does not recognize this architecture"),
    "size a word": (config(hidden_size="wide"), "'hidden_size' expected int"),
    "size zero": (config(num_attention_heads=0), AGAIN),
    "activation unknown": (config(hidden_act="nonesuch"), "KeyError: 'nonesuch'"),
    "more layers than weights": (config(num_hidden_layers=3), "lacks 9 weights that its architecture LlamaForCausalLM needs (such as 'mod"),
    "other width": (config(intermediate_size=32), "lacks 6 weights"),
    "weights empty": (cut(0), AGAIN),
    "weights cut in the header's length": (cut(7), AGAIN),
    "weights cut in the header": (cut(100), AGAIN),
    "weights cut in the data": (cut(200_000), AGAIN),
    "header oversized": (oversized_header, AGAIN),
    "tensor missing": (
        change_tensors(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        "(such as 'model.layers.1.mlp.up_proj.weight')",
    ),
    "tensor of another shape": (change_tensors(lambda t: t.update({"model.norm.weight": torch.ones(17)})), "(such as 'model.norm.weight')"),
}


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_refused_with_a_remedy(self, folder: Path, damage: str) -> None:
        harm, words = DAMAGE[damage]
        harm(folder)
        message = refusal(folder)
        assert words in message, message
        assert str(folder) in message

    def test_pickle_is_never_opened(self, folder: Path, tmp_path: Path) -> None:
        class Bomb:
            def __reduce__(self) -> tuple:
                return Path.touch, (tmp_path / "exploded",)

        drop_weights(folder)
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
        message = refusal(folder)
        assert "only 'pytorch_model.bin', a pickle, which can run code" in message
        assert "save_pretrained" in message
        # Some other safetensors file lets the folder pass at first glance; the pickle stays shut all the same.
        (folder / "other.safetensors").write_bytes(b"")
        assert AGAIN in refusal(folder)
        assert not (tmp_path / "exploded").exists()

    def test_code_beside_the_weights_is_not_run_nor_asked_about(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        set_config(folder, model_type="nonesuch", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
        (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: ...\nclass M: ...\n")
        asked = Mock(return_value="y")
        monkeypatch.setattr(builtins, "input", asked)
        assert "brings its own code, which lora_nb does not run" in refusal(folder)
        assert not asked.called
        assert not (tmp_path / "ran").exists()

    def test_an_adapter_is_no_base(self, folder: Path, tmp_path: Path) -> None:
        """transformers would put it on the base in silence, if PEFT is installed."""
        model, _ = ln.load(folder)
        ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6))
        ln.save(model, tmp_path / "adapter")
        assert "load_adapter(model, " in refusal(tmp_path / "adapter")
        ln.save(model, folder)
        assert "to a folder of their own" in refusal(folder)


class Rows(nn.Module):
    """Small enough to know each value."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))


class TestFingerprint:
    def test_stays_what_it_is_in_saved_files(self) -> None:
        """A change of this value makes every adapter saved before a stranger to its base."""
        assert fingerprint(Rows()) == "f5844b23f9831f1e7b15e7c0c288d6bc"

    def test_same_for_one_base_however_it_is_loaded(self, tiny: tuple) -> None:
        assert fingerprint(ln.load("tiny", dtype=torch.bfloat16)[0]) == fingerprint(tiny[0]) == fingerprint(ln.load(EMBEDDED["tiny"])[0])

    def test_bfloat16_of_weights_that_were_trained_in_32_bits(self, saved: Path) -> None:
        assert fingerprint(ln.load(saved, dtype=torch.bfloat16)[0]) == fingerprint(ln.load(saved)[0])

    def test_adapters_and_their_training_do_not_show(self, saved: Path) -> None:
        model, _ = ln.load(saved)
        before = fingerprint(model)
        names = set(base_parameters(model))
        ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "embed_tokens", "lm_head"]))
        for p in ln.parameters(model).values():
            p.detach().normal_()
        assert fingerprint(model) == before
        assert set(base_parameters(model)) == names
        ln.detach(model)
        assert fingerprint(model) == before

    def test_another_base_of_the_same_shape(self, saved: Path) -> None:
        model, _ = ln.load(saved)
        torch.manual_seed(2)
        assert fingerprint(LlamaForCausalLM(model.config)) != fingerprint(model)

    @pytest.mark.parametrize("parameter", ["model.norm.weight", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"])
    def test_each_parameter_counts(self, saved: Path, parameter: str) -> None:
        model, _ = ln.load(saved)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_parameter(parameter).mul_(1.02)  # beyond the rounding to 8 bits
        assert fingerprint(other) != fingerprint(model)

    def test_names_shapes_and_the_class_count(self) -> None:
        model, reshaped, renamed = Rows(), Rows(), Rows()
        reshaped.weight = nn.Parameter(model.weight.detach().reshape(3, 2))
        renamed.other = renamed.weight
        del renamed.weight
        subclass = type("Others", (Rows,), {})()
        assert len({fingerprint(m) for m in (model, reshaped, renamed, subclass)}) == 4
