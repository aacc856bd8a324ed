"""Judges of `12_beyond` name the likely mistakes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import lora_nb as ln
from tests.checks.judging import is_named


def padded(a: Any, b: Any, rank: int) -> tuple[Any, Any]:
    more = rank - len(a)
    return torch.cat([a, a.new_zeros(more, a.shape[1])]), torch.cat([b, b.new_zeros(len(b), more)], dim=1)


def fitting(names: list[str], card: str, quant: str | None = "nf4") -> list[str]:
    return [n for n in names if ln.estimate(n, ln.LoraConfig(r=16), quant=quant, gradient_checkpointing=True).fits(card)]


def size(name: str) -> int:
    return ln.estimate(name).parts["weights"]


WRONG: dict[str, dict[str, Callable[..., Any]]] = {
    "12.1": {
        "largest in 16 bits": lambda names, card: max(fitting(names, card, None), key=size, default="none"),
        "the first that fits": lambda names, card: fitting(names, card)[0],
        "does not fit on": lambda names, _card: max(names, key=size),
        "'none', as a text": lambda names, card: max(fitting(names, card), key=size, default=0),
        "it is": lambda _names, _card: "gpt-9",
    },
    "12.2": {
        "plain mean": lambda g, _n: sum(g) / len(g),
        "sum of the means": lambda g, _n: sum(g),
        "divide it by their number": lambda g, n: sum(a * b for a, b in zip(g, n, strict=True)),
        "number of processes": lambda g, n: sum(a * b for a, b in zip(g, n, strict=True)) / len(g),
        "first made a sum": lambda g, n: sum(g) / sum(n),
        "one tensor": lambda g, _n: g,
        "tokens it is": lambda g, _n: g[0],
    },
    "12.3": {
        "scale is missing": lambda a, b, _scale, rank: padded(a, b, rank),
        "in both": lambda a, b, scale, rank: padded(a * scale, b * scale, rank),
        "changed with the rank": lambda a, b, scale, rank: padded(a, b * scale * len(a) / rank, rank),
        "the shapes are": lambda a, b, scale, _rank: (a, b * scale),
        "pair of tensors": lambda a, b, scale, _rank: scale * b @ a,
        "has to be zeros": lambda a, b, scale, rank: (padded(a, b, rank)[0] + 1, padded(a, b * scale, rank)[1]),
    },
}


@pytest.mark.parametrize(("number", "said"), [(number, said) for number, answers in WRONG.items() for said in answers])
def test_a_wrong_answer_is_named(number: str, said: str) -> None:
    is_named(number, WRONG[number][said], said)
