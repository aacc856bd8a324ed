"""Checkpoints: whole or absent, and a run that goes on from one is the run that was never interrupted, to the bit."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import lora_nb as ln
from lora_nb.errors import TrainingError
from tests.text import PAIRS, byte_llama, byte_tokenizer
from tests.training.stopping import interrupt, stop_at

TOKENIZER = byte_tokenizer()
DROPPING = ln.LoraConfig(r=4, lora_alpha=12, lora_dropout=0.3)


def config(folder: Path | None = None, **changes) -> ln.TrainConfig:
    kept = {"checkpoint_dir": folder, "checkpoint_every": 2} if folder else {}
    return ln.TrainConfig(**{"max_steps": 8, "batch_size": 4, "seq_len": 64, "warmup_steps": 2, "eval_every": 3} | kept | changes)


def adapted(lora: ln.LoraConfig = DROPPING) -> nn.Module:
    model = byte_llama()
    torch.manual_seed(0)
    ln.attach(model, lora)
    return model


def train(settings: ln.TrainConfig, *callbacks, lora: ln.LoraConfig = DROPPING, model: nn.Module | None = None):
    model = model or adapted(lora)
    run = ln.train(model, TOKENIZER, PAIRS, settings, eval_dataset=PAIRS[:3], callbacks=callbacks)
    return run, {name: p.detach().clone() for name, p in ln.parameters(model).items()}


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def assert_same(found, expected) -> None:
    (run, adapter), (whole, kept) = found, expected
    assert run.losses == whole.losses
    assert run.eval_losses == whole.eval_losses
    assert run.learning_rates == whole.learning_rates
    assert (run.steps, run.tokens) == (whole.steps, whole.tokens)
    assert adapter.keys() == kept.keys()
    assert all(torch.equal(adapter[name], p) for name, p in kept.items())


# ---- going on --------------------------------------------------------------------------------------------------------

SETTINGS = {
    "plain": {},
    "packed": {"packing": True, "batch_size": 1},
    "accumulated": {"batch_size": 2, "gradient_accumulation_steps": 3},
    "LoRA+": {"loraplus_lr_ratio": 4.0, "weight_decay": 0.1},
    "offloaded": {"offload_optimizer": True, "lr_scheduler_type": "cosine"},
    "epochs": {"max_steps": None, "num_train_epochs": 3},
    "checkpointing": {"gradient_checkpointing": True},
    "fp16": {"precision": "fp16", "max_steps": 4},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_a_resumed_run_is_the_one_that_was_not_interrupted(tmp_path: Path, changes: dict) -> None:
    expected = train(config(**changes))
    broken, _ = train(config(tmp_path, **changes), stop_at(3, interrupt))
    assert broken.steps == 3
    torch.manual_seed(99)  # what was drawn meanwhile does not matter
    found = train(config(tmp_path, resume=True, **changes))
    assert_same(found, expected)
    assert found[0].stopped_by == expected[0].stopped_by


def test_resuming_at_each_step_in_turn(tmp_path: Path) -> None:
    expected = train(config())
    for number in range(1, 8):
        train(config(tmp_path, resume=True), stop_at(number, interrupt))
    assert_same(train(config(tmp_path, resume=True)), expected)


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    expected = train(config(tmp_path))
    seen: list[ln.Step] = []
    again = train(config(tmp_path, resume=True), seen.append)
    assert seen == []
    assert_same(again, expected)


def test_a_run_can_be_made_longer(tmp_path: Path) -> None:
    train(config(tmp_path, max_steps=4, lr_scheduler_type="constant"))
    longer = train(config(tmp_path, resume=True, lr_scheduler_type="constant"))
    assert longer[0].losses == train(config(lr_scheduler_type="constant"))[0].losses


def test_without_resume_it_starts_anew(tmp_path: Path) -> None:
    train(config(tmp_path), stop_at(5, interrupt))
    assert_same(train(config(tmp_path)), train(config()))


def test_resume_without_a_checkpoint_starts(tmp_path: Path) -> None:
    assert_same(train(config(tmp_path / "new", resume=True)), train(config()))


def test_steps_resume_too(tmp_path: Path) -> None:
    whole = [s.loss for s in ln.steps(adapted(), TOKENIZER, PAIRS, config())]
    turns = ln.steps(adapted(), TOKENIZER, PAIRS, config(tmp_path))
    first = [next(turns).loss for _ in range(3)]
    turns.close()
    rest = list(ln.steps(adapted(), TOKENIZER, PAIRS, config(tmp_path, resume=True)))
    assert first + [s.loss for s in rest] == whole
    assert rest[0].step == 4


def test_a_whole_model_resumes_with_its_buffers(tmp_path: Path) -> None:
    class Counting(nn.Module):
        """A table of next tokens behind a BatchNorm, whose running mean is part of what was learnt."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.norm, self.head = nn.Embedding(259, 8), nn.BatchNorm1d(8), nn.Linear(8, 259)

        def forward(self, input_ids, **_):
            hidden = self.norm(self.table(input_ids).transpose(1, 2)).transpose(1, 2)
            return type("Out", (), {"logits": self.head(hidden)})()

    whole, parts = Counting(), Counting()
    run = ln.train(whole, TOKENIZER, PAIRS, config())
    ln.train(parts, TOKENIZER, PAIRS, config(tmp_path), callbacks=[stop_at(3, interrupt)])
    parts = Counting()
    assert ln.train(parts, TOKENIZER, PAIRS, config(tmp_path, resume=True)).losses == run.losses
    assert all(torch.equal(t, whole.state_dict()[name]) for name, t in parts.state_dict().items())


# ---- another run is not taken for this one ---------------------------------------------------------------------------


def test_other_settings_data_or_base_are_refused(tmp_path: Path) -> None:
    train(config(tmp_path), stop_at(3, interrupt))
    resumed = {"resume": True}
    with pytest.raises(TrainingError, match=r"learning_rate=0.1 \(there 0.002\), seed=4 \(there 0\) differ"):
        train(config(tmp_path, learning_rate=0.1, seed=4, **resumed))
    with pytest.raises(TrainingError, match="the data differs"):
        ln.train(adapted(), TOKENIZER, PAIRS[:9], config(tmp_path, **resumed))
    other = byte_llama(seed=1)
    ln.attach(other, DROPPING)
    with pytest.raises(TrainingError, match="the base differs"):
        train(config(tmp_path, **resumed), model=other)
    with pytest.raises(TrainingError, match="another adapter: 28 parameters differ in name or shape"):
        train(config(tmp_path, **resumed), lora=ln.LoraConfig(r=3, lora_alpha=12))
    assert train(config(tmp_path, **resumed))[0].steps == 8  # nothing was spoilt


# ---- files -----------------------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if "log" not in p.name)


def test_the_newest_two_stay_and_nothing_is_pickled(tmp_path: Path) -> None:
    train(config(tmp_path))
    assert names(tmp_path) == ["step-00000006.safetensors", "step-00000008.safetensors"]
    with safe_open(tmp_path / "step-00000008.safetensors", framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
        keys = set(file.keys())
    assert facts["run"]["losses"]
    assert {key.split(".")[0] for key in keys} == {"model", "optimizer"}


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    train(config(tmp_path))
    newest = tmp_path / "step-00000008.safetensors"
    data = bytearray(newest.read_bytes())
    data[-3] ^= 1
    newest.write_bytes(data)
    with pytest.warns(UserWarning, match="other values than were written; the one before it is tried"):
        assert_same(train(config(tmp_path, resume=True)), train(config()))
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.warns(UserWarning, match="cannot be read"), pytest.raises(TrainingError, match="No checkpoint is whole"):
        train(config(tmp_path, resume=True))


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-00000002.safetensors.123.tmp").write_bytes(b"half")
    train(config(tmp_path))
    assert not any(name.endswith(".tmp") for name in names(tmp_path))


@pytest.mark.parametrize("fails", ["write", "fsync", "rename"])
def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_goes_on(tmp_path: Path, fails: str, monkeypatch) -> None:
    expected = train(config())
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    draw, room = random.Random(0), [0]

    class Full(io.FileIO):
        def write(self, data) -> int:
            super().write(memoryview(data)[: room[0]])
            raise full

    def refuse(*_: object) -> None:
        raise full

    def fill(_: ln.Step) -> None:
        room[0] = draw.randrange(20_000)
        if fails == "write":
            plain = Path.open
            monkeypatch.setattr(Path, "open", lambda p, m="r", **k: Full(p, m) if p.suffix == ".tmp" else plain(p, m, **k))
        else:
            monkeypatch.setattr(*((os, "fsync", refuse) if fails == "fsync" else (Path, "replace", refuse)))

    with pytest.warns(UserWarning, match=r"checkpoint of step [68] cannot be written.*No space left.*whole.*The run goes on"):
        found = train(config(tmp_path), stop_at(5, lambda: fill(None)))
    assert_same(found, expected)
    assert "No space left" in found[0].notice
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000002.safetensors", "step-00000004.safetensors"]
    assert_same(train(config(tmp_path, resume=True)), expected)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainingError, match="cannot be written"):
        train(config(tmp_path / "file" / "within"))


# ---- stopping --------------------------------------------------------------------------------------------------------


def test_sigterm_ends_the_run_and_keeps_it(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run, _ = train(config(tmp_path), stop_at(3, terminate))
    assert (run.steps, run.stopped_by) == (3, "sigterm")
    assert signal.getsignal(signal.SIGTERM) is before
    assert_same(train(config(tmp_path, resume=True)), train(config()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_within_the_update_waits_until_it_is_whole(tmp_path: Path, number: int, monkeypatch) -> None:
    """It comes in the midst of the third update; parameters and record agree all the same."""
    plain, calls = torch.optim.AdamW.step, []

    def step(self, *args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return plain(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run, _ = train(config(tmp_path))
    assert (run.steps, run.stopped_by) == (3, "interrupt" if number == signal.SIGINT else "sigterm")
    monkeypatch.undo()
    assert_same(train(config(tmp_path, resume=True)), train(config()))


def test_a_thread_is_stopped_by_its_callback(tmp_path: Path) -> None:
    """Signals cannot be caught there, and none is needed: the panel's Stop sets an event."""
    pressed, found = threading.Event(), []

    def work() -> None:
        found.append(train(config(tmp_path), stop_at(3, pressed.set), lambda _: pressed.is_set()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    ((run, _),) = found
    assert (run.steps, run.stopped_by) == (3, "callback")
    assert_same(train(config(tmp_path, resume=True)), train(config()))


def test_early_stopping() -> None:
    """A rate so high that the held-out loss only rises: two evaluations after the first, and it ends."""
    run, _ = train(
        config(learning_rate=0.5, lr_scheduler_type="constant", warmup_steps=0, max_steps=40, eval_every=2, early_stopping_patience=2)
    )
    assert run.stopped_by == "early_stopping"
    assert run.stale() == 2
    assert run.steps < 40
