"""What adapters take on disk; in fewer bits they stay what they were, as far as these bits go."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_nb as ln
from lora_nb.adapter_files import read_folder
from lora_nb.errors import AdapterFileError, ConfigError
from lora_nb.storage import model_bytes
from tests.models import tiny_llama, token_ids
from tests.test_engines import LINEAR, saved

KINDS = {"fp16": (0.5, 2**-11), "bf16": (0.5, 2**-8), "int8": (0.35, 0.5 / 127)}  # share of the bytes, largest relative error of a row


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "a", ln.LoraConfig(r=8, **LINEAR))


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_bytes_and_nearly_the_same_numbers(folder: Path, tmp_path: Path, kind: str) -> None:
    out = ln.store(folder, tmp_path / kind, kind)
    share, error = KINDS[kind]
    sizes = [max(p.stat().st_size for p in path.glob("*.safetensors")) for path in (folder, out)]
    assert sizes[1] < sizes[0] * (share + 0.15)
    before, after = read_folder(folder).tensors, read_folder(out).tensors
    assert before.keys() == after.keys()
    for key, t in before.items():
        top = t.abs().amax(1 if t.shape[0] <= t.shape[1] else 0, keepdim=True)
        assert ((after[key].float() - t).abs() <= top * error * 1.001).all(), key
    model, other = tiny_llama(), tiny_llama()
    ln.load_adapter(model, folder)
    ln.load_adapter(other, out)
    ids = token_ids()
    assert torch.allclose(model(input_ids=ids).logits, other(input_ids=ids).logits, atol=20 * error)
    assert all(p.dtype == torch.float32 for p in ln.parameters(other).values())


def test_eight_bits_by_hand() -> None:
    from lora_nb.storage import _quantized

    found = _quantized("k", torch.tensor([[1.27, -0.50, 0.004], [0.0, 0.0, 0.0]]))
    assert found["k"].tolist() == [[127, -50, 0], [0, 0, 0]]
    assert found["k.scale"][0].item() == pytest.approx(0.01)


def test_sixteen_bits_are_still_pefts(folder: Path, tmp_path: Path) -> None:
    out, ids = ln.store(folder, tmp_path / "b", "fp16"), token_ids()
    model = tiny_llama()
    ln.load_adapter(model, out)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), out)(input_ids=ids).logits
    assert torch.allclose(model(input_ids=ids).logits, theirs, atol=1e-5)


def test_no_other_reader_takes_whole_numbers_for_weights(folder: Path, tmp_path: Path) -> None:
    out = ln.store(folder, tmp_path / "b", "int8")
    assert not (out / "adapter_model.safetensors").exists()
    with pytest.raises(ValueError, match="Repo id"):
        peft.PeftModel.from_pretrained(tiny_llama(), str(out))  # no weights here, so it looks on the Hub


def test_a_damaged_scale_is_refused(folder: Path, tmp_path: Path) -> None:
    out = ln.store(folder, tmp_path / "b", "int8")
    file = out / "adapter_model.int8.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith(".scale"))
    del tensors[key]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(AdapterFileError, match="no scale that fits"):
        ln.load_adapter(tiny_llama(), out)


def test_bad_requests(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one of fp16, bf16, int8"):
        ln.store(folder, tmp_path / "b", "int4")
    with pytest.raises(AdapterFileError, match="bottleneck"):
        ln.store(saved(tmp_path / "c", ln.BottleneckConfig.houlsby()), tmp_path / "b")
    with pytest.raises(AdapterFileError, match="stored in another way"):
        ln.store(folder, folder, "int8")
    model = tiny_llama()
    ln.attach(model, ln.LoraConfig(r=2, **LINEAR))
    with torch.no_grad():
        next(iter(ln.parameters(model).values())).fill_(1e6)
    ln.save(model, tmp_path / "large")
    with pytest.raises(AdapterFileError, match="beyond those of 16 bits"):
        ln.store(tmp_path / "large", tmp_path / "d", "fp16")


def test_the_table(folder: Path, tmp_path: Path) -> None:
    out = ln.store(folder, tmp_path / "b", "int8")
    base = model_bytes(tiny_llama())
    (tmp_path / "bad").mkdir()
    table = ln.storage([folder, out, tmp_path / "bad"], base)
    assert table.as_models == 3 * base
    assert table.total == sum(p.stat().st_size for f in (folder, out) for p in f.iterdir() if p.suffix != ".md")
    assert "float32" in repr(table)
    assert "int8" in repr(table)
    assert "has no adapter_config.json" in repr(table)
    assert "times as much" in table._repr_html_()
