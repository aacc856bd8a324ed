"""Adapters on disk: whole or not at all when written; trusted in nothing when read; the model untouched when refused."""

import json
import os
import pickle
import random
import resource
import shutil
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor, nn

import lora_nb as ln
from lora_nb import checkpoint
from lora_nb.attach import adapters, weights
from lora_nb.errors import AdapterError, AdapterFileError, LoraNbError, TargetError

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
IDS = torch.arange(20).reshape(2, 10)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(12, 10), nn.Linear(12, 8, bias=False)


class Toy(nn.Module):
    """Three layers of two projections over an embedding; the output shows each of them."""

    def __init__(self, layers: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(20, 12)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.config = SimpleNamespace(_name_or_path=f"toy-{seed}")

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return torch.cat([x, *(projection(x) for layer in self.layers for projection in (layer.q_proj, layer.v_proj))], dim=-1)


def settings(**changes: object) -> ln.LoraConfig:
    return ln.LoraConfig(**({"r": 3, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "embed"]} | changes))


def trained(seed: int = 1, name: str = "default", **changes: object) -> Toy:
    """A model whose adapter has weights as if it had been trained."""
    model = Toy()
    ln.attach(model, settings(**changes), name)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in ln.parameters(model, name).values():
            p.normal_(std=0.3)
    return model


# Beside the plain ones; on q_proj (with a bias) and v_proj (without) unless said otherwise.
LINEAR = {"target_modules": ["q_proj", "v_proj"]}
OPTIONS = [
    LINEAR | {"use_dora": True},
    LINEAR | {"use_dora": True, "use_rslora": True, "lora_bias": True, "bias": "all", "lora_dropout": 0.1},
    {"use_dora": True},  # the embedding, too
    LINEAR | {"lora_bias": True},
    {"bias": "all"},
    {"bias": "lora_only", "target_modules": ["v_proj", "layers.0.q_proj"]},
    {"bias": "all", "target_modules": ["v_proj"]},  # biases of layers without any other adapter
    {"target_modules": ["q_proj"], "modules_to_save": ["v_proj", "embed"]},
    {"target_modules": ["v_proj"], "modules_to_save": ["q_proj"], "bias": "all"},
    LINEAR | {"trainable_token_indices": {"embed": [7, 2, 19]}},
    {"target_modules": None, "target_parameters": ["q_proj.weight"], "init_lora_weights": "gaussian"},
    {"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"], "modules_to_save": ["embed"], "task_type": None},
    LINEAR | {"init_lora_weights": "gaussian"},
    LINEAR | {"init_lora_weights": "orthogonal", "r": 4},
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as lora_nb writes it; not to be changed."""
    return ln.save(trained(), tmp_path_factory.mktemp("good") / "adapter")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def header(folder: Path) -> dict:
    with (folder / WEIGHTS).open("rb") as f:
        return json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors and keep the header's metadata, but for the hash that would give the change away."""
    tensors, metadata = load_file(folder / WEIGHTS), header(folder)["__metadata__"]
    metadata.pop("weights_sha256", None)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata)


def state(model: nn.Module) -> tuple:
    """All that a refused adapter must leave alone."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: (type(module), id(module), module.training) for name, module in model.named_modules()},
        {name: (p.requires_grad, id(p)) for name, p in model.named_parameters()},
        dict(adapters(model).reports),
        adapters(model).active,
        hasattr(model, "lora_nb_adapters"),
    )


def same(one: tuple, other: tuple) -> bool:
    tensors = one[0].keys() == other[0].keys() and all(torch.equal(t, other[0][name]) for name, t in one[0].items())
    return tensors and one[1:] == other[1:]


def refusal(model: nn.Module, folder: Path, *, kind: type[Exception] = AdapterFileError, **kwargs: object) -> str:
    """The message; and the model is, in all that can be seen, as it was."""
    before = state(model)
    with pytest.raises(LoraNbError) as caught:
        ln.load_adapter(model, folder, **kwargs)
    assert type(caught.value) is kind
    assert same(state(model), before)
    return str(caught.value)


def refusal_of_any_kind(model: nn.Module, folder: Path) -> str:
    with pytest.raises(LoraNbError) as caught:
        ln.load_adapter(model, folder)
    return str(caught.value)


class TestSave:
    def test_what_is_written(self, good: Path) -> None:
        assert sorted(files(good)) == [CARD, CONFIG, WEIGHTS]
        said = json.loads((good / CONFIG).read_text())
        assert said["peft_type"] == "LORA"
        assert (said["r"], said["lora_alpha"], said["base_model_name_or_path"]) == (3, 12, "toy-0")
        assert said["target_modules"] == ["embed", "q_proj", "v_proj"]
        prefix = "base_model.model."
        shapes = {key: tuple(t.shape) for key, t in load_file(good / WEIGHTS).items()}
        assert shapes == {
            f"{prefix}embed.lora_embedding_A": (3, 20),
            f"{prefix}embed.lora_embedding_B": (12, 3),
            **{f"{prefix}layers.{i}.q_proj.lora_A.weight": (3, 12) for i in range(3)},
            **{f"{prefix}layers.{i}.q_proj.lora_B.weight": (10, 3) for i in range(3)},
            **{f"{prefix}layers.{i}.v_proj.lora_A.weight": (3, 12) for i in range(3)},
            **{f"{prefix}layers.{i}.v_proj.lora_B.weight": (8, 3) for i in range(3)},
        }
        assert header(good)["__metadata__"]["format"] == "pt"
        assert header(good)["__metadata__"]["base_fingerprint"] == ln.fingerprint(Toy())
        assert "toy-0" in (good / CARD).read_text()

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"use_rslora": True},
            {"target_modules": r"layers\.[02]\.(q|v)_proj"},
            {"target_modules": ["v_proj", "q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
            {"target_modules": "all-linear", "exclude_modules": ["layers.1.v_proj"], "lora_dropout": 0.5},
        ],
        ids=repr,
    )
    def test_round_trip(self, tmp_path: Path, changes: dict) -> None:
        model, other = trained(**changes).eval(), Toy().eval()
        assert ln.save(model, tmp_path / "a" / "b") == tmp_path / "a" / "b"
        report = ln.load_adapter(other, str(tmp_path / "a" / "b"), "copy")
        assert not torch.allclose(model(IDS), Toy()(IDS), atol=1e-3)
        assert torch.equal(model(IDS), other(IDS))
        assert report.matched == adapters(model).reports["default"].matched
        assert adapters(other).active == ("copy",)
        assert report.config.lora_dropout == changes.get("lora_dropout", 0)
        # Saved again, it is the same adapter.
        ln.save(other, tmp_path / "again")
        once, again = tmp_path / "a" / "b", tmp_path / "again"
        assert (once / CONFIG).read_bytes() == (again / CONFIG).read_bytes()
        assert header(once) == header(again)
        assert all(torch.equal(t, load_file(again / WEIGHTS)[key]) for key, t in load_file(once / WEIGHTS).items())

    @pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ", ".join(f"{k}={v}" for k, v in options.items()))
    def test_round_trip_of_each_option(self, tmp_path: Path, options: dict) -> None:
        """The same output, the same modules, the same file when it is saved again; and each of its tensors is missed."""
        model, other = trained(**options).eval(), Toy().eval()
        ln.save(model, tmp_path / "one")
        report = ln.load_adapter(other, tmp_path / "one")
        assert not torch.allclose(model(IDS), Toy()(IDS), atol=1e-3)
        torch.testing.assert_close(other(IDS), model(IDS), atol=1e-5, rtol=1e-5)
        assert list(report.matched) == list(adapters(model).reports["default"].matched)
        ln.save(other, tmp_path / "two")
        once, again = load_file(tmp_path / "one" / WEIGHTS), load_file(tmp_path / "two" / WEIGHTS)
        assert once.keys() == again.keys()
        assert all(torch.equal(t, again[key]) for key, t in once.items())
        first, second = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("one", "two"))
        assert first == second | {"init_lora_weights": first["init_lora_weights"]}  # it is over, so nobody asks what it was
        for key in once:
            edit_tensors(tmp_path / "two", lambda t, key=key: t.pop(key))
            assert f"lacks 1 of {len(once)} tensors that its config asks for on this model, such as '{key}'" in refusal(
                Toy(), tmp_path / "two"
            )
            ln.save(other, tmp_path / "two")

    @pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
    @pytest.mark.parametrize("rslora", [True, False])
    def test_an_adapter_that_started_from_the_bases_weight_is_saved_as_plain_lora_of_twice_the_rank(
        self, tmp_path: Path, init: str, rslora: bool
    ) -> None:
        changes = {"init_lora_weights": init, "use_rslora": rslora, "target_modules": ["q_proj", "v_proj"]}
        model, other = trained(**changes, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 5}), Toy()
        report = ln.load_adapter(other, ln.save(model, tmp_path))
        torch.testing.assert_close(other(IDS), model(IDS), atol=1e-5, rtol=1e-5)
        before = adapters(model).reports["default"].matched
        assert {path: m.rank for path, m in report.matched.items()} == {path: 2 * m.rank for path, m in before.items()}
        assert {path: m.scale for path, m in report.matched.items()} == {path: pytest.approx(m.scale) for path, m in before.items()}
        assert report.config.init_lora_weights is True

    def test_first_pattern_that_matches_wins_after_saving_too(self, tmp_path: Path) -> None:
        """Sorted, "layers.*" would come before "q_proj"."""
        patterns = {"rank_pattern": {"q_proj": 2, "layers.*": 5}, "alpha_pattern": {"q_proj": 7, "layers.*": 3}}
        model, other = trained(**patterns), Toy()
        report = ln.load_adapter(other, ln.save(model, tmp_path))
        assert (report.matched["layers.0.q_proj"].rank, report.matched["layers.0.q_proj"].scale) == (2, 3.5)
        assert (report.matched["layers.0.v_proj"].rank, report.matched["layers.0.v_proj"].scale) == (5, 0.6)
        assert (report.matched["embed"].rank, report.matched["embed"].scale) == (3, 4)
        assert torch.equal(model(IDS), other(IDS))

    def test_adapter_is_fp32_on_a_base_in_16_bits(self, tmp_path: Path) -> None:
        model = Toy().to(torch.bfloat16)
        ln.attach(model, settings())
        assert {t.dtype for t in load_file(ln.save(model, tmp_path) / WEIGHTS).values()} == {torch.float32}

    def test_name_among_several(self, tmp_path: Path) -> None:
        model = trained(name="first")
        ln.attach(model, settings(r=2, lora_alpha=5), "second")
        assert header(ln.save(model, tmp_path / "active"))["base_model.model.embed.lora_embedding_A"]["shape"] == [2, 20]
        ln.set_active(model, ["first", "second"])
        with pytest.raises(AdapterError, match=r"Several adapters are active \(first, second\): say which one with name=…"):
            ln.save(model, tmp_path / "none")
        with pytest.raises(AdapterError, match=r"no adapter 'secnd'. Did you mean 'second'\?"):
            ln.save(model, tmp_path / "none", "secnd")
        with pytest.raises(AdapterError, match=r"attach\(model, LoraConfig"):
            ln.save(Toy(), tmp_path / "none")
        assert not (tmp_path / "none").exists()
        first, second = Toy(), Toy()
        ln.load_adapter(first, ln.save(model, tmp_path / "first", "first"))
        ln.load_adapter(second, ln.save(model, tmp_path / "second", "second"))
        ln.set_active(model, "first")
        assert torch.equal(first(IDS), model(IDS))
        ln.set_active(model, "second")
        assert torch.equal(second(IDS), model(IDS))

    def test_second_adapter_over_the_first(self, folder: Path) -> None:
        model, other = trained(seed=2, r=2), Toy()
        ln.save(model, folder)
        ln.load_adapter(other, folder)
        assert torch.equal(model(IDS), other(IDS))
        assert sorted(files(folder)) == [CARD, CONFIG, WEIGHTS]

    def test_a_card_that_someone_wrote_stays(self, folder: Path) -> None:
        (folder / CARD).write_text("mine")
        ln.save(trained(seed=2), folder)
        assert (folder / CARD).read_text() == "mine"

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_nan_is_not_saved(self, folder: Path, value: float) -> None:
        before, model = files(folder), trained(seed=2)
        with torch.no_grad():
            weights(model, "default")["layers.1.v_proj"].lora_B[0, 0] = value
        with pytest.raises(AdapterFileError, match=r"layers\.1\.v_proj\.lora_B\.weight' holds NaN or infinity.*untouched.*learning rate"):
            ln.save(model, folder)
        assert files(folder) == before


class TestInterruptedSave:
    """The adapter that was there stays whole, and nothing is left lying about."""

    def test_full_disk(self, folder: Path) -> None:
        """A limit on the size of a file makes `write` fail as a full disk does: part of the file is there by then."""
        before = files(folder)
        script = f"""
import resource, signal, torch, lora_nb as ln
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = torch.nn.Sequential(torch.nn.Linear(64, 64))
ln.attach(model, ln.LoraConfig(r=8, lora_alpha=20, target_modules=["0"]))
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
try:
    ln.save(model, {str(folder)!r})
except ln.errors.AdapterFileError as error:
    print(error)
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(ln.__file__).parents[1])
        assert "File too large" in done.stdout
        assert "What stood there before is untouched. Choose a folder that you may write to, on a disk with room." in done.stdout
        assert files(folder) == before

    def test_interrupt_while_writing(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = files(folder)
        monkeypatch.setattr(os, "fsync", Mock(side_effect=[None, KeyboardInterrupt]))
        with pytest.raises(KeyboardInterrupt):
            ln.save(trained(seed=2), folder)
        assert files(folder) == before

    def test_what_was_written_is_read_back(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = files(folder)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "read_bytes", Mock(return_value=b"rotten"))
            with pytest.raises(AdapterFileError, match="read back is not what was written"):
                ln.save(trained(seed=2), folder)
        assert files(folder) == before

    @pytest.mark.parametrize("error", [OSError("power"), KeyboardInterrupt()], ids=["error", "interrupt"])
    def test_killed_between_the_two_files(self, folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
        """The one moment at which new weights stand beside the old config is noticed when they are read."""
        model = trained(seed=2, lora_alpha=30)
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", stop_at(2, error))
            with pytest.raises((AdapterFileError, KeyboardInterrupt)) as caught:
                ln.save(model, folder)
        if isinstance(error, OSError):
            assert "Some of the files there are new and some old: save again" in str(caught.value)
        assert sorted(files(folder)) == [CARD, CONFIG, WEIGHTS]
        assert "a save was interrupted" in refusal(Toy(), folder)
        assert ln.inspect(folder).warnings == ["config and weights were not saved together"]
        # Saving again mends it.
        ln.save(model, folder)
        ln.load_adapter(Toy(), folder)

    def test_failing_first_rename_changes_nothing(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = files(folder)
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", stop_at(1, OSError("power")))
            with pytest.raises(AdapterFileError, match=r"power\. What stood there before is untouched"):
                ln.save(trained(seed=2), folder)
        assert files(folder) == before

    def test_folder_that_cannot_be_synced_is_no_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As on some network drives: by then all is written."""
        monkeypatch.setattr(os, "fsync", Mock(side_effect=[None, None, None, OSError(22, "Invalid argument")]))
        ln.load_adapter(Toy(), ln.save(trained(), tmp_path))

    @pytest.mark.parametrize("where", ["file/below", "file", "/proc/nowhere", "x" * 300, "n\0ul"])
    def test_folder_that_cannot_be_written(self, tmp_path: Path, where: str) -> None:
        (tmp_path / "file").write_text("not a folder")
        with pytest.raises(AdapterFileError, match=r"cannot be saved in '.*Choose a folder that you may write to"):
            ln.save(trained(), tmp_path / where)
        assert files(tmp_path) == {"file": b"not a folder"}


def stop_at(count: int, error: BaseException) -> Callable[[Path, Path], None]:
    """`os.replace`, but the call of that number fails."""
    calls, rename = [], os.replace

    def replace(source: Path, goal: Path) -> None:
        calls.append(goal)
        if len(calls) == count:
            raise error
        rename(source, goal)

    return replace


Q0A = "base_model.model.layers.0.q_proj.lora_A.weight"


def cut(file: str, length: int) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:length])


def claim_header(size: int) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", size) + (folder / WEIGHTS).read_bytes()[8:])


def text(content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / CONFIG).write_bytes(content if isinstance(content, bytes) else content.encode())


def option(**changes: object) -> Callable[[Path], object]:
    return lambda folder: edit_config(folder, **changes)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    return lambda folder: edit_tensors(folder, change)


def put(value: Tensor) -> Callable[[Path], object]:
    return tensors(lambda t: t.update({Q0A: value}))


def rename_all(change: Callable[[str], str]) -> Callable[[Path], object]:
    def renamed(found: dict[str, Tensor]) -> None:
        moved = {change(key): tensor for key, tensor in found.items()}
        found.clear()
        found.update(moved)

    return tensors(renamed)


def remove(file: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).unlink()


def folder_for_file(file: str) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    return harm


UNSUPPORTED = {
    "layer_replication": [[0, 2]],
    "alora_invocation_tokens": [1],
    "init_lora_weights": "pissa_niter_4",
    "use_qalora": True,
}

HOSTILE = {
    "for ever": "(.*?)" * 16 + r"\1l(?<=j)",  # no text ends in l and in j
    "in brackets": "(?:a?" * 240 + ")" * 240,
    "in memory": "((a{1000}){1000}){1000}",
    "too long": "x" * 1_000_000,
    "open": "a)|(b",
}

# What no strictness forgives: (harm, words of the message).
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, f"does not exist: an adapter is a folder with {CONFIG} and {WEIGHTS}"),
    "no config": (remove(CONFIG), f"has no {CONFIG}: an adapter is a folder with"),
    "no weights": (remove(WEIGHTS), f"has no {WEIGHTS}: save the adapter again"),
    "folder for config": (folder_for_file(CONFIG), f"has no {CONFIG}"),
    "folder for weights": (folder_for_file(WEIGHTS), f"has no {WEIGHTS}"),
    "config empty": (text(""), "is not valid JSON"),
    "config cut": (cut(CONFIG, 100), "is not valid JSON"),
    "config no text": (text(b"\xff\xfe\xfa"), "is not valid JSON"),
    "config nested": (text("[" * 200_000), "is not valid JSON"),
    "config a list": (text("[1, 2]"), "holds a list, not an object of settings: save the adapter again"),
    "config a number": (text("3"), "holds a int"),
    "config huge": (text(" " * 5_000_000), "no adapter config is that large"),
    "another method": (option(peft_type="LOHA"), "says peft_type 'LOHA'; lora_nb reads 'LORA'"),
    "no method": (text("{}"), "peft_type None"),
    "no targets": (option(target_modules=None), "has no target_modules"),
    "rank a word": (option(r="eight"), "r must be a whole number of at least 1"),
    "rank beyond any layer": (option(r=10**18), "r must be a whole number of at least 1 and at most 1048576"),
    "rank beyond a float": (option(r=10**400, use_rslora=True), "r must be a whole number"),
    "alpha too large for a float": (option(lora_alpha=10**400), "cannot be used"),
    "alpha infinite": (
        text('{"peft_type": "LORA", "target_modules": ["embed"], "lora_alpha": 1e999}'),
        "lora_alpha must be a number above 0",
    ),
    "bad pattern": (option(target_modules="(q_proj"), "is not usable as a regular expression"),
    "other rank": (option(r=2), "is (3, 20), but this model and the config ask for (2, 20). Load the base that it was trained on"),
    "wrong shape": (put(torch.ones(3, 11)), "is (3, 11), but this model and the config ask for (3, 12)"),
    "transposed": (tensors(lambda t: t.update({Q0A: t[Q0A].T.contiguous()})), "is (12, 3), but"),
    "integers": (put(torch.ones(3, 12, dtype=torch.int32)), "holds torch.int32, not floating-point numbers"),
    "8-bit floats": (put(torch.ones(3, 12).to(torch.float8_e4m3fn)), "holds torch.float8_e4m3fn, not floating-point numbers of 16 bits"),
    "complex": (put(torch.ones(3, 12, dtype=torch.complex64)), "holds torch.complex64, not floating-point"),
    "NaN": (put(torch.full((3, 12), float("nan"))), "holds NaN or infinity. Save the adapter again"),
    "beyond fp32": (put(torch.full((3, 12), 1e300, dtype=torch.float64)), "holds NaN or infinity"),
    "no prefix": (rename_all(lambda key: key.removeprefix("base_model.model.")), "it has 'embed.lora_embedding_A'. Load the base"),
    "adapter's name in the keys": (
        rename_all(lambda key: key.replace(".weight", ".default.weight").replace("embed", "e")),
        "none of the 14",
    ),
    "no tensors": (tensors(dict.clear), "it has 'none at all'"),
    "header oversized": (claim_header(2**63), "claims a header of"),
    "header larger than the file": (claim_header(1_000_000), "claims a header of 977 KiB: it is damaged, cut short"),
    "header shorter": (claim_header(40), "it is damaged, cut short or no safetensors file. Copy or save it again"),
    "header of no length": (claim_header(0), "it is damaged, cut short"),
    "weights are text": (
        lambda folder: (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "damaged",
    ),
    **{f"option {key}": (option(**{key: value}), f"has {key}=") for key, value in UNSUPPORTED.items()},
}

# What strict=False goes on with.
DOUBTFUL: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing key": (tensors(lambda t: t.pop(Q0A)), f"lacks 1 of 14 tensors that its config asks for on this model, such as '{Q0A}'"),
    "extra key": (
        tensors(lambda t: t.update({"extra": torch.ones(2)})),
        "has 1 tensors that its config does not place on this model, such as 'extra'",
    ),
    "extra layer": (
        tensors(lambda t: t.update({Q0A.replace(".0.", ".3."): torch.ones(3, 12)})),
        "such as 'base_model.model.layers.3.q_proj.lora_A.weight'",
    ),
    "edited config": (option(lora_alpha=24), f"{CONFIG} was edited, or a save was interrupted"),
    "config of another adapter": (lambda folder: edit_config(folder, lora_dropout=0.25), f"{CONFIG} was edited"),
    "another base's embedding": (
        tensors(lambda t: t.update({"base_model.model.embed.base_layer.weight": torch.ones(20, 12)})),
        "such as 'base_model.model.embed.base_layer.weight'",
    ),
}


class TestRefused:
    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("harm", BROKEN)
    def test_broken(self, folder: Path, harm: str, strict: bool) -> None:
        act, words = BROKEN[harm]
        act(folder)
        message = refusal(Toy(), folder, strict=strict)
        assert words in message, message
        assert str(folder) in message
        assert len(message) < 600

    @pytest.mark.parametrize("harm", DOUBTFUL)
    def test_doubtful(self, folder: Path, harm: str) -> None:
        act, words = DOUBTFUL[harm]
        act(folder)
        message = refusal(Toy(), folder)
        assert words in message, message
        assert "With strict=False it is loaded all the same" in message
        model = Toy()
        with pytest.warns(UserWarning, match=".") as caught:
            ln.load_adapter(model, folder, strict=False)
        assert words in str(caught[0].message)
        assert not torch.allclose(model(IDS), Toy()(IDS), atol=1e-3)

    def test_a_warning_made_an_error_leaves_the_model_alone(self, folder: Path) -> None:
        edit_config(folder, lora_alpha=24)
        model, before = Toy(), state(Toy())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="was edited"):
                ln.load_adapter(model, folder, strict=False)
        assert state(model)[0].keys() == before[0].keys()
        assert not adapters(model).reports

    @pytest.mark.parametrize("lost", [Q0A, Q0A.replace("lora_A", "lora_B")])
    def test_module_with_a_missing_key_stays_as_the_base(self, folder: Path, lost: str) -> None:
        edit_tensors(folder, lambda t: t.pop(lost))
        model, base, x = Toy(), Toy(), torch.randn(5, 12)
        with pytest.warns(UserWarning, match="lacks 1 of 14"):
            ln.load_adapter(model, folder, strict=False)
        assert torch.equal(model.layers[0].q_proj(x), base.layers[0].q_proj(x))
        assert not torch.allclose(model.layers[0].v_proj(x), base.layers[0].v_proj(x), atol=1e-3)

    def test_another_base_of_the_same_shape(self, folder: Path) -> None:
        message = refusal(Toy(seed=5), folder)
        assert "It was trained on another base ('toy-0'); on 'toy-5' its output would mean little. With strict=False" in message
        with pytest.warns(UserWarning, match="another base"):
            ln.load_adapter(Toy(seed=5), folder, strict=False)

    @pytest.mark.parametrize(("layers", "words"), [(2, "has 4 tensors that its config does not place"), (4, "lacks 4 of 18 tensors")])
    def test_another_number_of_layers(self, folder: Path, layers: int, words: str) -> None:
        message = refusal(Toy(layers), folder)
        assert words in message
        assert "another base" in message

    @pytest.mark.parametrize("saved_from", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("loaded_on", [torch.float32, torch.float16, torch.bfloat16])
    def test_base_in_16_bits_is_no_other_base(self, tmp_path: Path, saved_from: torch.dtype, loaded_on: torch.dtype) -> None:
        """From one checkpoint, in bfloat16 as most are, or in float32 where one of the two reads it as it is."""
        checkpoints = [torch.bfloat16] if {saved_from, loaded_on} == {torch.float16, torch.bfloat16} else [torch.bfloat16, torch.float32]
        for seed, stored in enumerate(checkpoints * 5):
            model, other = (Toy(seed=seed).to(stored).to(dtype) for dtype in (saved_from, loaded_on))
            ln.attach(model, settings())
            ln.load_adapter(other, ln.save(model, tmp_path / f"{seed}"))

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"target_modules": ["q_proj", "v_proj", "embed", "k_proj"]}, "Its target_modules names 'k_proj', which this model lacks."),
            ({"modules_to_save": ["norm", "layers.1.v_proj"], "target_modules": ["q_proj", "embed"]}, "Its modules_to_save names 'norm'"),
            (
                {"layers_to_transform": [0, 7, 1, 2], "layers_pattern": "layers", "target_modules": ["q_proj", "v_proj"]},
                "Its layers_to_transform names 7, which",
            ),
        ],
        ids=["target", "whole", "layer"],
    )
    def test_module_that_the_model_lacks(self, folder: Path, changes: dict, words: str) -> None:
        """Going on without it is reasonable, so strict=False does."""
        edit_config(folder, **changes)
        message = refusal(Toy(), folder)
        assert words in message
        assert "With strict=False it is loaded all the same" in message
        model = Toy()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = ln.load_adapter(model, folder, strict=False)
        assert words in str(caught[0].message)
        assert {"layers.0.q_proj", "layers.2.q_proj"} <= report.matched.keys()
        assert not torch.allclose(model(IDS), Toy()(IDS), atol=1e-3)
        ln.load_adapter(Toy(), ln.save(model, folder / "again"))  # what is written names only what was there

    @pytest.mark.parametrize("strict", [True, False])
    def test_nothing_of_what_it_names_is_there(self, folder: Path, strict: bool) -> None:
        edit_config(folder, target_modules=["k_proj", "query"])
        assert "target_modules names 'k_proj', which matches no module" in refusal(Toy(), folder, kind=TargetError, strict=strict)

    def test_path_of_a_file_or_of_nothing_that_can_be(self, folder: Path) -> None:
        assert "is a file: an adapter is a folder" in refusal(Toy(), folder / WEIGHTS)
        assert "cannot be read: File name too long. Check the path" in refusal(Toy(), folder / ("x" * 300))
        assert "does not exist" in refusal(Toy(), folder / "n\0ul")

    def test_pickle_is_never_opened(self, folder: Path, tmp_path: Path) -> None:
        class Bomb:
            def __reduce__(self) -> tuple:
                return Path.touch, (tmp_path / "exploded",)

        (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
        ln.load_adapter(Toy(), folder)
        (folder / WEIGHTS).unlink()
        words = "has only adapter_model.bin, a pickle, which can run code when it is opened: save the adapter again as safetensors"
        assert words in refusal(Toy(), folder)
        (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb()))
        assert "damaged" in refusal(Toy(), folder)
        assert not (tmp_path / "exploded").exists()
        pickle.loads(pickle.dumps(Bomb()))  # noqa: S301 - it would have gone off
        assert (tmp_path / "exploded").exists()

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("kept", ["weights_sha256", "nothing"])
    def test_other_values_than_were_saved(self, folder: Path, kept: str, strict: bool) -> None:
        """One bit is enough; but a file of somebody else has no hash to compare with."""
        found, metadata = load_file(folder / WEIGHTS), header(folder)["__metadata__"]
        found[Q0A].view(torch.uint8)[0, 0] ^= 1
        save_file(found, folder / WEIGHTS, metadata if kept != "nothing" else {"format": "pt"})
        if kept == "nothing":
            ln.load_adapter(Toy(), folder, strict=strict)
        else:
            assert "holds other values than were saved: it is damaged. Copy or save it again." in refusal(Toy(), folder, strict=strict)

    def test_a_tensor_under_another_name_is_noticed_too(self, folder: Path) -> None:
        found, metadata = load_file(folder / WEIGHTS), header(folder)["__metadata__"]
        one, other = Q0A, Q0A.replace(".0.", ".1.")
        save_file(found | {one: found[other], other: found[one]}, folder / WEIGHTS, metadata)
        assert "holds other values than were saved" in refusal(Toy(), folder)

    @pytest.mark.parametrize("where", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"])
    @pytest.mark.parametrize("pattern", HOSTILE)
    def test_a_hostile_regular_expression(self, folder: Path, pattern: str, where: str) -> None:
        """Our error, within seconds, in little memory."""
        value: object = HOSTILE[pattern]
        changes = {where: {value: 2} if where in {"rank_pattern", "alpha_pattern"} else value}
        layers = {"layers_to_transform": [0], "target_modules": ["q_proj"]} if where == "layers_pattern" else {}
        edit_config(folder, **layers, **changes)
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        message = refusal_of_any_kind(Toy(), folder)
        meaningless = pattern == "open" and "was edited" in message  # in brackets of ours, as PEFT has them too, it is a pattern
        assert "takes longer than 1 s" in message if pattern == "for ever" else meaningless or where in message or "The pattern" in message
        assert len(message) < 600
        assert time.perf_counter() - start < 8
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB

    def test_memory_is_not_given_for_what_a_file_only_speaks_of(self, folder: Path) -> None:
        """A rank of a million, with no tensors that have it."""
        edit_tensors(folder, lambda t: [t.pop(key) for key in list(t) if "v_proj" in key])
        edit_config(folder, rank_pattern={"v_proj": 1_000_000})
        for strict in (True, False):
            assert "its config asks for 60,000,000 numbers that the file does not hold" in refusal(Toy(), folder, strict=strict)

    def test_cut_at_any_length(self, folder: Path) -> None:
        whole, model = (folder / WEIGHTS).read_bytes(), Toy()
        before = state(model)
        for length in [*range(40), *range(40, len(whole), 37), len(whole) - 1]:
            (folder / WEIGHTS).write_bytes(whole[:length])
            with pytest.raises(AdapterFileError, match="cut short"):
                ln.load_adapter(model, folder, strict=False)
        assert same(state(model), before)

    def test_names(self, good: Path) -> None:
        model = trained(name="tone")
        assert "already has an adapter 'tone'" in refusal(model, good, kind=AdapterError, name="tone")
        assert "cannot name an adapter" in refusal(model, good, kind=AdapterError, name="a.b")

    @pytest.mark.parametrize("earlier", [True, False])
    def test_error_after_attaching(self, good: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool) -> None:
        model = trained(name="earlier") if earlier else Toy()
        model.layers[1].q_proj.bias.requires_grad_(requires_grad=False)
        before = state(model)
        monkeypatch.setattr(checkpoint, "_fill", Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            ln.load_adapter(model, good, "late")
        assert same(state(model), before)


class TestLoaded:
    def test_beside_another(self, good: Path) -> None:
        model, alone = trained(seed=2, name="earlier", r=2), Toy()
        first = model(IDS)
        ln.load_adapter(model, good, "late")
        ln.load_adapter(alone, good)
        assert torch.equal(model(IDS), alone(IDS))
        ln.set_active(model, "earlier")
        assert torch.equal(model(IDS), first)
        ln.detach(model)
        assert torch.equal(model(IDS), Toy()(IDS))

    def test_smallest_file_means_what_it_means_to_peft(self, folder: Path) -> None:
        """Without r and lora_alpha both are 8."""
        (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": ["embed"]}))
        a, b = torch.randn(8, 20), torch.randn(12, 8)
        save_file({"base_model.model.embed.lora_embedding_A": a, "base_model.model.embed.lora_embedding_B": b}, folder / WEIGHTS)
        model = Toy()
        report = ln.load_adapter(model, folder)
        assert (report.matched["embed"].rank, report.matched["embed"].scale) == (8, 1)
        assert torch.allclose(model.embed(IDS), Toy().embed(IDS) + (b @ a).T[IDS], atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_floats_become_fp32(self, folder: Path, dtype: torch.dtype) -> None:
        found = load_file(folder / WEIGHTS)
        edit_tensors(folder, lambda t: t.update({key: tensor.to(dtype) for key, tensor in t.items()}))
        model = Toy()
        ln.load_adapter(model, folder)
        loaded = weights(model, "default")["layers.0.q_proj"].lora_A
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded, found[Q0A].to(dtype).float())

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
    def test_config_that_an_editor_on_windows_saved(self, folder: Path, encoding: str) -> None:
        (folder / CONFIG).write_text((folder / CONFIG).read_text(), encoding=encoding)
        with pytest.warns(UserWarning, match="was edited"):
            ln.load_adapter(Toy(), folder, strict=False)
        assert ln.inspect(folder).base == "toy-0"

    @pytest.mark.parametrize("key", ["base_model.model.embed.base_layer.weight", "base_model.model.embed.weight"])
    def test_copy_of_the_bases_own_embedding_says_nothing_new(self, folder: Path, key: str) -> None:
        edit_tensors(folder, lambda t: t.update({key: Toy().embed.weight.detach()}))
        ln.load_adapter(Toy(), folder)


VALUES = (
    None,
    True,
    False,
    0,
    -1,
    3,
    12,
    7,
    10**400,
    1e308,
    float("nan"),
    "",
    "q_proj",
    "embed",
    "(",
    "[" * 50,
    "*",
    "gaussian",
    [],
    ["q_proj"],
)
MORE = (
    [None],
    [[[]]],
    {},
    {"q_proj": 2},
    {"q_proj": None},
    {"(": 1},
    {"": 3},
    "x" * 9999,
    ["embed", "embed"],
    [0],
    [10**30],
    {"a": {"b": []}},
)
DTYPES = ("F32", "F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "F6_E2M3", "C64", "U32", "X1")


class Mutant:
    """One random change to an adapter's two files."""

    def __init__(self, seed: int, original: dict[str, bytes]) -> None:
        self.random, self.config, self.weights = random.Random(seed), original[CONFIG], original[WEIGHTS]
        self.kind = self.random.choice(
            [self.flip, self.cut, self.grow, self.length, self.rename, self.tensor, self.metadata, *[self.value] * 4]
        )
        self.kind()

    def flip(self) -> None:
        """Bytes anywhere, but more often where the meaning lies: in the header and in the config."""
        which = self.random.choice(["config", "weights"])
        content = bytearray(getattr(self, which))
        for _ in range(self.random.choice([1, 1, 2, 8])):
            content[self.random.randrange(min(len(content), self.random.choice([10, 2500, 10**9])))] = self.random.randrange(256)
        setattr(self, which, bytes(content))

    def cut(self) -> None:
        which = self.random.choice(["config", "weights"])
        content = getattr(self, which)
        setattr(self, which, content[: self.random.randrange(len(content))])

    def grow(self) -> None:
        which = self.random.choice(["config", "weights"])
        setattr(self, which, getattr(self, which) + self.random.randbytes(self.random.choice([1, 8, 1000])))

    def length(self) -> None:
        self.weights = struct.pack("<Q", self.random.getrandbits(self.random.choice([4, 11, 16, 40, 64]))) + self.weights[8:]

    def rename(self) -> None:
        found = self._header()
        key = self.random.choice(list(found))
        middle = self.random.randrange(len(key))
        found[self.random.choice([key[:middle], key[middle:], key + "x", key.replace("A", "B"), "", "é\n"])] = found.pop(key)
        self._set(found)

    def tensor(self) -> None:
        found = self._header()
        entry = found[self.random.choice([key for key in found if key != "__metadata__"])]
        choices = {
            "dtype": self.random.choice(DTYPES),
            "shape": self.random.choice([[], [0], [36], [12, 3], [3, 6], [3, 24], [2**40, 2**40], [-1, -36], [1.5], None, "3", [3, 12, 1]]),
            "data_offsets": self.random.choice([[0, 0], [0, 2**60], [5, 1], [0, 144], None, [-4, 4], entry["data_offsets"][::-1]]),
        }
        for field in self.random.sample(list(choices), k=self.random.choice([1, 1, 2])):
            entry[field] = choices[field]
        self._set(found)

    def metadata(self) -> None:
        found = self._header()
        key = self.random.choice(list(found["__metadata__"]))
        found["__metadata__"][key] = self.random.choice(["", "0", "<b>", None, 5, {}])
        self._set(self.random.choice([found, found | {"__metadata__": {}}, found | {"__metadata__": 3}]))

    def value(self) -> None:
        found = json.loads(self.config)
        for key in self.random.sample([*found, "use_qalora", "unknown", "revision", "peft_version"], k=self.random.choice([1, 1, 2])):
            found[key] = self.random.choice(VALUES + MORE)
        self.config = json.dumps(found).encode()

    def _header(self) -> dict:
        return json.loads(self.weights[8 : 8 + struct.unpack("<Q", self.weights[:8])[0]])

    def _set(self, found: object) -> None:
        new, start = json.dumps(found).encode(), 8 + struct.unpack("<Q", self.weights[:8])[0]
        self.weights = struct.pack("<Q", len(new)) + new + self.weights[start:]


RICH = {
    "target_modules": ["q_proj"],
    "use_dora": True,
    "lora_bias": True,
    "bias": "all",
    "modules_to_save": ["v_proj"],
    "trainable_token_indices": {"embed": [1, 5]},
    "rank_pattern": {r"layers\.1\..*": 2},
}


@pytest.mark.parametrize("batch", range(20))
def test_whatever_is_wrong_with_a_file_one_kind_of_error_says_so(good: Path, tmp_path: Path, batch: int) -> None:
    """A hundred random harms a batch, to a plain adapter or to one with every option.

    Refused as a LoraNbError with the model as it was, or loaded and taken off again; in little memory, and with nothing
    written anywhere.
    """
    folder, model, kinds = tmp_path / "folder", trained(name="earlier"), {}
    original = files(good if batch % 2 == 0 else ln.save(trained(**RICH), tmp_path / "original"))
    folder.mkdir()
    before, around = state(model), sorted(tmp_path.rglob("*"))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(100 * batch, 100 * batch + 100):
        mutant = Mutant(seed, original)
        (folder / CONFIG).write_bytes(mutant.config)
        (folder / WEIGHTS).write_bytes(mutant.weights)
        start, outcome = time.process_time(), "loaded"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                repr(tell(folder))
                ln.load_adapter(model, folder, "mutant", strict=seed % 2 == 0)
            ln.detach(model, "mutant")
            ln.set_active(model, "earlier")
        except LoraNbError as error:
            outcome = type(error).__name__
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {mutant.kind.__name__}: {error!r}") from error
        assert same(state(model), before), (seed, mutant.kind.__name__)
        assert time.process_time() - start < 5, (seed, mutant.kind.__name__)
        kinds[outcome] = kinds.get(outcome, 0) + 1
    assert sorted(tmp_path.rglob("*")) == sorted([*around, folder / CONFIG, folder / WEIGHTS])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000  # KiB
    assert kinds["AdapterFileError"] > 30, kinds
    assert kinds["loaded"] > 5, kinds  # else the harms would be too rude to test much


def tell(folder: Path) -> str:
    try:
        return repr(ln.inspect(folder)) + ln.inspect(folder)._repr_html_()
    except LoraNbError as error:
        return str(error)


def test_files_are_closed_after_reading(good: Path) -> None:
    ln.load_adapter(Toy(), good)
    ln.inspect(good)
    opened = Path("/proc/self/fd")
    if not opened.exists():
        pytest.skip("needs /proc")
    assert not [link for link in opened.iterdir() if link.exists() and str(good) in str(link.readlink())]


def test_tensors_do_not_hold_on_to_the_file(folder: Path) -> None:
    """The file may be changed or removed afterwards: what was loaded stays."""
    model, other = Toy(), trained()
    ln.load_adapter(model, folder)
    with safe_open(folder / WEIGHTS, framework="pt") as f:
        assert set(f.keys()) == set(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).write_bytes(bytes(len((folder / WEIGHTS).read_bytes())))
    assert torch.equal(model(IDS), other(IDS))
