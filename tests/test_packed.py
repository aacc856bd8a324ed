"""Packed rows give the logits that each gives alone, with keys kept or not, whatever lies beside it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_nb as ln
from lora_nb.errors import BaseModelError
from lora_nb.packed import STEP, KeyValues, Pass, Row, check_model, forward
from tests.models import fill, tiny_falcon, tiny_gpt2, tiny_llama, token_ids


def adapted(make=tiny_llama) -> nn.Module:
    model = make()
    for i, (name, r) in enumerate({"a": 2, "b": 5}.items()):
        ln.attach(model, ln.LoraConfig(r=r, lora_alpha=12, target_modules="all-linear"), name)
        fill(model, name, seed=i)
    ln.set_active(model, [])
    return model


def alone(model: nn.Module, ids: list[int], name: str | None) -> torch.Tensor:
    ln.set_active(model, [] if name is None else name)
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    ln.set_active(model, [])
    return logits


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@torch.no_grad()
def test_texts_begin_go_on_and_train_side_by_side(make) -> None:
    model, texts = adapted(make), token_ids(4, 12).tolist()
    kept = KeyValues(3)
    began = forward(model, Pass([Row("a", texts[0][:5], 1), Row(None, texts[1][:2], 0)], kept))
    assert torch.allclose(began[0], alone(model, texts[0], "a")[4:5], atol=1e-5)
    assert torch.allclose(began[1], alone(model, texts[1], None)[1:2], atol=1e-5)
    rows = [
        Row("b", texts[3], wanted=range(12)),
        Row(None, texts[1][2:3], 0, 2),
        Row("b", texts[2][:7], 2),
        Row("a", texts[0][5:6], 1, 5),
        Row("a", texts[3][:4], wanted=[1, 3]),
    ]
    found = forward(model, Pass(rows, kept))
    expected = [
        alone(model, texts[3], "b"),
        alone(model, texts[1], None)[2:3],
        alone(model, texts[2], "b")[6:7],
        alone(model, texts[0], "a")[5:6],
        alone(model, texts[3], "a")[[1, 3]],
    ]
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert torch.allclose(f, e, atol=1e-5), i


@torch.no_grad()
def test_slots_move_and_room_grows() -> None:
    model, text = adapted(), token_ids(1, 60).tolist()[0]
    kept = KeyValues(3)
    forward(model, Pass([Row("a", text[:30], 2), Row("b", text[:3], 0)], kept))
    assert kept.room == STEP
    kept.move(2, 1, 30)
    assert torch.allclose(forward(model, Pass([Row("a", text[30:31], 1, 30)], kept))[0], alone(model, text, "a")[30:31], atol=1e-5)
    for i in range(31, 40):
        found = forward(model, Pass([Row("a", text[i : i + 1], 1, i), Row(None, text[: STEP + i - 40], 2)], kept))
        assert torch.allclose(found[0], alone(model, text, "a")[i : i + 1], atol=1e-5)
    kept.grow(STEP + 1)
    assert kept.room == 2 * STEP
    assert torch.allclose(forward(model, Pass([Row("a", text[40:41], 1, 40)], kept))[0], alone(model, text, "a")[40:41], atol=1e-5)
    assert kept.bytes == 2 * 3 * 3 * 2 * kept.room * 8 * 4  # tables, layers, slots, heads, positions, size, bytes


@torch.no_grad()
def test_a_cleared_slot_harms_nobody() -> None:
    model, text = adapted(), token_ids(1, 12).tolist()[0]
    kept = KeyValues(2)
    forward(model, Pass([Row("a", text[:5], 0), Row("b", text[:9], 1)], kept))
    kept.layers[0][1][0, :, 3:] = torch.inf
    kept.clear(0)
    forward(model, Pass([Row("a", text[:2], 0)], kept))
    found = forward(model, Pass([Row("a", text[2:3], 0, 2), Row("b", text[9:10], 1, 9)], kept))
    assert torch.allclose(found[0], alone(model, text, "a")[2:3], atol=1e-5)


def test_gradients_of_a_row_that_trains_are_those_of_training_alone() -> None:
    model, texts = adapted(), token_ids(4, 12).tolist()
    kept = KeyValues(2)
    with torch.no_grad():
        forward(model, Pass([Row("b", texts[0][:5], 0), Row(None, texts[1][:3], 1)], kept))
    serving = [Row("b", texts[0][5:6], 0, 5), Row(None, texts[1][3:4], 1, 3)]
    training = [Row("a", texts[2], wanted=range(11)), Row("a", texts[3][:6], wanted=range(5))]
    grads = []
    for beside in (True, False):
        ln.set_active(model, "a")
        model.zero_grad()
        if beside:
            with ln.disabled(model):
                logits = forward(model, Pass([*serving, *training], kept))[2:]
        else:
            logits = [model(input_ids=torch.tensor([row.ids])).logits[0][list(row.wanted)] for row in training]
        loss = sum(nn.functional.cross_entropy(z, torch.tensor(r.ids[1:]), reduction="sum") for z, r in zip(logits, training, strict=True))
        loss.backward()
        grads.append({n: p.grad.clone() for n, p in ln.parameters(model, "a").items()})
        assert all(p.grad is None for p in ln.parameters(model, "b").values())
    for name, g in grads[1].items():
        assert torch.allclose(grads[0][name], g, atol=1e-5 * max(1.0, float(g.abs().max()))), name


def test_models_that_cannot_be_packed_are_refused() -> None:
    check_model(tiny_llama())
    check_model(tiny_gpt2())
    with pytest.raises(BaseModelError, match="computes attention by itself"):
        check_model(tiny_falcon())
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    windowed = MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=2, sliding_window=4))
    with pytest.raises(BaseModelError, match="needs sliding_window"):
        check_model(windowed.eval())
    check_model(MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=2, sliding_window=None)).eval())
