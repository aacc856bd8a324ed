"""The exceptions of lora_nb. Each message says what was asked, what was found and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoraNbError(Exception):
    """Whatever lora_nb refuses: catch this one to catch them all."""


class ConfigError(LoraNbError, ValueError):
    """A setting that does not exist, or a value that is not allowed."""


class TargetError(LoraNbError, ValueError):
    """A config names modules, layers or ranks that the model does not have."""


class AdapterError(LoraNbError, ValueError):
    """An adapter's name that the model does not carry, or carries already."""


class BaseModelError(LoraNbError):
    """A base model that cannot be found, reached or read."""


class AdapterFileError(LoraNbError):
    """A saved adapter that cannot be written, or cannot be trusted when read."""


class QuantizationError(LoraNbError, ValueError):
    """A weight in few bits that is damaged, does not fit, or cannot be made."""


class DatasetError(LoraNbError, ValueError):
    """Training data that is missing, empty, too short or of another form than expected."""


class LatencyError(LoraNbError, ValueError):
    """A measurement that cannot be made as it was asked for."""


class RankError(LoraNbError, ValueError):
    """A rank that cannot be found with what was given."""


class TrainingError(LoraNbError, RuntimeError):
    """Training that cannot start, or cannot go on without harm."""


class OutOfMemoryError(LoraNbError, MemoryError):
    """A training step that the device's memory does not hold; the message says what would fit."""


class ServingError(LoraNbError, RuntimeError):
    """A request that a server of adapters cannot take, or could not finish."""


class QueueFullError(ServingError):
    """As many requests wait as may: ask again later."""


class TraceError(LoraNbError, RuntimeError):
    """A model whose code cannot be run on tensors without values."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """The end of a message: `Did you mean 'q_proj'?` when a choice is close, else the choices themselves.

    >>> nearest("q_prj", ["q_proj", "o_proj"])
    " Did you mean 'q_proj'?"
    """
    known = sorted(set(choices))
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    shown = ", ".join(known[:20]) + (", …" if len(known) > 20 else "")
    return f" There are: {shown}." if known else ""
