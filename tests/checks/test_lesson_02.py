"""The judges of `02_lora_from_scratch` name the likely mistakes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.checks.judging import is_named, is_right


class Right(nn.Module):
    """A right answer, and by `how` the usual wrong ones."""

    how = ""

    def __init__(self, base: nn.Linear, r: int, alpha: float) -> None:
        super().__init__()
        self.base, self.s = base.requires_grad_(self.how == "trains"), alpha / r
        a, b = torch.randn(r, base.in_features), torch.zeros(base.out_features, r)
        self.lora_A = a if self.how == "no parameter" else nn.Parameter(a.zero_() if self.how == "A zero" else a)
        self.lora_B = nn.Parameter(b.T.contiguous() if self.how == "shape" else b + (self.how == "B not zero"))

    def forward(self, x: Tensor) -> Tensor:
        a = self.lora_A.detach() if self.how == "detached" else self.lora_A
        update = x @ a.T @ self.lora_B.T * {"no scale": 1, "twice": self.s**2}.get(self.how, self.s)
        if self.how == "update only":
            return update
        return self.base(x) + (0 if self.how == "no update" else update)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("trains", "the base trains"),
        ("no parameter", "self.lora_A is no nn.Parameter"),
        ("A zero", "A is zero"),
        ("shape", "ends with RuntimeError"),
        ("B not zero", "B is not zero"),
        ("update only", "the base's own output is missing"),
        ("no update", "the update is missing"),
        ("no scale", "lacks its factor"),
        ("twice", "applied twice"),
        ("detached", "gradient of A does not arrive"),
    ],
)
def test_lora_linear(how: str, said: str) -> None:
    is_right("02.1", Right)
    is_named("02.1", type("Wrong", (Right,), {"how": how}), said)


def gradients(x: Tensor, g: Tensor, a: Tensor, b: Tensor, s: float) -> tuple[Tensor, Tensor]:
    return s * (g @ b).T @ x, s * g.T @ (x @ a.T)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda *given: gradients(*given)[::-1], "the other order"),
        (lambda *given: gradients(*given[:-1], 1.0), "gradient of A lacks the factor"),
        (lambda x, *rest: [t / len(x) for t in gradients(x, *rest)], "mean over tokens"),
        (lambda *given: [t.T for t in gradients(*given)], "has shape"),
        (lambda *given: gradients(*given)[0], "two tensors"),
        (lambda *given: [t + 1 for t in gradients(*given)], "wrong numbers"),
    ],
)
def test_gradients(answer: Callable[..., object], said: str) -> None:
    is_right("02.2", gradients)
    is_named("02.2", answer, said)


@pytest.mark.parametrize(("wrong", "said"), [(108, "usual scale"), (12, "12 / √36 = 2"), (7, "7 / √36"), ("18", "str is none")])
def test_the_same_factor(wrong: object, said: str) -> None:
    is_right("02.3", 18)
    is_named("02.3", wrong, said)


def dora(x: Tensor, w: Tensor, a: Tensor, b: Tensor, m: Tensor, s: float) -> Tensor:  # noqa: PLR0917 - as in the lesson
    v = w + s * b @ a
    return x @ v.T * (m / v.norm(dim=1))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda x, w, a, b, m, s: x @ (w + s * b @ a).T * m, "nothing is divided"),
        (lambda x, w, a, b, m, s: x @ (w + s * b @ a).T * (m / w.norm(dim=1)), "length of W's rows"),
        (lambda x, w, a, b, m, s: dora(x, w, a, b, torch.ones_like(m), s), "m is missing"),
        (lambda x, w, a, b, m, s: x @ (w + s * b @ a).T * (m / (w + s * b @ a).norm()), "whole matrix"),
        (lambda *given: dora(*given[:-1], 1.0), "lacks its factor s"),
        (lambda x, w, *_: x @ w.T, "the numbers are not"),
        (lambda x, *_: x, "has shape"),
    ],
)
def test_dora(answer: Callable[..., Tensor], said: str) -> None:
    is_right("02.4", dora)
    is_named("02.4", answer, said)
