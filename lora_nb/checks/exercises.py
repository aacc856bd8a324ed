"""What an exercise is, and what `check` says of an answer: right, what is not, or that nothing was answered yet."""

from __future__ import annotations

import html
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Rational
from pathlib import Path
from typing import Any

import torch

from lora_nb.checks.readiness import Readiness, readiness
from lora_nb.errors import ConfigError, nearest

NOTHING = object()
Judge = Callable[[Any], str]


class Mistake(Exception):  # noqa: N818 - the reader's, not the program's
    """An answer that is not right; the message names the likely reason."""


class NotSolved(Exception):  # noqa: N818 - as above
    """No answer yet: the `...` still stands there."""


@dataclass(frozen=True)
class Exercise:
    """One exercise: difficulty from 1 to 5, minutes it may take, and hints, each saying more than the one before.

    `judge` gets the answer; it returns a sentence on what was right, or raises `Mistake`.
    """

    number: str
    title: str
    difficulty: int
    minutes: int
    hints: tuple[str, ...]
    judge: Judge

    def heading(self) -> str:
        """One line of Markdown."""
        dots = "●" * self.difficulty + "○" * (5 - self.difficulty)
        return f"**Exercise {self.number}: {self.title}** · difficulty {dots} ({self.difficulty} of 5) · about {self.minutes} minutes"


@dataclass(frozen=True)
class CheckResult:
    """What `check` found: `passed` is True, False, or None where nothing was answered yet."""

    number: str
    passed: bool | None
    message: str
    hint: str = ""

    def __repr__(self) -> str:
        lines = [f"{MARKS[self.passed]} Exercise {self.number}: {self.message}"]
        return "\n".join([*lines, *([f"  Hint: {self.hint}"] if self.hint else [])])

    def _repr_html_(self) -> str:
        hint = f"<details><summary>Hint</summary>{html.escape(self.hint)}</details>" if self.hint else ""
        colour = {True: "#2e7d32", False: "#c62828", None: "#6d6d6d"}[self.passed]
        said = f"{MARKS[self.passed]} <b>Exercise {html.escape(self.number)}</b>: {html.escape(self.message)}"
        return f'<div role="status" style="border-left:4px solid {colour};padding:2px 8px">{said}{hint}</div>'


# Never colour alone: each has a sign and a word.
MARKS = {True: "✓ right.", False: "✗ not yet.", None: "… open."}
_KNOWN: dict[str, Exercise] = {}
_TRIES: dict[str, int] = {}  # wrong answers in this session, for the next hint


def exercise(number: str, title: str, *, difficulty: int, minutes: int, hints: tuple[str, ...]) -> Callable[[Judge], Judge]:
    """Register the function below it as the judge of an exercise."""

    def register(judge: Judge) -> Judge:
        _KNOWN[number] = Exercise(number, title, difficulty, minutes, hints, judge)
        return judge

    return register


def exercises() -> dict[str, Exercise]:
    """All of them by number."""
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if info.name.startswith("lesson_"):
            importlib.import_module(f"lora_nb.checks.{info.name}")
    return dict(sorted(_KNOWN.items()))


def check(number: str | None = None, answer: Any = NOTHING) -> CheckResult | Readiness:
    """Check the answer to an exercise; without arguments, whether this machine is ready for the course.

    Args:
        number: of the exercise, such as `"02.1"`.
        answer: a number, a text, a tensor or a function, as the exercise asks.

    Raises:
        ConfigError: there is no such exercise.
    """
    if number is None:
        return readiness()
    known = exercises()
    if number not in known:
        raise ConfigError(f"check({number!r}): there is no such exercise." + nearest(str(number), known))
    if answer is NOTHING:
        raise ConfigError(f"check({number!r}) needs the answer as its second argument: check({number!r}, answer).")
    return _judged(known[number], answer)


def _judged(task: Exercise, answer: Any) -> CheckResult:
    try:
        if answer is ... or answer is None:
            raise NotSolved  # noqa: TRY301 - as the judge would
        return CheckResult(task.number, passed=True, message=task.judge(_number(answer)))
    except NotSolved:
        return CheckResult(task.number, None, "put your answer in the place of the three dots, then run both cells again.")
    except Mistake as mistake:
        message = str(mistake)
    except Exception as error:  # noqa: BLE001 - whatever the reader's code does
        message = f"your code ends with {type(error).__name__}: {error}"
    tries = _TRIES[task.number] = _TRIES.get(task.number, 0) + 1
    return CheckResult(task.number, passed=False, message=message, hint=task.hints[min(tries, len(task.hints)) - 1] if task.hints else "")


def value_of(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the reader's function gives.

    Raises:
        NotSolved: nothing yet. Mistake: it is no function.
    """
    if not callable(function):
        raise Mistake(f"the answer is a function here, and {type(function).__name__} is none.")
    value = function(*arguments)
    if value is None or value is ...:
        raise NotSolved
    return _plain(value)


def _plain(value: Any) -> Any:
    """The same answer as judges expect it: how a number is written is no mistake.

    Fractions and numpy's numbers become Python's, its arrays tensors, and tensors of another width 32 bits.
    """
    if type(value) in {tuple, list}:
        return type(value)(map(_plain, value))
    if isinstance(value, Rational) and not isinstance(value, int):
        return int(value.numerator) if value.denominator == 1 else float(value)  # numpy counts its integers as fractions
    if not isinstance(value, torch.Tensor) and hasattr(value, "__array__") and hasattr(value, "item"):
        value = value.item() if not value.ndim else torch.as_tensor(value)
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _number(answer: Any) -> Any:
    """`_plain`, and a tensor of one number as that number."""
    answer = _plain(answer)
    return answer.item() if isinstance(answer, torch.Tensor) and not answer.ndim else answer
