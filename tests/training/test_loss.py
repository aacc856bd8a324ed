"""The loss is the mean cross-entropy that everyone else computes, and padding has no part in it."""

from __future__ import annotations

import math

import torch

import lora_nb as ln
from lora_nb.blocks import IGNORE, batches
from lora_nb.training.loss import token_losses
from tests.text import PAD, byte_llama, byte_tokenizer

PAIRS = [("a", "b"), ("a longer prompt", "yes"), ("short", "a completion of many letters"), ("é", "ü")]


def rows() -> list:
    return ln.dataset(PAIRS).encode(byte_tokenizer(), 64)


def test_token_losses_by_hand() -> None:
    model = byte_llama()
    ids = torch.tensor([[1, 40, 50, 60], [1, 41, 51, PAD]])
    labels = torch.tensor([[IGNORE, IGNORE, 50, 60], [IGNORE, 41, IGNORE, IGNORE]])
    losses, logits, goals = token_losses(model, ids, labels)
    scores = model(ids).logits.detach().double()

    def nats(row: int, place: int, token: int) -> float:
        """Of a token, from the scores at the place before it."""
        before = scores[row, place - 1]
        return math.log(sum(math.exp(s) for s in before)) - float(before[token])

    assert goals.tolist() == [50, 60, 41]
    assert logits.shape == (3, 259)
    torch.testing.assert_close(losses.double(), torch.tensor([nats(0, 2, 50), nats(0, 3, 60), nats(1, 1, 41)]).double(), rtol=0, atol=1e-5)


def test_token_losses_are_transformers_own() -> None:
    model = byte_llama()
    for ids, labels in batches(rows(), 3, PAD, range(4)):
        theirs = model(input_ids=ids, attention_mask=(ids != PAD).long(), labels=labels).loss
        torch.testing.assert_close(token_losses(model, ids, labels)[0].mean(), theirs, rtol=0, atol=1e-6)


def test_padding_changes_nothing() -> None:
    model, blocks = byte_llama(), rows()
    ((ids, labels),) = batches(blocks, len(blocks), PAD, range(len(blocks)))
    assert (ids == PAD).any()
    alone = torch.cat([token_losses(model, torch.tensor([b.input_ids]), torch.tensor([b.labels]))[0] for b in blocks])
    torch.testing.assert_close(token_losses(model, ids, labels)[0], alone, rtol=0, atol=1e-5)


def test_losses_are_fp32_over_a_16_bit_model() -> None:
    model = byte_llama().to(torch.bfloat16)
    ((ids, labels),) = batches(rows(), 4, PAD, range(4))
    losses, logits, goals = token_losses(model, ids, labels)
    assert losses.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(losses, logits.logsumexp(-1) - logits.gather(1, goals[:, None])[:, 0])
