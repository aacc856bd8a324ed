"""`check`: right, wrong with the likely mistake and the next hint, open, and the machine."""

import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import lora_nb as ln
from lora_nb.checks import Mistake, exercise, value_of
from lora_nb.checks.exercises import _KNOWN, _TRIES
from lora_nb.errors import ConfigError


@pytest.fixture(autouse=True)
def double() -> Any:
    @exercise("99.1", "Double", difficulty=2, minutes=3, hints=("think", "add it to itself"))
    def judge(answer: Any) -> str:
        if value_of(answer, 3) == 9:
            raise Mistake("that is the square.")
        if value_of(answer, 3) != 6:
            raise Mistake("no.")
        return "3 gives 6."

    yield
    del _KNOWN["99.1"]
    _TRIES.pop("99.1", None)


def test_a_right_answer_is_told_why() -> None:
    result = ln.check("99.1", lambda x: x + x)
    assert (result.passed, repr(result)) == (True, "✓ right. Exercise 99.1: 3 gives 6.")


@pytest.mark.parametrize("made", [float, Fraction, np.int64, np.float32, torch.tensor, lambda x: torch.tensor(x, dtype=torch.float64)])
def test_how_a_number_is_written_is_no_mistake(made: Any) -> None:
    for number, right in (("00.1", 8192), ("01.3", 2_101_346_304), ("02.3", 18), ("11.1", 28)):
        assert ln.check(number, made(right)).passed, number
        if number != "01.3":
            assert ln.check(number, made(right + 1)).passed is False, number
    assert ln.check("99.1", lambda x: made(2 * x)).passed


def test_an_array_and_a_tensor_in_64_bits_are_answers_too() -> None:
    assert ln.check("07.1", lambda w, a, b, alpha, r: (w + alpha / r * b @ a).double()).passed
    assert ln.check("07.1", lambda w, a, b, alpha, r: (w + alpha / r * b @ a).numpy()).passed
    assert ln.check("10.2", lambda s, r: np.float32((s[r:] ** 2).sum() / (s**2).sum()) ** 0.5).passed

    said = ln.check("10.4", {"LoRA and LoRA": "True", "Houlsby and Houlsby": "False", "LoRA and DoRA": "False"}).message
    assert "quotation marks" in said
    assert "quotation marks" in ln.check("00.1", "8192").message


def test_a_wrong_one_names_the_likely_mistake_and_gives_the_next_hint() -> None:
    hints = [ln.check("99.1", lambda x: x * x).hint for _ in range(3)]
    assert hints == ["think", "add it to itself", "add it to itself"]
    assert "that is the square" in repr(ln.check("99.1", lambda x: x * x))


@pytest.mark.parametrize("answer", [..., None, lambda _: ..., lambda _: None], ids=["dots", "none", "function of dots", "function of none"])
def test_no_answer_is_no_error(answer: Any) -> None:
    result = ln.check("99.1", answer)
    assert result.passed is None
    assert repr(result).startswith("… open.")
    assert "99.1" not in _TRIES


def test_code_that_fails_says_how_and_markup_stays_text() -> None:
    result = ln.check("99.1", lambda x: x / "<b>")
    assert result.passed is False
    assert "TypeError" in result.message
    assert "<b>'" not in ln.check("99.1", lambda _: {}["<b>"])._repr_html_()
    assert "is none" in ln.check("99.1", 6).message


def test_an_unknown_exercise_and_a_missing_answer_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"There are|Did you mean"):
        ln.check("77.7", 1)
    with pytest.raises(ConfigError, match="needs the answer"):
        ln.check("00.1")


@pytest.mark.parametrize("wrong", [16 * 256 * 256, 256 * 256, 4096])
def test_lesson_00(wrong: int) -> None:
    assert ln.check("00.1", 8192).passed
    assert ln.check("00.1", wrong).passed is False


def test_the_machine_that_runs_the_tests_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    report = ln.check()
    assert {what for what, *_ in report.findings} >= {"Python", "torch", "widgets", "two training steps"}
    assert all(well for what, well, *_ in report.findings if what not in {"free memory", "free disk"}), report
    assert "verdict" in report._repr_html_()
    monkeypatch.setattr(sys.modules["lora_nb.checks.readiness"], "NEEDED", {"torch": (99, 0), "no-such-library": (1, 0)})
    report = ln.check()
    assert not report.ready
    assert "✗ to do" in repr(report)
    assert "not installed: pip install no-such-library" in repr(report)
