"""The highest sum of what is allocated and released."""

import pytest
import torch

from lora_nb.memory.measured import rise


def test_what_lives_for_a_moment_counts_and_what_was_there_does_not() -> None:
    kept = [torch.zeros(1 << 20)]

    def step() -> None:
        kept.append(torch.zeros(1 << 18))  # 1 MiB that stays
        torch.zeros(1 << 19)  # 2 MiB, gone at once
        kept.append(torch.zeros(1 << 16))

    assert rise(step) == pytest.approx(3 << 20, rel=0.01)


def test_memory_that_is_given_back_first_is_used_again() -> None:
    kept = [torch.zeros(1 << 20)]
    assert rise(lambda: (kept.clear(), torch.zeros(1 << 10))) < 1 << 20


def test_the_profiler_says_nothing_and_errors_go_on(capfd: pytest.CaptureFixture[str]) -> None:
    rise(lambda: torch.zeros(10))
    with pytest.raises(ZeroDivisionError):
        rise(lambda: 1 / 0)
    assert capfd.readouterr().err == ""
