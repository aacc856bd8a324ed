"""The judges of `05_adapters` name the likely mistakes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_nb as ln
from tests.checks.judging import is_named, is_right


class Right(nn.Module):
    """What the judge wants; the others differ in one thing."""

    bias = True

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, size, bias=self.bias), nn.Linear(size, width, bias=self.bias)
        self.start()

    def start(self) -> None:
        nn.init.zeros_(self.up.weight)
        if self.up.bias is not None:
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(torch.relu(self.down(x)))


class NoResidual(Right):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.relu(self.down(x)))


class Random(Right):
    def start(self) -> None:
        pass


class BiasLeft(Right):
    def start(self) -> None:
        nn.init.zeros_(self.up.weight)


class AllZero(Right):
    def start(self) -> None:
        for p in self.parameters():
            nn.init.zeros_(p)


class Linear(Right):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.down(x))


class Late(Right):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.up(self.down(x)))


class NoBias(Right):
    bias = False


class Wide(Right):
    def __init__(self, width: int, size: int) -> None:
        super().__init__(width, 2 * size)


class Cut(Right):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class Empty(nn.Module):
    """As the learner's cell stands."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Any:
        return ...


ONE = 2 * 256 * 32 + 32 + 256


def stack(x: Tensor, first: Any, second: Any) -> Tensor:
    h = x + first(x)
    return h + second(h)


@pytest.mark.parametrize(("number", "answer"), [("05.1", Right), ("05.2", 12 * ONE), ("05.3", stack)])
def test_right(number: str, answer: Any) -> None:
    is_right(number, answer)


def test_an_empty_class_is_no_answer() -> None:
    assert ln.check("05.1", Empty).passed is None


@pytest.mark.parametrize(
    ("number", "answer", "said"),
    [
        ("05.1", NoResidual, "residual is missing"),
        ("05.1", Random, "start at zero"),
        ("05.1", BiasLeft, "weight and bias"),
        ("05.1", AllZero, "both layers at zero"),
        ("05.1", Linear, "it is linear"),
        ("05.1", Late, "nothing after the second"),
        ("05.1", NoBias, "no biases"),
        ("05.1", Wide, "should have"),
        ("05.1", Cut, "it should make"),
        ("05.1", lambda _w, _s: 3, "subclass"),
        ("05.2", 6 * ONE, "two, after attention"),
        ("05.2", ONE, "a single adapter"),
        ("05.2", 2 * ONE, "one block"),
        ("05.2", 12 * 2 * 256 * 32, "biases are missing"),
        ("05.2", 12 * (2 * 256 * 8 + 8 + 256), "reduction factor"),
        ("05.2", 12 * (256 * 32 + 32), "way down"),
        ("05.2", 3 * ONE, "count the adapters"),
        ("05.2", 5, "no whole number"),
        ("05.3", lambda x, a, b: x + a(x) + b(x), "side by side"),
        ("05.3", lambda x, a, b: stack(x, b, a), "other order"),
        ("05.3", lambda x, a, b: b(a(x)), "both residuals"),
        ("05.3", lambda x, a, b: x + a(x) + b(a(x)), "update alone"),
        ("05.3", lambda x, a, b: x + b(x + a(x)), "got lost"),
        ("05.3", lambda x, a, _b: x + a(x), "first adapter alone"),
        ("05.3", lambda x, _a, _b: x, "neither the stack"),
        ("05.3", lambda _x, _a, _b: 1.0, "as many numbers"),
    ],
)
def test_mistakes(number: str, answer: Any, said: str) -> None:
    is_named(number, answer, said)
