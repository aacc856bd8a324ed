"""Packed rows compute what their documents compute apart, by either way of attention, and models on which they would not are refused."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

import lora_nb as ln
from lora_nb.blocks import Block, collate, documents, pack
from lora_nb.errors import TrainingError
from lora_nb.training.checks import packed_path
from lora_nb.training.loss import loss_sum
from lora_nb.training.packing import NAME, Plan, apart
from tests.models import VOCABULARY, fill, tiny_falcon, tiny_gpt2, tiny_llama
from tests.text import byte_llama, byte_tokenizer

LENGTHS = [3, 9, 5, 12, 4, 7, 6, 2, 11]


def blocks() -> list[Block]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]
    return [Block(ids, [-100, *ids[1:]]) for ids in rows]


def tiny_mistral() -> MistralForCausalLM:
    """Each token sees itself and the three before it."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(vocab_size=VOCABULARY, sliding_window=4, pad_token_id=0, **sizes)).eval()


def gradients(model: nn.Module, way, batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    with way(model):
        loss = loss_sum(model, batch.input_ids, batch.labels, batch.positions)
        loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_mistral], ids=lambda f: f.__name__)
@pytest.mark.parametrize("way", [apart, nullcontext], ids=["by documents", "by a mask"])
def test_a_packed_batch_is_its_documents(make, way) -> None:
    model = make()
    ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6, target_modules="all-linear"))
    fill(model)
    rows = pack(blocks(), 21)
    assert len(rows) < len(LENGTHS) / 2
    expected, whole = gradients(model, nullcontext, collate(blocks(), 0))
    found, parts = gradients(model, way, collate(rows, 0))
    assert found == pytest.approx(expected, rel=1e-5)
    for name, grad in whole.items():
        assert (parts[name] - grad).norm() <= 1e-5 * grad.norm(), name
    mixed, _ = gradients(model, nullcontext, collate([b._replace(positions=()) for b in rows], 0))
    assert abs(mixed - expected) > 1e-3 * expected  # seeing each other would have shown


def test_where_the_tokens_of_documents_go() -> None:
    """Two rows: documents of 2 and 3 tokens, and one of 4 with a token that is alone."""
    plan = Plan.of(torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]))
    assert (plan.documents, plan.longest) == (4, 4)
    assert plan.places.tolist() == [0, 1, 4, 5, 6, 8, 9, 10, 11, 12]
    x = torch.arange(10.0).view(2, 1, 5, 1).requires_grad_()  # (batch, heads, seq, width)
    rows = plan.apart(x)
    assert rows[:, 0, :, 0].tolist() == [[0, 1, 0, 0], [2, 3, 4, 0], [5, 6, 7, 8], [9, 0, 0, 0]]
    assert torch.equal(plan.together(rows.transpose(1, 2), 2), x.transpose(1, 2))
    assert torch.autograd.gradcheck(lambda t: plan.apart(t).sin(), x.detach().double().requires_grad_())
    assert torch.autograd.gradcheck(lambda t: plan.together(t, 2).sin(), rows.transpose(1, 2).detach().double().requires_grad_())


def test_attention_is_the_models_own_again() -> None:
    model = tiny_llama()
    with apart(model):
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with apart(model):
        assert model.config._attn_implementation == "eager"


def test_the_way_is_chosen_by_trying() -> None:
    assert packed_path(tiny_llama(), blocks(), by_document=True) is apart
    assert packed_path(tiny_llama(), blocks(), by_document=False) is nullcontext
    assert packed_path(tiny_gpt2(), blocks(), by_document=True) in {apart, nullcontext}


class Recurrent(nn.Module):
    """Reads a row from left to right, whatever positions say."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.cell, self.head = nn.Embedding(VOCABULARY, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, VOCABULARY)

    def forward(self, input_ids, **_):
        out = type("Out", (), {})()
        out.logits = self.head(self.cell(self.table(input_ids))[0])
        return out


class Positionless(Recurrent):
    def forward(self, input_ids, use_cache=False):
        return super().forward(input_ids)


def test_models_in_which_documents_would_see_each_other_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"documents of a packed row see each other \(losses differ by up to .*packing=False"):
        packed_path(Recurrent(), blocks(), by_document=True)
    with pytest.raises(TrainingError, match=r"takes no position_ids.*packing=False"):
        packed_path(Positionless(), blocks(), by_document=True)
    with pytest.raises(TrainingError, match=r"FalconForCausalLM the documents .* see each other"):  # its attention takes no such mask
        packed_path(tiny_falcon(), blocks(), by_document=True)


def test_a_packed_run_learns_what_an_unpacked_one_does() -> None:
    """One step of all pairs: the same loss and gradient norm; every row of a packed batch is full of text."""
    pairs = ln.dataset([(word, word[::-1] * 3) for word in ("to", "and", "from", "under", "beyond", "through")])
    found = {}
    for packing in (False, True):
        model = byte_llama()
        torch.manual_seed(0)
        ln.attach(model, ln.LoraConfig(r=4, lora_alpha=12))
        size = {"seq_len": 100, "batch_size": 2} if packing else {"seq_len": 100, "batch_size": 6}
        run = ln.train(model, byte_tokenizer(), pairs, ln.TrainConfig(max_steps=3, warmup_steps=0, packing=packing, **size))
        found[packing] = run.losses, run.tokens
    assert found[True][0] == pytest.approx(found[False][0], abs=1e-5)
    assert found[True][1] < found[False][1]


def test_padding_of_a_packed_row_is_no_document_of_its_own() -> None:
    batch = collate([Block([5, 6, 7], [5, 6, 7], [0, 0, 1]), Block([8], [8])], 0)
    assert batch.positions.tolist() == [[0, 0, 1], [0, 1, 2]]
    assert documents(batch.positions)[1, 0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
