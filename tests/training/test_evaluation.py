"""Evaluation counts what others count, says of greedy decoding what greedy decoding does, and leaves no trace."""

from __future__ import annotations

import math

import pytest
import torch

import lora_nb as ln
from lora_nb.blocks import IGNORE, Block
from lora_nb.errors import DatasetError
from tests.text import byte_llama, byte_tokenizer

PAIRS = ln.dataset([("a", "b"), ("a longer prompt", "yes"), ("short", "a completion of many letters"), ("é", "ü"), ("one", "eins")])
TEXT = "Füße 👣 in the café: ça va — naïve. " * 6


def summed(model, blocks: list[Block]) -> tuple[float, int]:
    """Nats and tokens of each row alone, from transformers' own loss."""
    nats, tokens = 0.0, 0
    for block in blocks:
        count = sum(label != IGNORE for label in block.labels[1:])
        nats += float(model(torch.tensor([block.input_ids]), labels=torch.tensor([block.labels])).loss.detach()) * count
        tokens += count
    return nats, tokens


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_loss_and_perplexity(bos: bool, batch_size: int) -> None:
    model, tokenizer = byte_llama(), byte_tokenizer(bos=bos)
    nats, tokens = summed(model, PAIRS.encode(tokenizer, 64))
    seen = ln.evaluate(model, tokenizer, PAIRS, seq_len=64, batch_size=batch_size)
    assert (seen.tokens, seen.examples) == (tokens, 5)
    assert seen.loss == pytest.approx(nats / tokens, rel=1e-5)
    assert seen.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    letters = sum(len(f" {c}".encode()) for c in PAIRS.completions)
    assert seen.bits_per_byte == pytest.approx(nats / math.log(2) / letters, rel=1e-5)


def test_bits_per_byte_of_text_whose_characters_are_cut_between_blocks() -> None:
    model, tokenizer = byte_llama(), byte_tokenizer()
    data = ln.dataset([TEXT])
    blocks = data.encode(tokenizer, 8)
    assert any("\ufffd" in tokenizer.decode(b.labels[1:]) for b in blocks)
    nats, tokens = summed(model, blocks)
    seen = ln.evaluate(model, tokenizer, data, seq_len=8)
    assert seen.tokens == tokens == len(TEXT.encode()) + 1  # and the token that ends it, which has no bytes
    assert seen.bits_per_byte == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-5)


def test_token_accuracy_and_max_blocks() -> None:
    model, tokenizer = byte_llama(), byte_tokenizer()
    blocks = PAIRS.encode(tokenizer, 64)
    hits = []
    for block in blocks:
        guesses = model(torch.tensor([block.input_ids])).logits[0].argmax(-1).tolist()
        # The last three labels, all that the first pair has, are made to be what the model guesses.
        block.labels[-3:] = guesses[-4:-1]
        hits.append([guess == label for guess, label in zip(guesses, block.labels[1:], strict=False) if label != IGNORE])
    seen = ln.evaluate(model, tokenizer, ln.dataset(blocks))
    assert seen.token_accuracy == pytest.approx(sum(map(sum, hits)) / sum(map(len, hits)))
    assert 0 < seen.token_accuracy < 1
    assert seen.exact_match == pytest.approx(sum(map(all, hits)) / len(hits))
    assert 0 < seen.exact_match < 1
    first = ln.evaluate(model, tokenizer, ln.dataset(blocks), max_blocks=2)
    assert (first.examples, first.tokens) == (2, len(hits[0]) + len(hits[1]))


def test_exact_match_is_what_greedy_decoding_gets_right() -> None:
    model, tokenizer = byte_llama(), byte_tokenizer()
    known = [(word, str(len(word))) for word in ("to", "and", "from", "under", "beyond", "through")]
    data = ln.dataset([*known, ("never", "x"), ("seen", "y"), ("before", "z"), ("this", "w")])
    ln.attach(model, ln.LoraConfig(r=8, lora_alpha=16))
    ln.train(model, tokenizer, data[:6], ln.TrainConfig(max_steps=60, learning_rate=1e-2, warmup_steps=0, seq_len=32))
    written = ln.generate(model, tokenizer, data.prompts, max_new_tokens=8)
    right = sum(text == completion for text, completion in zip(written, data.completions, strict=True)) / len(data)
    assert 0.3 <= right < 1
    assert ln.evaluate(model, tokenizer, data).exact_match == pytest.approx(right)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_mode_and_gradients_alone(training: bool) -> None:
    model, tokenizer = byte_llama(dropout=0.5), byte_tokenizer()
    ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6, lora_dropout=0.5))
    model.train(training)
    for p in ln.parameters(model).values():
        p.grad = torch.full_like(p, 7.0)
    state = torch.get_rng_state()
    first, second = (ln.evaluate(model, tokenizer, PAIRS) for _ in range(2))
    assert first == second  # no dropout
    assert {m.training for m in model.modules()} == {training}
    assert all(p.requires_grad and bool((p.grad == 7).all()) for p in ln.parameters(model).values())
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_puts_the_mode_back_when_it_fails() -> None:
    model = byte_llama().train()
    with pytest.raises(IndexError):
        ln.evaluate(model, byte_tokenizer(), ln.dataset([Block([1, 9999], [IGNORE, 5])]))
    assert model.training


def test_nothing_to_count() -> None:
    model, tokenizer = byte_llama(), byte_tokenizer()
    for data, blocks in ((PAIRS, 0), (ln.dataset([Block([1, 5], [IGNORE, IGNORE])]), None)):
        with pytest.raises(DatasetError, match="not one token to predict"):
            ln.evaluate(model, tokenizer, data, max_blocks=blocks)


def test_how_an_evaluation_looks() -> None:
    seen = ln.Evaluation(2.0, math.exp(2), 1.25, 0.5, 0.125, 12345, 8)
    for form in (repr(seen), seen._repr_html_()):
        for part in ("2.0000", "7.39", "1.250", "50.0 %", "12.5 %", "12,345"):
            assert part in form
    assert seen._repr_html_().startswith("<table>")
