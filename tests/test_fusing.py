"""Fused blocks change nothing but time and memory, are there while training and only then, and give way where they do not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP

import lora_nb as ln
from lora_nb import fusing
from lora_nb.fusing import FORWARDS, MANY, agrees, fused
from lora_nb.layers import fused as layers
from lora_nb.layers import lora_gpu
from tests.models import VOCABULARY, fill, tiny_gpt2, tiny_llama, token_ids
from tests.text import byte_llama, byte_tokenizer

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
MODELS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "llama": (lambda: tiny_llama(positions=128, initializer_range=0.2), {"RmsNorm", "GatedMlp", "RotatedQkv"}),
    "llama with biases": (lambda: tiny_llama(positions=128, attention_bias=True, mlp_bias=True), {"RmsNorm", "GatedMlp", "RotatedQkv"}),
    "mistral": (lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=20)), {"RmsNorm", "GatedMlp", "RotatedQkv"}),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)), {"RmsNorm", "GatedMlp", "RotatedQkv"}),
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)), {"RmsNorm", "GatedMlp"}),
    "gpt2": (tiny_gpt2, set()),
}


def adapted(kind: str = "llama", **settings: Any) -> Any:
    torch.manual_seed(0)
    model = MODELS[kind][0]()
    if kind == "gpt2":
        settings |= {"target_modules": "all-linear"}
    ln.attach(model, ln.LoraConfig(r=4, lora_alpha=12, **settings))
    fill(model)
    return model.train()


def outcome(model: Any, ids: Tensor | None = None, **inputs: Any) -> dict[str, Tensor]:
    """Loss, and the gradients of the adapter by name."""
    ids = token_ids(4, 40) if ids is None else ids
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(input_ids=ids, labels=ids, use_cache=False, **inputs).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in ln.parameters(model).items()}}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


def uses(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the fused functions that run from now on."""
    seen: set[str] = set()
    for name in ("RmsNorm", "GatedMlp", "RotatedQkv"):
        function = getattr(layers, name)

        def apply(*args: Any, name: str = name, function: Any = function) -> Any:
            seen.add(name)
            return function.apply(*args)

        monkeypatch.setattr(fusing, name, type(name, (), {"apply": staticmethod(apply)}))
    return seen


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_those_of_the_model_as_it_is(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(kind)
    plain, seen = outcome(model), uses(monkeypatch)
    with fused(model):
        assert_same(outcome(model), plain)
    assert seen == MODELS[kind][1]
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_rows_and_padding_are_seen_alike(attention: str) -> None:
    model = adapted()
    model.set_attn_implementation(attention)
    positions = torch.cat([torch.arange(15), torch.arange(25)]).expand(4, 40)
    mask = torch.ones(4, 40, dtype=torch.long)
    mask[1, 30:] = 0
    for inputs in ({"position_ids": positions}, {"attention_mask": mask}):
        plain = outcome(model, **inputs)
        with fused(model):
            assert_same(outcome(model, **inputs), plain)


def test_checkpointing_changes_no_gradient() -> None:
    model = adapted()
    with fused(model):
        plain = outcome(model)
        model.activation_checkpointing_enable({"use_reentrant": False})
        assert_same(outcome(model), plain)


def only_some(model: Any) -> None:
    ln.detach(model)
    ln.attach(model, ln.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"]))
    fill(model)


def two_act(model: Any) -> None:
    ln.attach(model, ln.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "up_proj"]), "second")
    fill(model, "second", seed=1)
    ln.set_active(model, ["default", "second"])


def with_a_hook(model: Any) -> None:
    model.get_submodule("model.layers.1.self_attn.k_proj").register_forward_hook(lambda _m, _i, y: y * 1.5)
    model.get_submodule("model.layers.1.mlp.act_fn").register_forward_hook(lambda _m, _i, y: y * 0.5)


def base_trains(model: Any) -> None:
    model.get_submodule("model.layers.0.mlp.up_proj").weight.requires_grad_()
    model.get_submodule("model.layers.1.input_layernorm").weight.requires_grad_()


def with_dora(model: Any) -> None:
    ln.detach(model)
    ln.attach(model, ln.LoraConfig(r=4, lora_alpha=12, use_dora=True))
    fill(model)


def with_dropout(model: Any) -> None:
    ln.detach(model)
    ln.attach(model, ln.LoraConfig(r=4, lora_alpha=12, lora_dropout=0.3))
    fill(model)


CHANGES = [only_some, two_act, with_a_hook, base_trains, with_dora, with_dropout, lambda model: model.to(torch.float64)]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_whatever_else_is_on_the_model_is_heeded(change: Callable[[Any], object]) -> None:
    model = adapted()
    change(model)
    plain = outcome(model)
    with fused(model):
        assert_same(outcome(model), plain)


def test_in_a_mixed_batch_each_row_keeps_its_own() -> None:
    model, names = adapted(), ["default", None, "default", None]
    with ln.rows(model, names):
        plain = model(input_ids=token_ids(4, 40)).logits
        with fused(model):
            torch.testing.assert_close(model(input_ids=token_ids(4, 40)).logits, plain)


def test_disabled_is_the_base() -> None:
    model, ids = adapted(), token_ids(4, 40)
    with fused(model), ln.disabled(model):
        ours = model(inputs_embeds=model.get_input_embeddings()(ids).requires_grad_()).logits
    ln.detach(model)
    torch.testing.assert_close(ours, model(input_ids=ids).logits)


def test_without_gradients_or_with_few_tokens_the_models_own_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = adapted(), uses(monkeypatch)
    with fused(model):
        with torch.no_grad():
            model(input_ids=token_ids(4, 40))
            model.generate(token_ids(1, 5), max_new_tokens=3, do_sample=False)
        model(input_ids=token_ids(1, MANY - 1))
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=token_ids(4, 40))
        assert not seen
        model(input_ids=token_ids(1, MANY), use_cache=True)  # a cache holds keys as the model's own code turns them
        assert seen == {"RmsNorm", "GatedMlp"}


def test_over_four_bits_training_in_16_bits_goes_the_way_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU taken for one: the losses stay, and every adapted layer goes that way, also when blocks are computed again."""
    calls: list[Any] = []
    plain = fusing.over_four_bits
    monkeypatch.setattr(fusing, "over_four_bits", lambda *given: calls.append(given[1]) or plain(*given))

    def losses(**changes: Any) -> list[float]:
        model = byte_llama()
        ln.quantize(model, ln.QuantConfig(compute_dtype=torch.bfloat16))
        torch.manual_seed(0)
        ln.attach(model, ln.LoraConfig(r=4, lora_alpha=12, target_modules="all-linear"))
        pairs = ln.dataset([("to", "and"), ("from", "under")] * 4)
        config = ln.TrainConfig(max_steps=3, batch_size=4, seq_len=64, learning_rate=1e-2, precision="bf16", **changes)
        return ln.train(model, byte_tokenizer(), pairs, config).losses

    expected = losses()
    assert not calls
    monkeypatch.setattr(lora_gpu, "DEVICES", {"cpu"})
    assert losses() == pytest.approx(expected, rel=1e-2)
    once = len(calls)
    assert once == 3 * len({w.packed.data_ptr() for w in calls})
    assert losses(gradient_checkpointing=True) == pytest.approx(expected, rel=1e-2)
    assert len(calls) == 3 * once


def test_a_copy_made_meanwhile_works_by_itself() -> None:
    model = adapted()
    with fused(model):
        other = copy.deepcopy(model)
    plain = outcome(model)
    fill(model, seed=5)
    assert_same(outcome(other), plain)


def test_inside_out_and_after_an_error_the_forwards_are_the_classes_own() -> None:
    model = adapted()
    with pytest.raises(ZeroDivisionError), fused(model), fused(model):
        raise ZeroDivisionError
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("name", FORWARDS)
def test_every_known_class_is_as_it_is_known(name: str) -> None:
    family = name.removesuffix("RMSNorm").removesuffix("MLP").removesuffix("Attention")
    home = __import__(f"transformers.models.{family.lower()}.modeling_{family.lower()}", fromlist=["x"])
    assert agrees(getattr(home, name), FORWARDS[name])


def test_a_class_that_computes_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    Other.__name__, Other.__module__ = "LlamaMLP", modeling_llama.__name__
    monkeypatch.setattr(modeling_llama, "LlamaMLP", Other)
    assert fusing.known(Other(LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2))) is None

    class Mine(nn.Module):
        pass

    Mine.__name__ = "LlamaMLP"
    assert fusing.known(Mine()) is None
