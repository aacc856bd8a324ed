"""The judges of `11_claims` name the likely mistakes."""

from typing import Any

import pytest

from tests.checks.judging import is_named, is_right


@pytest.mark.parametrize(
    ("number", "right", "wrong"),
    [
        ("11.1", 28, {14: "2 bytes", 57: "query and value", 29: "round down", 8: "32 blocks"}),
        (
            "11.2",
            lambda weight, gradient, optimizer: (weight + gradient + optimizer) / weight,
            {
                lambda _, gradient, optimizer: gradient + optimizer: "leaves the weights out",
                lambda weight, gradient, optimizer: (gradient + optimizer) / weight: "holds its weights",
                lambda *_: 500: "not 500",
                lambda *_: 6: "use the arguments",
            },
        ),
        (
            "11.3",
            lambda a, b: min(a) > max(b) or max(a) < min(b),
            {
                lambda a, b: sum(a) != sum(b): "different means",
                lambda *_: False: "wholly below",
                lambda a, b: max(a) < min(b): "higher one",
            },
        ),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_right_and_wrong(number: str, right: Any, wrong: dict[Any, str]) -> None:
    is_right(number, right)
    for answer, said in wrong.items():
        is_named(number, answer, said)
