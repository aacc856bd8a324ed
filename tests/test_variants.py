"""Variants of a model side by side: what they compute, what they share, and that the model itself stays as it is."""

import pytest
import torch

from lora_nb.attach import adapters, attach, disabled, set_active
from lora_nb.configs import BottleneckConfig, LoraConfig, QuantConfig
from lora_nb.errors import LatencyError, TargetError
from lora_nb.layers.adapted import AdaptedLayer
from lora_nb.layers.linear4bit import is_quantized
from lora_nb.merge import merge
from lora_nb.variants import sharing, variants
from tests.models import fill, tiny_gpt2, tiny_llama, token_ids

CONFIG = LoraConfig(r=4, lora_alpha=6)
IDS = token_ids()


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


def test_base_unmerged_and_merged_compute_what_their_names_say() -> None:
    model = tiny_llama()
    attach(model, CONFIG, "one")
    attach(model, LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"]), "two")
    for seed, name in enumerate(("one", "two")):
        fill(model, name, seed)
    made = variants(model)
    assert list(made) == ["base", "one", "one, merged", "two", "two, merged"]
    with disabled(model):
        assert torch.equal(logits(made["base"]), logits(model))
    for name in ("one", "two"):
        set_active(model, name)
        assert torch.equal(logits(made[name]), logits(model))
        assert torch.allclose(logits(made[f"{name}, merged"]), logits(model), atol=1e-5)
        assert not torch.allclose(logits(made["base"]), logits(model), atol=1e-4)
        assert not any(isinstance(m, AdaptedLayer) for m in made[f"{name}, merged"].modules())


def test_weights_are_shared_and_the_model_is_left_alone() -> None:
    model = tiny_gpt2().train()
    attach(model, CONFIG, "tone")
    before = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    made = variants(model, {"DoRA": LoraConfig(r=4, lora_alpha=6, use_dora=True)})
    assert {n: (p, p.requires_grad) for n, p in model.named_parameters()} == before
    assert model.training
    assert list(adapters(model).reports) == ["tone"]
    for name in ("base", "tone", "DoRA"):
        assert not made[name].training
        for n, p in made[name].named_parameters():
            if n in before:
                assert p is not before[n][0]
                assert p.data_ptr() == before[n][0].data_ptr()
    assert made["base"].transformer.wte.weight is made["base"].lm_head.weight  # still tied


def test_further_configs_stand_on_the_bare_base() -> None:
    model = tiny_llama()
    attach(model, CONFIG)
    fill(model)
    made = variants(model, {"Houlsby": BottleneckConfig.houlsby(), "LoRA": LoraConfig(r=2, lora_alpha=3, target_modules=["v_proj"])})
    assert list(made) == ["base", "default", "default, merged", "Houlsby", "LoRA", "LoRA, merged"]  # no weight takes a bottleneck in
    assert len([m for m in made["LoRA"].modules() if isinstance(m, AdaptedLayer)]) == 3
    assert torch.equal(logits(made["LoRA"]), logits(made["base"]))  # untrained


def test_a_base_in_four_bits_stands_beside_the_whole_one() -> None:
    model = tiny_llama()
    made = variants(model, {"NF4": QuantConfig(), "LoRA": CONFIG})
    assert list(made) == ["base", "NF4", "LoRA", "LoRA, merged"]
    assert is_quantized(made["NF4"].model.layers[0].mlp.up_proj)
    assert not is_quantized(model.model.layers[0].mlp.up_proj)
    assert torch.equal(logits(made["base"]), logits(model))
    assert 0 < float((logits(made["NF4"]) - logits(model)).norm() / logits(model).norm()) < 0.5
    on_top = variants(made["NF4"], {"QLoRA": CONFIG})
    assert torch.equal(logits(on_top["QLoRA"]), logits(made["NF4"]))
    assert not is_quantized(on_top["QLoRA, merged"].model.layers[0].mlp.up_proj)


def test_a_copy_that_trains_does_not_change_what_the_model_trains() -> None:
    model = tiny_llama()
    twin = sharing(model)
    attach(twin, CONFIG)
    assert all(p.requires_grad for p in model.parameters())
    assert not adapters(model).reports


def test_what_cannot_be_told_apart_is_refused() -> None:
    model = tiny_llama()
    attach(model, CONFIG, "tone")
    with pytest.raises(LatencyError, match="'tone' is there already"):
        variants(model, {"tone": CONFIG})
    with pytest.raises(LatencyError, match="'base' is there already"):
        variants(model, {"base": CONFIG})
    with pytest.raises(TargetError, match="q_prj"):
        variants(model, {"x": LoraConfig(target_modules=["q_prj"])})
    merge(model)
    with pytest.raises(LatencyError, match="unmerge"):
        variants(model)
