"""What every config checks its values with."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from lora_nb.errors import ConfigError, nearest

T = TypeVar("T")
LARGEST = 100_000  # steps of a pattern with its repeats written out, as matching does it in memory


def checked(cls: type[T]) -> type[T]:
    """Let an unknown field raise `ConfigError` with the nearest field, not dataclass' `TypeError`."""
    original, names = cls.__init__, [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]

    @functools.wraps(original)
    def init(self: T, *args: Any, **fields: Any) -> None:
        if args:
            raise ConfigError(f"{cls.__name__} takes its settings by name, as in {cls.__name__}({names[0]}=…).")
        for name in fields:
            if name not in names:
                raise ConfigError(f"{cls.__name__} has no field {name!r}." + nearest(name, names))
        original(self, **fields)

    cls.__init__ = init  # type: ignore[assignment,method-assign]
    return cls


def require(ok: bool, owner: object, name: str, allowed: str) -> None:
    """Raise unless `ok`: the field `name` of the config `owner` must be `allowed`."""
    if not ok:
        raise ConfigError(f"{type(owner).__name__}({name}={getattr(owner, name)!r}): {name} must be {allowed}.")


def is_count(value: object, least: int = 1) -> bool:
    """Whether it is a whole number of at least `least`; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> bool:
    """Whether it is a finite number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def is_choice(value: str, owner: object, name: str, choices: Sequence[str]) -> None:
    """Raise, with the nearest choice, unless the value is one of them."""
    if value not in choices:
        raise ConfigError(f"{type(owner).__name__}({name}={value!r}) is not known." + nearest(str(value), choices))


def compiles(pattern: object, owner: object, name: str) -> None:
    """Raise unless it is a regular expression, as `targets.py` will use it."""
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"{type(owner).__name__}({name}): {pattern!r} must be a module's name or a regular expression for it.")
    if _steps(pattern) > LARGEST:
        raise ConfigError(f"{type(owner).__name__}({name}): {pattern[:80]!r} is too long a regular expression, or repeats too often.")
    try:
        re.compile(rf"(?:.*\.)?(?:{pattern})$" if name.endswith("_pattern") else pattern)  # as targets.py will use it
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{type(owner).__name__}({name}): {pattern[:80]!r} is not usable as a regular expression: {error}.") from error


def _steps(pattern: str) -> int:
    """An upper bound of its length with {n} and {m,n} written out; repeats that stand in a row count as if one held the other."""
    counts = re.findall(r"\d+", "".join(re.findall(r"\{[\d,]+\}", pattern)))
    return len(pattern) * math.prod(max(1, int(n[:9])) for n in counts)
