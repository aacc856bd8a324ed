"""The order in which variants are timed, and the figures made of their times."""

import gc

import pytest

from lora_nb.timing import Times, interleaved

TIMES = Times({"a": [1.0, 2.0, 30.0, 4.0], "b": [2.0, 4.0, 60.0, 4.0]})


def test_a_ratio_is_taken_within_a_round() -> None:
    assert TIMES.median("a") == 3.0
    assert TIMES.ratio("b", "a") == 2.0  # the medians, 4 and 3, would say 4/3
    assert TIMES.spread("b", "a") == (1.75, 2.0)  # of 1, 2, 2, 2: never outside of what was seen
    assert Times({"a": [3.0], "b": [6.0]}).spread("b", "a") == (2.0, 2.0)


def test_each_round_starts_with_another_variant() -> None:
    seen: list[str] = []
    variants = {name: lambda name=name: seen.append(name) for name in "abc"}
    times = interleaved(variants, rounds=4, warm_up=1)
    assert "".join(seen) == "abc" + "abcbcacababc"
    assert {len(s) for s in times.seconds.values()} == {4}


def test_what_settles_is_not_timed_and_waiting_is_around_what_is() -> None:
    seen: list[str] = []
    interleaved({"a": lambda: seen.append("a")}, rounds=2, repeat=3, settle=2, warm_up=0, synchronise=lambda: seen.append("|"))
    assert "".join(seen) == "aa|aaa|" * 2


def test_no_garbage_is_collected_meanwhile_and_it_is_again_after_a_failure() -> None:
    seen: list[bool] = []

    def fail() -> None:
        seen.append(gc.isenabled())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interleaved({"a": fail}, rounds=1, warm_up=0)
    assert seen == [False]
    assert gc.isenabled()


def test_time_is_in_seconds() -> None:
    import time

    times = interleaved({"short": lambda: time.sleep(0.01), "long": lambda: time.sleep(0.03)}, rounds=3, warm_up=0)
    assert times.median("short") == pytest.approx(0.01, rel=0.5)
    assert 2 < times.ratio("long", "short") < 4


def test_another_clock_counts_what_it_counts() -> None:
    ticks = iter(range(100))
    times = interleaved({"a": lambda: None, "b": lambda: next(ticks)}, rounds=2, warm_up=0, clock=lambda: float(next(ticks)))
    assert times.seconds == {"a": [1.0, 1.0], "b": [2.0, 2.0]}
