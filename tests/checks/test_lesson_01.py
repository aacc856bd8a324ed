"""The judges of `01_memory` name the likely mistakes."""

from collections.abc import Callable

import pytest

import lora_nb as ln
from lora_nb.memory.estimate import estimate
from tests.checks.judging import is_named, is_right


def count(v: int, h: int, f: int, layers: int, k: int) -> int:
    return 2 * v * h + layers * (2 * h * h + 2 * k * h + 3 * f * h + 2 * h) + h


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda v, h, f, n, k: count(v, h, f, n, k) - v * h, "embedding and output head are two"),
        (lambda v, h, f, n, k: count(v, h, f, n, k) - n * f * h, "three matrices"),
        (lambda v, h, f, n, k: count(v, h, f, n, k) - (2 * n + 1) * h, "the norms are missing"),
        (lambda v, h, f, n, k: count(v, h, f, n, k) - h, "norm at the end"),
        (lambda v, h, f, n, _: count(v, h, f, n, h), "narrower than queries"),
        (lambda v, *_: v, "you 32,000"),
    ],
)
def test_a_wrong_count_of_parameters(answer: Callable[..., int], said: str) -> None:
    is_right("01.1", count)
    is_named("01.1", answer, said)


@pytest.mark.parametrize(
    ("number", "right", "wrong", "said"),
    [
        ("01.2", 104.3, 112, "GB of 10⁹"),
        ("01.2", 7e9 * 16 / 2**30, 7e9 * 12 / 2**30, "there are four"),
        ("01.2", 104.31, 50, "not 50.0"),
        ("01.3", 2_101_346_304, 4096 * 128_256, "each has four bytes"),
        ("01.3", 2_101_346_304.0, 7, "not 7"),
        ("01.3", 4 * 4096 * 128_256, "2 GiB", "str is none"),
    ],
)
def test_a_wrong_number(number: str, right: float, wrong: object, said: str) -> None:
    is_right(number, right)
    is_named(number, wrong, said)


def longest(card: str, more: int = 0, **changed: object) -> int:
    step = {"quant": "nf4", "gradient_checkpointing": True} | changed
    tokens = 0
    while estimate("meta-llama/Llama-3.1-8B", ln.LoraConfig(r=16), seq_len=tokens + 256, **step).fits(card):
        tokens += 256
    return tokens + more


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda card: longest(card, 256), "first that does not fit"),
        (lambda card: longest(card, gradient_checkpointing=False), "without checkpointing"),
        (lambda _: 1, "are not the most"),
    ],
)
def test_a_wrong_length(answer: Callable[[str], int], said: str) -> None:
    is_right("01.4", longest)
    is_named("01.4", answer, said)
