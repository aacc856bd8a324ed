"""What a run leaves behind: its record, the log beside it, TensorBoard's events, and where its memory went."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lora_nb as ln
from lora_nb.errors import TrainingError
from lora_nb.training import callbacks
from lora_nb.training.memory_use import REST
from tests.text import byte_llama, byte_tokenizer

TOKENIZER = byte_tokenizer()
PAIRS = ln.dataset([(word, word[::-1]) for word in ("to", "and", "from", "under", "beyond", "through")])


def adapted() -> nn.Module:
    model = byte_llama()
    torch.manual_seed(0)
    ln.attach(model, ln.LoraConfig(r=4, lora_alpha=12))
    return model


def train(*watching, **changes) -> ln.Run:
    settings = {"max_steps": 4, "batch_size": 3, "seq_len": 64, "warmup_steps": 0, "eval_every": 2} | changes
    return ln.train(adapted(), TOKENIZER, PAIRS, ln.TrainConfig(**settings), eval_dataset=PAIRS[:2], callbacks=watching)


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_log_has_each_step_and_evaluation_and_can_be_read_along(tmp_path: Path) -> None:
    file, seen = tmp_path / "deep" / "run.jsonl", []
    run = train(lambda step: seen.append([line for line in lines(file) if "loss" in line][-1]["step"] == step.step), log_file=file)
    assert seen == [True] * 4
    written = lines(file)
    assert [line["loss"] for line in written if "loss" in line] == run.losses
    assert [(line["step"], line["eval_loss"]) for line in written if "eval_loss" in line] == run.eval_losses
    assert set(written[1]) == {"step", "total", "loss", "learning_rate", "grad_norm", "tokens", "seconds"}


def test_a_resumed_log_has_each_step_once(tmp_path: Path) -> None:
    def interrupt(step: ln.Step) -> None:
        if step.step == 3:
            raise KeyboardInterrupt

    train(interrupt, checkpoint_dir=tmp_path, checkpoint_every=2)
    log = tmp_path / "log.jsonl"
    with log.open("a") as file:
        file.write(json.dumps({"step": 4, "loss": 1.0}) + '\n{"step": 5, "lo')  # of a life that no checkpoint remembers
    run = train(checkpoint_dir=tmp_path, resume=True)
    assert [line["loss"] for line in lines(log) if "loss" in line] == run.losses


def test_a_log_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"log .* cannot be written.*another log_file"):
        train(log_file=tmp_path / "file" / "run.jsonl")


def test_a_log_whose_disk_is_full_ends_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = json.dumps

    def dumps(line: dict) -> str:
        if line["step"] == 3:
            raise OSError(28, "No space left on device")
        return plain(line)

    monkeypatch.setattr(callbacks, "json", SimpleNamespace(dumps=dumps, loads=json.loads))
    with pytest.warns(UserWarning, match="ends before step 3: No space left on device. The run goes on"):
        run = train(log_file=tmp_path / "run.jsonl")
    assert run.steps == 4


def test_infinity_is_no_json() -> None:
    assert ln.Step(1, 2, 3.0, 0.1, math.inf, 5, 6.0).as_json()["grad_norm"] is None


def test_tensorboard_is_asked_for_by_name_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainingError, match=r"tensorboard_dir=.*pip install tensorboard.*log_file"):
        train(tensorboard_dir=tmp_path)


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(tensorboard_dir=tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(run.losses)
    assert [e.step for e in events.Scalars("eval/loss")] == [step for step, _ in run.eval_losses]
    assert [e.value for e in events.Scalars("eval/loss")] == pytest.approx([loss for _, loss in run.eval_losses])


def test_memory_by_part() -> None:
    run = train()
    model = adapted()
    own = sum(p.nbytes for p in ln.parameters(model).values())
    assert run.memory["weights that train"] == run.memory["gradients"] == own
    assert run.memory["frozen weights"] >= sum(p.nbytes for p in model.parameters()) - own
    assert run.memory["optimizer"] == pytest.approx(2 * own, abs=4 * 28)  # two moments; and a count for each of 28 matrices
    assert sum(run.memory.values()) == run.peak_memory
    assert list(run.memory)[-1] == REST
    for form in (repr(run), run._repr_html_()):
        for part in (*run.memory, "learning rate, highest and last"):
            assert part in form


def test_the_record_survives_json() -> None:
    run = train()
    other = ln.Run(run.adapter, run.config)
    other.continue_from(json.loads(json.dumps(run.history())))
    assert (other.losses, other.eval_losses, other.tokens, other.steps) == (run.losses, run.eval_losses, run.tokens, 4)


def test_evaluations_since_the_best() -> None:
    run = ln.Run(None, ln.TrainConfig())
    assert run.stale() == 0
    for loss, since in ((3.0, 0), (2.0, 0), (2.5, 1), (2.0, 2), (1.0, 0)):
        run.eval_losses.append((0, loss))
        assert run.stale() == since
