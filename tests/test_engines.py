"""Which serving engines take an adapter, and one that all of them take, which says the same."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch

import lora_nb as ln
from lora_nb.engines import ENGINES
from lora_nb.errors import AdapterFileError
from tests.models import tiny_gpt2, tiny_llama, token_ids


def saved(path: Path, config, model=None) -> Path:
    model = model or tiny_llama()
    ln.attach(model, config)
    for i, p in enumerate(ln.parameters(model).values()):
        with torch.no_grad():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
    return ln.save(model, path)


LINEAR = {"lora_alpha": 12, "target_modules": "all-linear"}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (ln.LoraConfig(r=8, **LINEAR), {}),
        (ln.LoraConfig(r=8, use_rslora=True, **LINEAR), {}),
        (ln.LoraConfig(r=8, use_dora=True, **LINEAR), dict.fromkeys(ENGINES, "DoRA's magnitudes are not read")),
        (ln.LoraConfig(r=8, modules_to_save=["lm_head"], **LINEAR), dict.fromkeys(ENGINES, "modules_to_save must be none")),
        (ln.LoraConfig(r=8, rank_pattern={"q_proj": 4}, **LINEAR), dict.fromkeys(ENGINES, "rank_pattern and alpha_pattern are not read")),
        (ln.LoraConfig(r=8, lora_bias=True, **LINEAR), dict.fromkeys(ENGINES, "lora_bias is not read")),
        (ln.LoraConfig(r=8, lora_alpha=12, target_modules=["q_proj", "embed_tokens"]), {"SGLang": "", "vLLM": "", "LoRAX": ""}),
        (ln.BottleneckConfig.houlsby(), dict.fromkeys(ENGINES, "it is no LoRA adapter")),
    ],
)
def test_what_they_refuse(tmp_path: Path, config, why: dict[str, str]) -> None:
    summary = ln.inspect(saved(tmp_path / "a", config))
    assert set(summary.engines) == set(ENGINES)
    for engine in ENGINES:
        if engine in why:
            assert any(why[engine] in said for said in summary.engines[engine])
            assert engine in repr(summary)
        else:
            assert summary.engines[engine] == ()
    assert "takes it" in repr(summary) or why


def test_a_rank_above_what_they_take(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(300, 300))
    model.config = None
    path = saved(tmp_path / "a", ln.LoraConfig(r=200, lora_alpha=12, target_modules=["0"]), model)
    assert all("rank 200 is above 128" in said[0] for said in ln.inspect(path).engines.values())
    with pytest.raises(AdapterFileError, match="rank 200 is above 128"):
        ln.save_for_engines(path, tmp_path / "b")


@pytest.mark.parametrize(
    "config",
    [
        ln.LoraConfig(r=5, **LINEAR),
        ln.LoraConfig(r=8, use_rslora=True, **LINEAR),
        ln.LoraConfig(r=6, rank_pattern={"q_proj": 12, "up_proj": 3}, alpha_pattern={"v_proj": 40}, **LINEAR),
        ln.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], layers_to_transform=[1]),
        ln.LoraConfig(r=3, init_lora_weights="pissa", **LINEAR),
    ],
)
def test_what_is_saved_for_them_says_the_same(tmp_path: Path, config) -> None:
    path = saved(tmp_path / "a", config)
    out = ln.save_for_engines(path, tmp_path / "b")
    content = json.loads((out / "adapter_config.json").read_text())
    assert content["r"] == content["lora_alpha"] in {8, 16}
    assert not content["rank_pattern"]
    assert not content["use_rslora"]
    summary = ln.inspect(out)
    assert summary.engines["vLLM"] == summary.engines["LoRAX"] == summary.engines["SGLang"] == ()
    assert {r for r, _, _ in summary.modules.values()} == {content["r"]}
    assert not summary.warnings
    ids, outputs = token_ids(), []
    for folder in (path, out):
        model = tiny_llama()
        ln.load_adapter(model, folder)
        outputs.append(model(input_ids=ids).logits)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), out)(input_ids=ids).logits
    for found in (outputs[1], theirs):
        assert torch.allclose(found, outputs[0], atol=1e-5)


def test_conv1d_keeps_its_flag(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", ln.LoraConfig(r=4, lora_alpha=12, target_modules=["c_attn"]), tiny_gpt2())
    out = ln.save_for_engines(path, tmp_path / "b")
    assert json.loads((out / "adapter_config.json").read_text())["fan_in_fan_out"]
    assert "c_attn" in ln.inspect(out).engines["SGLang"][0]


@pytest.mark.parametrize("config", [ln.LoraConfig(r=8, use_dora=True, **LINEAR), ln.BottleneckConfig.pfeiffer()])
def test_what_cannot_be_said_in_their_terms(tmp_path: Path, config) -> None:
    path = saved(tmp_path / "a", config)
    with pytest.raises(AdapterFileError, match="erve it here"):
        ln.save_for_engines(path, tmp_path / "b")
    assert not (tmp_path / "b").exists()
