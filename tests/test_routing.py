"""`rows`: whole models, every kind of adapter, each row its own; nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_nb as ln
from lora_nb.attach import adapters, layers
from lora_nb.errors import AdapterError, ConfigError
from tests.models import fill, tiny_bert, tiny_falcon, tiny_gpt2, tiny_llama, token_ids
from tests.text import byte_llama, byte_tokenizer

LINEAR = {"lora_alpha": 6, "target_modules": "all-linear"}
KINDS = {
    "small": ln.LoraConfig(r=2, **LINEAR),
    "queries": ln.LoraConfig(r=5, lora_alpha=12, target_modules=["q_proj", "v_proj"]),
    "scaled": ln.LoraConfig(r=8, use_rslora=True, **LINEAR),
    "dora": ln.LoraConfig(r=3, use_dora=True, **LINEAR),
    "embedding": ln.LoraConfig(r=3, lora_alpha=9, target_modules=["embed_tokens", "o_proj"]),
    "bias": ln.LoraConfig(r=3, lora_bias=True, **LINEAR),
    "pissa": ln.LoraConfig(r=3, init_lora_weights="pissa", **LINEAR),
    "head": ln.LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tokens": ln.LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj"], trainable_token_indices=[5, 7]),
    "houlsby": ln.BottleneckConfig.houlsby(),
    "pfeiffer": ln.BottleneckConfig.pfeiffer(),
    "parallel": ln.BottleneckConfig.parallel(),
}


def many(model: nn.Module, kinds: dict[str, ln.LoraConfig | ln.BottleneckConfig]) -> nn.Module:
    """The model with an adapter of each kind, as if each were trained."""
    generator = torch.Generator().manual_seed(3)
    for name, config in kinds.items():
        ln.attach(model, config, name)
        for p in ln.parameters(model, name).values():
            with torch.no_grad():
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


def alone(model: nn.Module, ids: torch.Tensor, names: list[str | None]) -> torch.Tensor:
    out = []
    for row, name in zip(ids, names, strict=True):
        ln.set_active(model, [] if name is None else name)
        out.append(logits(model, row[None]))
    return torch.cat(out)


@torch.no_grad()
def test_every_kind_in_one_batch() -> None:
    model = many(tiny_llama(), KINDS)
    names = [*KINDS, None, *reversed(KINDS), None]
    ids = token_ids(len(names), 7)
    expected = alone(model, ids, names)
    with ln.rows(model, names):
        found = logits(model, ids)
    assert (found - expected).abs().max() < 1e-5
    assert (expected - alone(model, ids, [None] * len(names))).abs().amax((1, 2))[: len(KINDS)].min() > 1e-3


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_falcon, tiny_bert])
@torch.no_grad()
def test_other_architectures(make) -> None:
    biased = {} if make is tiny_falcon else {"biased": ln.LoraConfig(r=4, bias="all", **LINEAR)}
    kinds = {"small": KINDS["small"], "large": ln.LoraConfig(r=7, **LINEAR), "dora": KINDS["dora"], **biased, "houlsby": KINDS["houlsby"]}
    model = many(make(), kinds)
    names = [None, *kinds, "small"]
    ids = token_ids(len(names), 6)
    expected = alone(model, ids, names)
    with ln.rows(model, names):
        assert (logits(model, ids) - expected).abs().max() < 1e-5


def test_what_is_beneath_does_not_matter() -> None:
    """Here a frozen linear of another class."""

    class Other(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    torch.manual_seed(0)
    model = nn.Sequential(Other(8, 8))
    for i, name in enumerate("ab"):
        ln.attach(model, ln.LoraConfig(r=2, lora_alpha=5, target_modules=["0"]), name)
        fill(model, name, seed=i)
    x = torch.randn(2, 8)
    with ln.rows(model, ["a", "b"]):
        y = model(x)
    for i, name in enumerate("ab"):
        ln.set_active(model, name)
        assert torch.allclose(y[i], model(x[i : i + 1])[0], atol=1e-6)


@torch.no_grad()
def test_a_base_in_four_bits() -> None:
    model = tiny_llama()
    ln.quantize(model, ln.QuantConfig())
    model = many(model, {k: KINDS[k] for k in ("small", "scaled", "houlsby")})
    names, ids = ["scaled", None, "small", "houlsby", "small"], token_ids(5, 7)
    expected = alone(model, ids, names)
    with ln.rows(model, names):
        assert (logits(model, ids) - expected).abs().max() < 1e-5


def test_gradients_of_one_step_for_several_adapters() -> None:
    kinds = {k: KINDS[k] for k in ("small", "queries", "dora", "houlsby")}
    model = many(tiny_llama(), kinds)
    names, ids = [*kinds, None], token_ids(5, 7)
    grads: list[dict[str, torch.Tensor]] = []
    for mixed in (True, False):
        model.zero_grad()
        for _, layer in layers(model):
            layer.adapters.requires_grad_(requires_grad=True)
        if mixed:
            with ln.rows(model, names):
                model(input_ids=ids, labels=ids).loss.backward()
        else:
            for i, name in enumerate(names[:-1]):
                for _, layer in layers(model):
                    layer.active = (name,) if name in layer.adapters else ()
                (model(input_ids=ids[i : i + 1], labels=ids[i : i + 1]).loss / len(names)).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, g in grads[1].items():
        assert torch.allclose(grads[0][name], g, atol=1e-6), name


def test_afterwards_everything_is_as_before() -> None:
    model = many(tiny_llama(), {k: KINDS[k] for k in ("small", "dora")})
    ids = token_ids()
    before = logits(model, ids)
    with pytest.raises(AdapterError), ln.rows(model, ["small", None]):
        logits(model, ids[:1])
    assert torch.equal(logits(model, ids), before)
    assert adapters(model).active == ("dora",)
    assert all(layer.routing is None for _, layer in layers(model))
    with ln.rows(model, ["small", None]), ln.rows(model, [None, "small"]):
        pass
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["small", "smal"], r"no adapter 'smal'\. Did you mean 'small'"),
        ([], "No row is named"),
        ([3], "no adapter 3"),
        ("smal", "no adapter"),
    ],
)
def test_names_that_are_not_there(names, words: str) -> None:
    model = many(tiny_llama(), {"small": KINDS["small"]})
    with pytest.raises(AdapterError, match=words), ln.rows(model, names):
        pass
    with pytest.raises(AdapterError, match="None is attached"), ln.rows(tiny_llama(), ["a"]):
        pass


def test_generate_with_an_adapter_for_each_prompt() -> None:
    model, tokenizer = byte_llama(), byte_tokenizer()
    for i, name in enumerate(("one", "two")):
        ln.attach(model, ln.LoraConfig(r=4, lora_alpha=12), name)
        fill(model, name, seed=i)
    prompts, names = ["a", "a much longer prompt", "a", "ça va"], ["one", None, "two", "one"]
    together = ln.generate(model, tokenizer, prompts, adapter=names, max_new_tokens=10)
    with ln.disabled(model):
        singly = [ln.generate(model, tokenizer, p, adapter=name, max_new_tokens=10) for p, name in zip(prompts, names, strict=True)]
    assert together == singly
    assert together[0] != together[2]
    assert ln.generate(model, tokenizer, "a", adapter=["two"], max_new_tokens=10) == together[2]
    with pytest.raises(ConfigError, match="2 adapters for 3 prompts"):
        ln.generate(model, tokenizer, ["a"] * 3, adapter=["one", "two"])


def test_a_copy_of_a_whole_module_keeps_its_keys_once() -> None:
    model, tokenizer = byte_llama(), byte_tokenizer()
    whole = ln.LoraConfig(r=4, lora_alpha=12, target_modules=["up_proj"], modules_to_save=["self_attn"])
    model = many(model, {"whole": whole, "small": KINDS["small"]})
    names, prompts = ["whole", None, "small"], ["a", "b", "ça va"]
    together = ln.generate(model, tokenizer, prompts, adapter=names, max_new_tokens=8)
    with ln.disabled(model):
        assert together == [ln.generate(model, tokenizer, p, adapter=n, max_new_tokens=8) for p, n in zip(prompts, names, strict=True)]
