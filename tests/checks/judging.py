"""What the tests of every lesson ask of its judges."""

from typing import Any

import lora_nb as ln


def is_right(number: str, answer: Any) -> None:
    result = ln.check(number, answer)
    assert result.passed, result


def is_named(number: str, wrong: Any, said: str) -> None:
    """A wrong answer fails, its likely mistake is said, and there is a hint."""
    result = ln.check(number, wrong)
    assert result.passed is False, result
    assert said in result.message, result.message
    assert result.hint
