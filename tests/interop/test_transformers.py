"""transformers' own adapter methods, without PEFT's wrapper: it loads what lora_nb writes and writes what lora_nb loads."""

import warnings
from pathlib import Path

import peft
import pytest
import torch

import lora_nb as ln
from lora_nb.attach import adapters
from tests.interop.conftest import Case, gap, lora_parameters, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter"),
]
OF_SAVING = ("Setting `save_embedding_layers` to `True`", "Could not find a config file in tiny")


def test_transformers_loads_ours(case: Case, tmp_path: Path) -> None:
    ours, theirs = case.base(), case.base()
    ln.attach(ours, case.lora_nb())
    train(iter(ln.parameters(ours).values()))
    ln.save(ours, tmp_path)
    info = theirs.load_adapter(tmp_path)
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert not info.mismatched_keys
    assert gap(theirs, ours) <= 1e-5
    assert gap(ours, case.original) > 1e-2


def test_we_load_transformers(case: Case, tmp_path: Path) -> None:
    ours, theirs = case.base(), case.base()
    theirs.add_adapter(case.peft())
    train(lora_parameters(theirs))
    with warnings.catch_warnings():
        for words in OF_SAVING:
            warnings.filterwarnings("ignore", words)
        theirs.save_pretrained(tmp_path)
    report = ln.load_adapter(ours, tmp_path)
    assert gap(theirs, ours) <= 1e-5
    assert gap(ours, case.original) > 1e-2
    assert report.trainable == sum(p.numel() for p in lora_parameters(theirs))


@pytest.mark.parametrize("settings", [{"lora_bias": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}], ids=str)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")
def test_transformers_loads_our_options(llama: Case, tmp_path: Path, settings: dict) -> None:
    ours, theirs = llama.base(), llama.base()
    ln.attach(ours, ln.LoraConfig(**llama.settings | settings))
    with torch.no_grad():
        for p in ln.parameters(ours).values():
            p.add_(torch.randn_like(p) * 0.1)
    info = theirs.load_adapter(ln.save(ours, tmp_path))
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert gap(theirs, ours) <= 1e-5
    assert gap(ours, llama.original) > 1e-2


@pytest.mark.parametrize("writer", ["lora_nb", "PEFT"])
def test_transformers_leaves_doras_magnitudes_out_whoever_wrote_them(llama: Case, tmp_path: Path, writer: str) -> None:
    """It looks for another key than PEFT writes, so an adapter with DoRA has to be read with PEFT (or here)."""
    if writer == "PEFT":
        peft.get_peft_model(llama.base(), llama.peft(use_dora=True)).save_pretrained(tmp_path)
    else:
        model = llama.base()
        ln.attach(model, ln.LoraConfig(**llama.settings, use_dora=True))
        ln.save(model, tmp_path)
    info = llama.base().load_adapter(tmp_path)
    assert len(info.missing_keys) == 6
    assert all("lora_magnitude_vector" in key for key in info.missing_keys)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_one_among_several(llama: Case, tmp_path: Path) -> None:
    """Two of ours beside each other in transformers' model, one active at a time."""
    ours, theirs = llama.base(), llama.base()
    for name, rank in (("first", 2), ("second", 5)):
        ln.attach(ours, ln.LoraConfig(**llama.settings | {"r": rank}), name)
        train(iter(ln.parameters(ours, name).values()))
        ln.save(ours, tmp_path / name, name)
        theirs.load_adapter(tmp_path / name, name)
    for name in adapters(ours).reports:
        theirs.set_adapter(name)
        ln.set_active(ours, name)
        assert gap(theirs, ours) <= 1e-5
    theirs.disable_adapters()
    with ln.disabled(ours):
        assert gap(theirs, ours) == 0
