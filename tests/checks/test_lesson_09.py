"""Judges of `09_many_adapters` name the likely mistakes."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.checks.judging import is_named, is_right


def layer(x: Any, w: Any, whose: Any, part: Callable[[int, int], Any]) -> Any:
    y = x @ w.T
    for i, g in enumerate(whose):
        y[i] += part(i, g)
    return y


def first_in_first_out(names: list[str], slots: int) -> int:
    memory: list[str] = []
    reads = 0
    for name in names:
        if name not in memory:
            reads, memory = reads + 1, [*memory, name][-slots:]
    return reads


WRONG: dict[str, dict[str, Callable[..., Any]]] = {
    "09.1": {
        "two sizes add up": lambda r, layers, size: sum(r * i * o for i, o in layers) * size,
        "bytes_per_number bytes": lambda r, layers, _size: sum(r * (i + o) for i, o in layers),
        "first layer alone": lambda r, layers, size: r * sum(layers[0]) * size,
        "rank is missing": lambda _r, layers, size: sum(i + o for i, o in layers) * size,
        "not 1": lambda _r, _layers, _size: 1,
    },
    "09.2": {
        "counts −1 from the end": lambda x, w, a, b, s, whose: layer(x, w, whose, lambda i, g: s[g] * (b[g] @ (a[g] @ x[i]))),
        "`scale` is missing": lambda x, w, a, b, _s, whose: layer(x, w, whose, lambda i, g: (g >= 0) * (b[g] @ (a[g] @ x[i]))),
        "adapters' part alone": lambda x, w, a, b, s, whose: (
            layer(x, w, whose, lambda i, g: (g >= 0) * s[g] * (b[g] @ (a[g] @ x[i]))) - x @ w.T
        ),
        "W x alone": lambda x, w, *_: x @ w.T,
        "first adapter": lambda x, w, a, b, s, whose: layer(x, w, whose, lambda i, _g: s[0] * (b[0] @ (a[0] @ x[i]))),
        "row i went through": lambda x, w, a, b, s, whose: layer(x, w, whose, lambda i, _g: s[i % 3] * (b[i % 3] @ (a[i % 3] @ x[i]))),
        "factor of another": lambda x, w, a, b, s, whose: layer(x, w, whose, lambda i, g: (g >= 0) * s[i % 3] * (b[g] @ (a[g] @ x[i]))),
        "one row of outputs": lambda x, *_: x,
        "the rows": lambda x, w, *_: 3 * (x @ w.T),
    },
    "09.3": {
        "return a pair": lambda lengths, _places: sum(lengths),
        "adds up all": lambda lengths, _places: (sum(lengths), 1),
        "longest request of all": lambda lengths, _places: (max(lengths), 1),
        "wrong order": lambda _lengths, _places: (14, 24),
        "divided among places": lambda lengths, places: (24, -(-sum(lengths) // places)),
        "pair is": lambda _lengths, _places: (1, 2),
    },
    "09.4": {
        "*read* longest ago": first_in_first_out,
        "found in memory": lambda _names, _slots: 3,
        "different names": lambda names, _slots: len(set(names)),
        "there are": lambda _names, _slots: 0.5,
    },
}


@pytest.mark.parametrize(("number", "said"), [(number, said) for number, answers in WRONG.items() for said in answers])
def test_a_wrong_answer_is_named(number: str, said: str) -> None:
    is_named(number, WRONG[number][said], said)


def test_a_layer_by_picking_is_right_too() -> None:
    def picked(x: Any, w: Any, a: Any, b: Any, *more: Any) -> Any:
        scale, whose = more
        inside = (a[whose] @ x[..., None] * scale[whose][:, None, None]).mT
        return x @ w.T + (inside @ b[whose].mT)[:, 0] * ((scale.new_tensor(whose) >= 0)[:, None])

    is_right("09.2", picked)
