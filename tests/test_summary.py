"""What a saved adapter is, told from its files alone."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_nb as ln
from lora_nb.errors import AdapterFileError
from tests.test_checkpoint import (
    BROKEN,
    CARD,
    LINEAR,
    Q0A,
    Toy,
    edit_config,
    edit_tensors,
    files,
    option,
    put,
    settings,
    tensors,
    trained,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ln.save(trained(), tmp_path_factory.mktemp("good") / "adapter")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def test_all_that_is_said_of_an_adapter(good: Path) -> None:
    summary = ln.inspect(good)
    assert summary.config == settings(target_modules=["embed", "q_proj", "v_proj"])
    assert summary.modules == {
        "embed": (3, 20, 12),
        **{f"layers.{i}.q_proj": (3, 12, 10) for i in range(3)},
        **{f"layers.{i}.v_proj": (3, 12, 8) for i in range(3)},
    }
    assert summary.bytes == sum(len(content) for name, content in files(good).items() if name != CARD)
    assert (summary.base, summary.fingerprint, summary.warnings) == ("toy-0", ln.fingerprint(Toy()), [])
    parameters = sum(r * (i + o) for r, i, o in summary.modules.values())
    assert parameters == sum(p.numel() for p in ln.parameters(trained()).values())
    assert f"{parameters:,}" in repr(summary)
    assert "toy-0" in summary._repr_html_()


@pytest.mark.parametrize(
    ("harm", "warning"),
    [
        (
            tensors(lambda t: t.update({"base_model.model.head.weight": torch.ones(2)})),
            "key 'base_model.model.head.weight' is not one of",
        ),
        (tensors(lambda t: t.pop(Q0A)), "layers.0.q_proj has no pair"),
        (put(torch.full((3, 12), float("inf"))), f"{Q0A} holds NaN or infinity"),
        (put(torch.ones(3, 12).to(torch.float8_e4m3fn)), f"{Q0A} holds torch.float8_e4m3fn"),
        (put(torch.ones(3)), "layers.0.q_proj has no pair of A and B"),
        (option(lora_alpha=24), "config and weights were not saved together"),
    ],
)
def test_what_looks_odd_is_said(folder: Path, harm: Callable, warning: str) -> None:
    harm(folder)
    summary = ln.inspect(folder)
    assert any(warning in w for w in summary.warnings), summary.warnings
    assert "warning" in repr(summary)


@pytest.mark.parametrize(
    "harm", [name for name in BROKEN if name.startswith(("no w", "no m", "config", "option", "header", "weights", "bad"))]
)
def test_what_loading_refuses_is_refused_here_too(folder: Path, harm: str) -> None:
    act, words = BROKEN[harm]
    act(folder)
    with pytest.raises(AdapterFileError) as caught:
        ln.inspect(folder)
    assert words in str(caught.value)


def test_html_from_a_file_is_escaped(folder: Path) -> None:
    edit_config(folder, base_model_name_or_path="<script>alert(1)</script>")
    assert "<script>" not in ln.inspect(folder)._repr_html_()
    edit_config(folder, base_model_name_or_path=["not", "a", "name"])
    assert ln.inspect(folder).base is None


# ---- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "method", "modules"),
    [
        ({"use_rslora": True}, "LoRA, rank-stabilised", 7),
        ({"use_dora": True}, "DoRA", 7),
        (LINEAR | {"use_dora": True, "use_rslora": True, "lora_bias": True}, "DoRA, rank-stabilised", 6),
        ({"bias": "all", "target_modules": ["v_proj"]}, "LoRA", 3),
        ({"target_modules": ["v_proj"], "modules_to_save": ["q_proj"]}, "LoRA", 3),
        (LINEAR | {"trainable_token_indices": {"embed": [3, 1]}}, "LoRA", 6),
        ({"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]}, "LoRA", 6),
        (LINEAR | {"init_lora_weights": "pissa"}, "LoRA", 6),
    ],
    ids=str,
)
def test_nothing_is_odd_about_a_file_of_ours_whatever_its_options(tmp_path: Path, options: dict, method: str, modules: int) -> None:
    summary = ln.inspect(ln.save(trained(**options), tmp_path))
    assert summary.warnings == []
    assert len(summary.modules) == modules
    assert ("method", method) in summary._rows()
    assert summary.parameters == sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values())
    assert ("parameters", f"{summary.parameters:,}") in summary._rows()


def test_a_kernel_is_laid_flat_and_a_copy_of_the_base_does_not_count(tmp_path: Path) -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 5), "embed_tokens": nn.Embedding(20, 12)})
    report = ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6, target_modules=["conv", "embed_tokens"]))
    folder = ln.save(model, tmp_path)
    edit_tensors(folder, lambda t: t.update({"base_model.model.embed_tokens.base_layer.weight": torch.ones(20, 12)}))
    summary = ln.inspect(folder)
    assert summary.modules == {"conv": (2, 75, 8), "embed_tokens": (2, 20, 12)}
    assert summary.parameters == report.trainable == 2 * (75 + 8) + 2 * (20 + 12)


def test_a_start_from_the_weights_is_seen_as_twice_the_rank(tmp_path: Path) -> None:
    summary = ln.inspect(ln.save(trained(**LINEAR, init_lora_weights="olora"), tmp_path))
    assert {r for r, _, _ in summary.modules.values()} == {6}
    assert (summary.config.r, summary.config.lora_alpha) == (6, 24)


def test_a_file_without_a_fingerprint_says_who_did_not_write_it(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})
    summary = ln.inspect(folder)
    assert summary.fingerprint is None
    assert "none: not written by lora_nb" in repr(summary)


def test_damage_is_refused(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(AdapterFileError, match="holds other values than were saved: it is damaged"):
        ln.inspect(folder)
