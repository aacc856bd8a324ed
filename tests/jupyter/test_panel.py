"""The control panel without a browser: what its widgets do when they are used."""

import errno
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lora_nb as ln
from lora_nb.attach import adapters
from lora_nb.errors import TrainingError
from lora_nb.jupyter.figures import run_folder
from lora_nb.jupyter.panel import Panel
from lora_nb.jupyter.settings import Settings


@pytest.fixture
def panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Panel]:
    monkeypatch.chdir(tmp_path)
    made = Panel(Settings(r=2, lora_alpha=6, max_steps=4, batch_size=2))
    yield made
    made.stop()
    assert made.worker.wait(60)


def pressed(panel: Panel, name: str) -> str:
    panel.buttons[name].click()
    assert panel.worker.wait(120)
    return panel.said.value


def test_each_change_is_answered_at_once(panel: Panel) -> None:
    before = panel.numbers.value
    panel.form.fields["r"].value = 8
    assert panel.numbers.value != before
    assert "218,112" in panel.numbers.value
    assert "scale α / r = 0.75" in panel.numbers.value
    small = panel.memory.total
    panel.form.fields["batch_size"].value = 64
    assert panel.memory.total > 2 * small
    start = time.perf_counter()
    for r in (1, 2, 4, 8):
        panel.form.fields["r"].value = r
    assert (time.perf_counter() - start) / 4 < 0.5  # a hundredth of that on a quiet machine


def test_what_is_wrong_is_said_and_goes_away(panel: Panel) -> None:
    panel.form.fields["target_modules"].value = ("q_proj",)
    panel.form.fields["layers"].value = "0-9"
    assert 'role="alert"' in panel.numbers.value
    assert "layer 6" in panel.numbers.value
    panel.form.fields["layers"].value = "<img src=x onerror=alert(1)>"
    assert "<img" not in panel.numbers.value
    panel.form.fields["layers"].value = "0-1"
    assert "alert" not in panel.numbers.value
    panel.form.fields["base"].value = "Qwen2.5-1.5"
    assert "Did you mean &#x27;Qwen2.5-1.5B&#x27;" in panel.numbers.value


def test_of_a_base_that_is_not_loaded_it_says_what_follows_from_its_shape(panel: Panel) -> None:
    panel.form.fields["base"].value = "meta-llama/Llama-3.2-1B"
    assert "GiB" in panel.numbers.value
    assert "trainable parameters" not in panel.numbers.value, "those of the model that is loaded would be another's"
    panel.form.fields["base"].value = "tiny"
    assert "trainable parameters" in panel.numbers.value


def test_train_leaves_an_adapter_samples_a_curve_and_a_log(panel: Panel, tmp_path: Path) -> None:
    assert "Done after 4 steps" in pressed(panel, "train")
    assert panel.run.steps == 4
    assert {"before", "after"} == set(panel.samples)
    assert "expected" in panel.answers.value
    assert len(panel.curve.losses) == 4 * 4
    assert [step for step, _ in panel.curve.held_out] == [0, 4]
    assert len(list(tmp_path.glob("runs/tone-*/log.jsonl"))) == 1
    assert "measured in the last run" in panel.numbers.value
    assert panel.buttons["resume"].disabled
    assert "Saved in" in pressed(panel, "save")
    assert ln.inspect("adapters/panel").config.r == 2
    assert "Loaded adapters/panel" in pressed(panel, "load")


def test_stopped_and_resumed_it_is_the_same_as_in_one_go_and_as_the_code(panel: Panel) -> None:
    panel.form.fields["max_steps"].value = 12
    panel.buttons["train"].click()
    while panel.worker.busy and "Step" not in panel.said.value:
        time.sleep(0.01)
    assert "Stopped after" in pressed(panel, "stop")
    assert panel.run.steps < 12
    assert "Done after 12 steps" in pressed(panel, "resume")
    panel.buttons["code"].click()
    assert panel.code.layout.display == ""
    made: dict[str, object] = {}
    exec(panel.code.value, made)  # noqa: S102 - that is what it is for
    theirs = ln.parameters(made["model"])
    assert all(torch.equal(p, theirs[name]) for name, p in ln.parameters(panel.model).items())


def test_the_choice_of_modules_stays_after_training(panel: Panel) -> None:
    panel.form.fields["target_modules"].value = ("q_proj", "v_proj")
    pressed(panel, "train")
    assert panel.settings.target_modules == ("q_proj", "v_proj")
    assert "target_modules=['q_proj', 'v_proj']" in panel.code.value
    assert {path.rsplit(".", 1)[-1] for path in adapters(panel.model).reports["default"].matched} == {"q_proj", "v_proj"}


def test_while_it_trains_the_form_is_locked(panel: Panel) -> None:
    panel.form.fields["max_steps"].value = 500
    panel.buttons["train"].click()
    assert panel.buttons["train"].disabled
    assert not panel.buttons["stop"].disabled
    assert panel.form.fields["r"].disabled
    pressed(panel, "stop")
    assert not panel.form.fields["r"].disabled
    assert panel.buttons["stop"].disabled
    assert not panel.buttons["resume"].disabled


def test_an_adapter_that_cannot_be_loaded_is_said(panel: Panel) -> None:
    panel.path.value = "nowhere"
    assert "&#x27;nowhere&#x27; does not exist" in pressed(panel, "load")
    assert "There is no adapter to save" in pressed(panel, "save")


def test_full_training_changes_a_base_of_its_own(panel: Panel) -> None:
    panel.form.fields["method"].value = "full"
    assert "5,803,264 of 5,803,264 (100.00%)" in panel.numbers.value
    fingerprint = ln.fingerprint(panel.model)
    panel.form.fields["max_steps"].value = 1
    panel.form.fields["learning_rate"].value = 1e-3
    assert "Done" in pressed(panel, "train")
    assert ln.fingerprint(panel.model) != fingerprint
    panel.form.fields["method"].value = "lora"
    pressed(panel, "train")
    assert ln.fingerprint(panel.model) == fingerprint


def test_a_saved_notebook_still_shows_it(panel: Panel) -> None:
    bundle = panel._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert "application/vnd.jupyter.widget-view+json" in data
    assert "trainable parameters" in data["text/html"]
    assert "control panel" in data["text/plain"]


def test_two_runs_of_one_second_have_two_folders_and_a_read_only_place_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "now")
    assert [run_folder("a/tone.jsonl") for _ in range(3)] == [Path("runs") / name for name in ("tone-now", "tone-now-2", "tone-now-3")]
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    (tmp_path / "runs").write_text("no folder can be made below a file")
    assert run_folder("tone").is_relative_to(tempfile.gettempdir())


def test_your_own_model_is_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, tokenizer = ln.load("tiny")
    panel = ln.panel(model, tokenizer)
    assert panel.model is model


def test_without_any_place_to_write_it_says_what_to_do(panel: Panel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the notebook lies on a read-only disk; tests/browser/test_read_only.py has a real one."""
    mkdir = Path.mkdir

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def refused_here(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        mkdir(path, mode, parents, exist_ok) if path.is_absolute() else refused()

    pressed(panel, "train")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refused_here)
        assert "cannot be saved in &#x27;adapters/panel&#x27;: Read-only file system." in pressed(panel, "save")
        assert "Choose a folder that you may write to" in panel.said.value
        assert f"the log is in {tempfile.gettempdir()}" in pressed(panel, "train")
        patch.setattr("tempfile.mkdtemp", refused)
        assert "no place for its log" in pressed(panel, "train")
        assert "(Read-only file system)" in panel.said.value
        assert not panel.buttons["train"].disabled
    assert not (tmp_path / "adapters").exists()
    assert "Done after 4 steps" in pressed(panel, "train")


def test_what_cannot_start_leaves_no_folder(panel: Panel, tmp_path: Path) -> None:
    panel.form.fields["data"].value = "nowhere.jsonl"
    assert "alert" in pressed(panel, "train")
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_that_cannot_be_written_is_said_at_the_end(panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise TrainingError("The checkpoint cannot be written: No space left on device.")

    monkeypatch.setattr("lora_nb.training.state.write", full)
    with warnings.catch_warnings(action="ignore"):  # which only a terminal shows
        said = pressed(panel, "train")
    assert "Done after 4 steps" in said
    assert "No space left on device" in said
