"""The tree of exceptions, and the help that messages end in."""

import doctest

import pytest

from lora_nb import errors
from lora_nb.errors import LoraNbError, nearest

BUILT_IN = {
    errors.ConfigError: ValueError,
    errors.TargetError: ValueError,
    errors.AdapterError: ValueError,
    errors.BaseModelError: Exception,
    errors.AdapterFileError: Exception,
    errors.QuantizationError: ValueError,
    errors.DatasetError: ValueError,
    errors.TrainingError: RuntimeError,
    errors.OutOfMemoryError: MemoryError,
    errors.LatencyError: ValueError,
    errors.RankError: ValueError,
    errors.ServingError: RuntimeError,
    errors.QueueFullError: errors.ServingError,
    errors.TraceError: RuntimeError,
}


@pytest.mark.parametrize("kind", BUILT_IN, ids=lambda k: k.__name__)
def test_each_is_caught_as_ours_and_as_the_built_in_it_resembles(kind) -> None:
    assert issubclass(kind, LoraNbError)
    assert issubclass(kind, BUILT_IN[kind])
    assert kind.__doc__


def test_the_table_above_has_every_exception_of_the_module() -> None:
    ours = {v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Exception)}
    assert ours - {LoraNbError} == set(BUILT_IN)


def test_no_exception_is_caught_as_another() -> None:
    for kind, meant in BUILT_IN.items():
        assert not any(issubclass(kind, other) for other in BUILT_IN if other not in {kind, meant})


@pytest.mark.parametrize(
    ("word", "choices", "says"),
    [
        ("q_prj", ["q_proj", "o_proj", "down_proj"], " Did you mean 'q_proj'?"),
        ("learning_rat", ["warmup_steps", "learning_rate"], " Did you mean 'learning_rate'?"),
        ("zzz", ["q_proj", "c_attn"], " There are: c_attn, q_proj."),
        ("zzz", ["b", "a", "b"], " There are: a, b."),
        ("zzz", [], ""),
    ],
)
def test_nearest_names_the_close_one_or_all(word: str, choices: list[str], says: str) -> None:
    assert nearest(word, choices) == says


def test_nearest_shows_twenty_choices_and_that_there_are_more() -> None:
    choices = [f"m{i:02}" for i in range(30)]
    assert nearest("zzz", iter(choices)) == f" There are: {', '.join(choices[:20])}, …."


def test_the_examples_in_the_docstrings_hold() -> None:
    outcome = doctest.testmod(errors)
    assert outcome.attempted
    assert not outcome.failed
