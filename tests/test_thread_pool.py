"""OpenMP's idle threads go when they are given back, and whoever computes in another thread has given them back first."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell

import lora_nb as ln
from lora_nb import scheduler, thread_pool, tiers
from lora_nb.jupyter import worker
from lora_nb.thread_pool import give_back
from tests.text import byte_llama, byte_tokenizer

TASKS = Path("/proc/self/task")
linux = pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in Linux's /proc")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    give_back()


def threads() -> int:
    return len(list(TASKS.iterdir()))


def compute() -> torch.Tensor:
    return torch.arange(1_000_000.0).sin().view(1000, 1000) @ torch.eye(1000)


@linux
@pytest.mark.usefixtures("two_threads")
def test_idle_threads_end_and_come_back() -> None:
    give_back()
    few, expected = threads(), compute()
    many = threads()
    assert many == few + 1
    assert give_back()
    assert threads() == few
    assert torch.equal(compute(), expected)
    assert threads() == many


def test_giving_back_nothing_is_no_error() -> None:
    assert give_back() == give_back()


@linux
@pytest.mark.usefixtures("two_threads")
def test_training_in_a_thread_starts_without_those_of_the_main_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    give_back()
    few = threads()
    compute()
    seen: list[int] = []
    monkeypatch.setattr(worker, "train", lambda *_, **__: seen.append(threads()))
    nothing: Any = lambda *_: None  # noqa: E731
    of = worker.Worker()
    of.start(worker.Job(*[SimpleNamespace()] * 5, before=nothing, seen=nothing, after=nothing, ended=nothing))  # type: ignore[arg-type]
    assert of.wait(60)
    assert seen == [few + 1]  # its own


def test_server_and_its_loader_give_theirs_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[str] = []
    for module in (scheduler, tiers):
        monkeypatch.setattr(module, "give_back", lambda: called.append(threading.current_thread().name))
    model = byte_llama()
    ln.attach(model, ln.LoraConfig(r=2))
    ln.save(model, tmp_path / "one")
    ln.detach(model)
    with ln.AdapterServer(model, byte_tokenizer(), folder=tmp_path) as server:
        server.submit("a", "one", max_new_tokens=1).result(60)
    assert called == ["MainThread", "lora_nb loader"]


def test_the_kernels_main_thread_gives_them_back_after_every_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance()
    called: list[str] = []
    monkeypatch.setattr(thread_pool, "give_back", lambda: called.append("given back"))
    try:
        worker.Worker(), worker.Worker()
        shell.run_cell("1")
    finally:
        InteractiveShell.clear_instance()
    assert called == ["given back"]
