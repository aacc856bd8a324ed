"""Text comes from the likeliest token, or from a seed; nothing else of the model or of the process changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_nb as ln
from lora_nb.attach import adapters
from lora_nb.errors import AdapterError, ConfigError
from tests.models import fill
from tests.text import BOS, EOS, PAD, byte_llama, byte_tokenizer

TOKENIZER = byte_tokenizer()
PROMPTS = ["a", "a much longer prompt, of many letters", "ça va", ""]
LORA = ln.LoraConfig(r=4, lora_alpha=12)


@pytest.fixture
def model():
    """Two adapters, `one` and `two`, of which `two` is active."""
    model = byte_llama()
    for i, name in enumerate(("one", "two")):
        ln.attach(model, LORA, name)
        fill(model, name, seed=i)
    return model


def likeliest(model: nn.Module, prompt: str, count: int, tokenizer=TOKENIZER) -> list[int]:
    """Greedy decoding by hand, without a cache."""
    ids = [BOS, *tokenizer(prompt)["input_ids"]]
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == EOS:
                break
    return ids[-count:]


def said(tokens: list[int], tokenizer=TOKENIZER) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_temperature_0_is_the_likeliest_token(model: nn.Module) -> None:
    for prompt in PROMPTS[:3]:
        assert ln.generate(model, TOKENIZER, prompt, max_new_tokens=8) == said(likeliest(model, prompt, 8))


def test_a_batch_of_unequal_prompts_is_each_of_them_alone(model: nn.Module) -> None:
    alone = [ln.generate(model, TOKENIZER, prompt, max_new_tokens=10) for prompt in PROMPTS]
    assert ln.generate(model, TOKENIZER, PROMPTS, max_new_tokens=10) == alone
    assert ln.generate(model, TOKENIZER, tuple(PROMPTS), max_new_tokens=10) == alone
    assert ln.generate(model, TOKENIZER, PROMPTS[:1], max_new_tokens=10) == alone[:1]
    assert len(set(alone)) == len(alone)
    assert all(isinstance(text, str) for text in alone)


def test_by_name_active_or_disabled(model: nn.Module) -> None:
    def write(adapter: str | None = None) -> list[str]:
        return ln.generate(model, TOKENIZER, PROMPTS[:2], adapter=adapter, max_new_tokens=8)

    one, two, active = write("one"), write("two"), write()
    with ln.disabled(model):
        base = write()
        assert write("one") == one
    assert active == two
    assert base == ln.generate(byte_llama(), TOKENIZER, PROMPTS[:2], max_new_tokens=8)
    assert len({tuple(w) for w in (one, two, base)}) == 3
    ln.set_active(model, "one")
    assert write() == one
    with pytest.raises(AdapterError, match="no adapter 'three'"):
        write("three")


def test_nothing_else_changes(model: nn.Module) -> None:
    training = {n for n, p in model.named_parameters() if p.requires_grad}
    own = model.generation_config
    before = own.to_dict()
    model.train()
    for temperature in (0.0, 1.0):
        state = torch.get_rng_state()
        ln.generate(model, TOKENIZER, "a", adapter="one", max_new_tokens=2, temperature=temperature)
        assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(AdapterError):
        ln.generate(model, TOKENIZER, "a", adapter="three")
    assert model.training
    assert adapters(model).active == ("two",)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == training
    assert all(p.grad is None for p in model.parameters())
    assert model.generation_config is own
    assert own.to_dict() == before


def test_dropout_is_off_whatever_the_mode() -> None:
    model = byte_llama()
    ln.attach(model, ln.LoraConfig(r=4, lora_alpha=12, lora_dropout=0.9))
    fill(model)
    expected = ln.generate(model, TOKENIZER, PROMPTS, max_new_tokens=6)
    model.train()
    assert ln.generate(model, TOKENIZER, PROMPTS, max_new_tokens=6) == expected


def test_seeds(model: nn.Module) -> None:
    def write(seed: int) -> list[str]:
        return ln.generate(model, TOKENIZER, ["a", "a"], max_new_tokens=12, temperature=1.5, seed=seed)

    first = write(3)
    torch.manual_seed(9)
    assert write(3) == first
    assert write(4) != first
    assert first[0] != first[1]  # rows are drawn apart


def test_a_high_temperature_reaches_every_token(model: nn.Module) -> None:
    """No top-k and no top-p behind the caller's back: of 300 draws, far more than transformers' usual 50 kinds."""
    letters = ln.generate(model, TOKENIZER, ["a"] * 300, max_new_tokens=1, temperature=1e3)
    assert len(set(letters)) > 60


def test_the_bases_own_taste_is_left_aside(model: nn.Module) -> None:
    plain = ln.generate(model, TOKENIZER, PROMPTS, max_new_tokens=8)
    drawn = ln.generate(model, TOKENIZER, PROMPTS, max_new_tokens=8, temperature=1.0)
    model.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, num_beams=2, do_sample=True, top_p=0.1, temperature=0.2)
    assert ln.generate(model, TOKENIZER, PROMPTS, max_new_tokens=8) == plain
    assert ln.generate(model, TOKENIZER, PROMPTS, max_new_tokens=8, temperature=1.0) == drawn


@pytest.mark.parametrize("whose", ["tokenizer", "base", "base's list"])
def test_text_ends_where_training_or_the_base_ends_it(model: nn.Module, whose: str) -> None:
    tokens = likeliest(model, "a much longer", 12)
    end = next(t for i, t in enumerate(tokens) if i >= 2 and t not in tokens[:i])
    tokenizer = byte_tokenizer()
    if whose == "tokenizer":
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    else:
        model.generation_config.eos_token_id = end if whose == "base" else [EOS, end]
    text = ln.generate(model, tokenizer, "a much longer", max_new_tokens=12)
    assert text == said(tokens[: tokens.index(end) + 1])


def test_a_tokenizer_without_a_begin_of_text_token(model: nn.Module) -> None:
    tokenizer = byte_tokenizer(bos=False)
    with torch.no_grad():
        first = int(model(torch.tensor([tokenizer("abc")["input_ids"]])).logits[0, -1].argmax())
    assert ln.generate(model, tokenizer, "abc", max_new_tokens=1) == said([first])
    with pytest.raises(ConfigError, match=r"An empty prompt .* write a word"):
        ln.generate(model, tokenizer, ["abc", ""])


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([], {}, r"needs a prompt or a list of prompts, not \[\]"),
        (["a", 1], {}, r"not \['a', 1\]"),
        (None, {}, "not None"),
        (7, {}, "not 7"),
        ("a", {"temperature": -0.1}, r"temperature=-0\.1: it must be a number of at least 0"),
        ("a", {"temperature": float("nan")}, "temperature=nan"),
        ("a", {"temperature": float("inf")}, "temperature=inf"),
        ("a", {"temperature": "hot"}, "temperature='hot'"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens=0: it must be a whole number of at least 1"),
        ("a", {"max_new_tokens": 2.5}, r"max_new_tokens=2\.5"),
        ("x" * 120, {"max_new_tokens": 8}, "A prompt of 121 tokens and max_new_tokens=8 exceed the model's 128 positions: shorten"),
    ],
)
def test_bad_arguments(model: nn.Module, prompts, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ln.generate(model, TOKENIZER, prompts, **changes)


def test_a_prompt_that_just_fits(model: nn.Module) -> None:
    assert isinstance(ln.generate(model, TOKENIZER, "x" * 119, max_new_tokens=8), str)


def test_a_tokenizer_without_padding(model: nn.Module) -> None:
    tokenizer = byte_tokenizer()
    expected = ln.generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    tokenizer.pad_token = None
    assert tokenizer.pad_token_id is None
    assert PAD == 0  # what stands in for it
    assert ln.generate(model, tokenizer, PROMPTS, max_new_tokens=6) == expected


def test_the_embedded_base_writes() -> None:
    base, tokenizer = ln.load("tiny", device="cpu")
    texts = ln.generate(base, tokenizer, ["Could you please", "I would like to purchase a new"], max_new_tokens=4)
    assert [isinstance(t, str) for t in texts] == [True, True]
    assert texts[0] == ln.generate(base, tokenizer, "Could you please", max_new_tokens=4)
