"""A kernel is used where it was seen to agree with its twin, and nowhere else."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

from lora_nb.layers import kernels
from lora_nb.layers.kernels import kernel, quicker, tried

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


def a_kernel(monkeypatch: pytest.MonkeyPatch, outcome) -> None:
    """A module `fake_triton` whose trial gives or raises that."""

    def agrees(_):
        assert not torch.is_grad_enabled()
        torch.randn(3)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    fake = ModuleType("lora_nb.layers.fake_triton")
    fake.agrees = agrees
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)


CURRENT: list[torch.device] = []


def on(device: torch.device):
    """In place of `torch.cuda.device`."""
    CURRENT.append(device)
    yield
    CURRENT.pop()


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU, and nothing measured yet."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", contextmanager(on))
    monkeypatch.setattr(kernels, "QUICKER", {})
    monkeypatch.setattr(kernels, "TRIED", {})
    CURRENT.clear()


def test_on_a_cpu_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    a_kernel(monkeypatch, True)
    assert kernel("fake_triton", CPU) is None


def test_one_that_agrees_is_used_and_the_trial_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a_kernel(monkeypatch, True)
    before = torch.get_rng_state()
    assert tried("fake_triton", CPU) == (sys.modules["lora_nb.layers.fake_triton"], "")
    assert torch.equal(torch.get_rng_state(), before)


def test_one_that_fails_is_left_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    a_kernel(monkeypatch, RuntimeError("out of resource: shared memory"))
    assert tried("fake_triton", CPU) == (None, "RuntimeError: out of resource: shared memory")


def test_one_that_is_wrong_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    a_kernel(monkeypatch, False)
    with pytest.warns(UserWarning, match="fake_triton gives other results on cpu than PyTorch"):
        assert tried("fake_triton", CPU)[0] is None


@pytest.mark.usefixtures("measuring")
def test_it_is_tried_once_on_the_device_that_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []
    monkeypatch.setattr(kernels, "tried", lambda *what: tries.append((*what, *CURRENT)) or ("module", ""))
    assert [kernel("fake_triton", GPU) for _ in range(2)] == ["module"] * 2
    assert tries == [("fake_triton", GPU, GPU)]
    assert not CURRENT


@pytest.mark.usefixtures("measuring")
def test_a_full_memory_or_a_graph_that_is_recorded_leaves_the_trial_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    a_kernel(monkeypatch, torch.OutOfMemoryError("full"))
    with pytest.raises(torch.OutOfMemoryError):
        tried("fake_triton", CPU)
    monkeypatch.setattr(kernels, "tried", lambda _name, _device: tried("fake_triton", CPU))
    assert kernel("fake_triton", GPU) is None
    a_kernel(monkeypatch, True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert kernel("fake_triton", GPU) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert kernel("fake_triton", GPU) is not None


def test_without_triton_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda _: None)
    assert tried("no_such_triton", CPU) == (None, "Triton is not installed")


@pytest.mark.usefixtures("measuring")
def test_what_is_quicker_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def milliseconds(run):
        measured.append(run)
        return run()

    monkeypatch.setattr(kernels, "milliseconds", milliseconds)
    for _ in range(2):
        assert quicker(GPU, "much", lambda: 1.0, lambda: 2.0)
        assert not quicker(GPU, "hardly", lambda: 0.99, lambda: 1.0)
    assert len(measured) == 4


def test_where_results_must_repeat_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "milliseconds", lambda _: pytest.fail("measured"))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not quicker(GPU, "whatever", lambda: None, lambda: None)


@pytest.mark.usefixtures("measuring")
def test_a_full_memory_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(kernels, "milliseconds", full)
    assert not quicker(GPU, "full", lambda: None, lambda: None)
    monkeypatch.setattr(kernels, "milliseconds", lambda run: run())
    assert quicker(GPU, "full", lambda: 1.0, lambda: 2.0)
