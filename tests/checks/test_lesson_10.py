"""The exercises on combining: each likely mistake is named."""

# ruff: noqa: ARG005 - a wrong answer leaves something out

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_nb.combine import Recipe, blend
from tests.checks.judging import is_named, is_right

ORDER = {"LoRA and LoRA": True, "Houlsby and Houlsby": False, "LoRA and DoRA": False}


def joined(by: Callable[..., tuple[float, float]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """An answer that multiplies the two A by what `by` makes of scales and weights."""

    def answer(*given: Any) -> tuple[Tensor, Tensor]:
        A1, B1, s1, w1, A2, B2, s2, w2 = given
        one, two = by(s1, w1, s2, w2)
        return torch.cat([one * A1, two * A2]), torch.cat([B1, B2], 1)

    return answer


def voted(kept: Tensor, **settings: Any) -> Tensor:
    return blend(list(kept), [1.0] * len(kept), Recipe("ties", 1.0, **settings), torch.Generator())


@pytest.mark.parametrize(
    ("number", "wrong", "said"),
    [
        ("10.1", joined(lambda s1, w1, s2, w2: (1, 1)), "neither weights nor scales"),
        ("10.1", joined(lambda s1, w1, s2, w2: (s1, s2)), "the weights are missing"),
        ("10.1", joined(lambda s1, w1, s2, w2: (w1, w2)), "the scales s1 and s2 are missing"),
        ("10.1", joined(lambda s1, w1, s2, w2: ((w1 * s1) ** 2, (w2 * s2) ** 2)), "count twice"),
        ("10.1", joined(lambda s1, w1, s2, w2: (w1 * s1, -w2 * s2)), "not the weighted sum"),
        ("10.1", lambda *given: joined(lambda s1, w1, s2, w2: (w1 * s1, w2 * s2))(*given)[::-1], "give A first"),
        ("10.1", lambda *given: given[:2], "add up to 5"),
        ("10.1", lambda *given: given[0], "a pair of matrices"),
        ("10.2", lambda S, r: S[r:].square().sum() / S.square().sum(), "take the root"),
        ("10.2", lambda S, r: (S[:r].square().sum() / S.square().sum()).sqrt(), "what is kept"),
        ("10.2", lambda S, r: S[r:].sum() / S.sum(), "squared before"),
        ("10.2", lambda S, r: S[r:].norm(), "divide by the norm"),
        ("10.2", lambda S, r: S[r + 1 :].norm() / S.norm(), "one too many"),
        ("10.2", lambda S, r: S[r - 1 :].norm() / S.norm(), "one too few"),
        ("10.2", lambda S, r: (5 / 30) ** 0.5, "nothing is lost"),
        ("10.2", lambda S, r: 2.0, "the error is 0.408"),
        ("10.3", lambda kept: kept.mean(0), "plain mean"),
        ("10.3", lambda kept: kept.sum(0), "plain sum"),
        ("10.3", lambda kept: voted(kept) * (kept.sign() == voted(kept).sign()).sum(0), "TIES takes their mean"),
        ("10.3", lambda kept: voted(kept) * (kept.sign() == voted(kept).sign()).sum(0) / 3, "number of winners"),
        ("10.3", lambda kept: voted(kept, majority_sign_method="frequency"), "not the one with more votes"),
        ("10.3", lambda kept: voted(kept) / voted(kept).sign(), "0/0"),
        ("10.3", lambda kept: torch.where(kept.sum(0) == 0, 0, voted(kept)), "then plus wins"),
        ("10.3", lambda kept: voted(kept) + torch.tensor([1.0, 0, 0, 0, 0, 0]), "the column [3.0, -1.0, 0.0] gives 3"),
        ("10.3", lambda kept: kept.sum(), "one number for each column"),
        ("10.4", ORDER | {"LoRA and LoRA": False}, "in either order"),
        ("10.4", ORDER | {"Houlsby and Houlsby": True}, "through a bend"),
        ("10.4", ORDER | {"LoRA and DoRA": True}, "multiplies what it gets"),
        ("10.4", ORDER | {"LoRA and DoRA": ...}, "no answer yet"),
        ("10.4", {"LoRA and LoRA": True}, "a dict with these keys"),
    ],
)
def test_mistakes_are_named(number: str, wrong: Any, said: str) -> None:
    is_named(number, wrong, said)


@pytest.mark.parametrize(
    ("number", "right"),
    [
        ("10.1", joined(lambda s1, w1, s2, w2: (s1 * w1, s2 * w2))),
        ("10.2", lambda S, r: S[r:].norm() / S.norm()),
        ("10.3", voted),
        ("10.4", ORDER),
    ],
)
def test_right_answers_pass(number: str, right: Any) -> None:
    is_right(number, right)
