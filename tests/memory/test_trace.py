"""The weightless run, against a real step whose every allocation torch's profiler records, and against the model it was given."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import lora_nb as ln
from lora_nb.fusing import fused
from lora_nb.memory.measured import rise
from lora_nb.memory.trace import trace_memory
from lora_nb.training.loss import loss_sum
from tests.models import VOCABULARY, tiny_bert, tiny_gpt2, tiny_llama, under_peft

LORA = ln.LoraConfig(r=4, lora_alpha=10)
ROWS, LENGTH = 4, 48


@pytest.mark.parametrize("config", [LORA, "full"], ids=["lora", "full"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_it_says_what_a_real_step_takes(make: Callable[[], nn.Module], config: ln.LoraConfig | str) -> None:
    traced = trace_memory(make(), config, batch_size=ROWS, seq_len=LENGTH)
    model = make().train()
    if config == "full":
        model.requires_grad_(requires_grad=True)
    else:
        ln.attach(model, config)
    ids = (torch.arange(ROWS * LENGTH) % (VOCABULARY - 3) + 3).view(ROWS, LENGTH)
    loss_sum(model, ids[:1, :8], ids[:1, :8])  # the head is found once
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def step() -> None:
        (loss_sum(model, ids, ids) / 3).backward()
        optimizer.step()
        optimizer.zero_grad()

    with fused(model):  # as the loop has it
        step()
        rose = rise(step)
    there = sum(traced.parts[name] for name in ("weights", "adapters", "optimizer") if name in traced.parts)
    assert traced.total - there == pytest.approx(rose, rel=0.03)


def test_gpt2_is_traced_with_the_loop_s_own_loss_whatever_its_class_is_called() -> None:
    """Not with all logits, which outweigh everything else here."""
    wide = {"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 1, "vocab_size": 40_000, "n_positions": 64}
    chunked, full = (trace_memory(wide, LORA, batch_size=4, seq_len=64, loss=loss) for loss in ("chunked", "full"))
    assert chunked.parts["logits"] < 0.6 * full.parts["logits"]


def test_the_model_itself_is_left_alone_and_keeps_its_ties() -> None:
    model = tiny_llama(tied=True)
    before = {name: (id(p), p.requires_grad, p.device) for name, p in model.named_parameters()}
    traced = trace_memory(model, LORA, batch_size=1, seq_len=8)
    assert before == {name: (id(p), p.requires_grad, p.device) for name, p in model.named_parameters()}
    assert not hasattr(model, "lora_nb_adapters")
    buffers = sum(b.nbytes for b in model.buffers())
    assert traced.parts["weights"] == sum(p.nbytes for p in model.parameters()) + buffers


def test_an_adapter_of_peft_is_traced_as_it_is() -> None:
    model = under_peft(tiny_llama(), LORA)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    traced = trace_memory(model, "attached", batch_size=2, seq_len=16, loss="full")
    assert traced.parts["adapters"] == sum(p.nbytes for p in model.parameters() if p.requires_grad)


def test_any_architecture_runs_with_inputs_of_its_own() -> None:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
    }
    vit = ViTForImageClassification(ViTConfig(**sizes))
    traced = trace_memory(
        vit, ln.LoraConfig(lora_alpha=3, target_modules=["q_proj"], task_type=None), inputs={"pixel_values": torch.zeros(2, 3, 16, 16)}
    )
    assert traced.parts["activations"] > 0
    assert any("vit.layers.1" in name for name in traced.modules)
    assert trace_memory(tiny_bert(), "full", batch_size=1, seq_len=8).parts["optimizer"] > 0


def test_generation_holds_the_cache() -> None:
    traced = trace_memory(tiny_llama(), batch_size=2, seq_len=20)
    assert traced.parts["KV cache"] == pytest.approx(3 * 2 * 2 * 16 * 20 * 4, rel=0.06)  # layers, keys and values, texts, width, tokens


def test_the_course_of_the_step_has_its_peak_and_its_phases() -> None:
    traced = trace_memory(tiny_llama(), LORA, batch_size=2, seq_len=32)
    assert max(sum(parts.values()) for _, parts in traced.timeline) == traced.total
    phases = [phase for phase, _ in traced.timeline]
    assert list(dict.fromkeys(phases))[-3:] == ["forward", "backward", "optimizer"]
    assert sum(traced.modules.values()) <= traced.total


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: trace_memory("Lama-3.1-8B", LORA), ln.errors.BaseModelError, "Did you mean"),
        (lambda: trace_memory(tiny_llama(), LORA, seq_len=0), ln.errors.ConfigError, "seq_len"),
        (lambda: trace_memory(tiny_llama(), LORA, optimizer="adamw_8bit"), ln.errors.ConfigError, "optimizer"),
        (lambda: trace_memory(tiny_llama(), "lora"), ln.errors.ConfigError, "LoraConfig"),
        (lambda: trace_memory(nn.Linear(3, 4), "full"), ln.errors.ConfigError, "inputs="),
        (lambda: trace_memory({"model_type": "lama"}, LORA), ln.errors.ConfigError, "llama"),
        (lambda: trace_memory(tiny_llama().requires_grad_(requires_grad=False), "attached"), ln.errors.ConfigError, "Nothing"),
        (lambda: trace_memory(tiny_llama(), LORA, inputs={"input_ids": torch.zeros(1, 3, 3)}), ln.errors.TraceError, "LlamaForCausalLM"),
    ],
    ids=map(str, range(8)),
)
def test_what_cannot_be_is_refused_in_words(call: Callable[[], object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call()
