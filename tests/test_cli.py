"""`lora-nb`: the verbs do their work, and a wrong word gets one line."""

import json
from pathlib import Path

import pytest

from lora_nb import cli, commands
from lora_nb.commands import course
from lora_nb.commands.options import options
from lora_nb.errors import LoraNbError


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    try:
        cli.main(words)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            return status, "", end.code
    out = capsys.readouterr()
    return status, out.out, out.err


def test_help_lists_every_verb_with_its_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for verb in commands.TERMINAL:
        assert verb.__name__ in out


@pytest.mark.parametrize("verb", [v.__name__ for v in commands.TERMINAL])
def test_help_of_a_verb_has_every_option(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, verb, "--help")
    assert status == 0
    for option in options(getattr(commands, verb)):
        assert option.name.replace("_", "-") in out.replace("_", "-")
        assert option.said.split()[0] in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train", "tone", "--max-stps", "3"], "Did you mean '--max-steps'?"),
        (["train", "tone", "--r", "zwei"], "invalid int value: 'zwei'"),
        (["train", "tnoe"], "Did you mean 'tone'?"),
        (["train", "tone", "--r", "0"], "r must be a whole number of at least 1"),
        (["train", "tone", "--target-modules", "q_prj"], "Did you mean 'q_proj'?"),
        (["inspect", "nowhere"], "does not exist"),
        (["generate", "Hello", "--base", "tinny"], "Did you mean 'tiny'?"),
    ],
)
def test_a_wrong_word_gets_one_line_and_no_traceback(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, *words)
    assert status != 0
    assert said in err
    assert "Traceback" not in err
    assert err.strip().count("\n") == 0


def test_train_then_inspect_then_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, folder = tmp_path / "pairs.jsonl", tmp_path / "adapter"
    data.write_text("\n".join(json.dumps({"prompt": f"number {i}", "completion": f"{i} it is"}) for i in range(40)))
    status, out, _ = run(capsys, "train", str(data), "--out", str(folder), "--max-steps", "2", "--batch-size", "4", "--r", "2")
    assert status == 0
    assert out.index("parameters train") < out.index("steps"), "the report is shown before anything trains"
    assert f"saved in {folder}" in out
    status, out, _ = run(capsys, "inspect", str(folder))
    assert status == 0
    assert "42: down_proj" in out
    status, out, _ = run(capsys, "generate", "number 3", "number 4", "--pair", "--adapter", str(folder), "--max-new-tokens", "4")
    assert status == 0
    assert out.count("base") == 2
    assert out.count(str(folder)) == 2


def test_lab_starts_jupyter_on_the_first_notebook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(course.os, "execv", lambda _, words: started.append(words))
    monkeypatch.setenv("JUPYTER_TOKEN", "secret")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    commands.lab(commands.Session(), port=8123, jupyter="--ServerApp.quit_button=False")
    words = started[0]
    assert any(w.endswith("notebooks/00_start.ipynb") for w in words)
    assert "--port=8123" in words
    assert "--ServerApp.quit_button=False" in words
    assert "http://localhost:8123/lab/tree/00_start.ipynb?token=secret" in capsys.readouterr().out


def test_lab_from_a_wheel_copies_the_course_and_keeps_the_readers_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "site" / "notebooks"
    installed.mkdir(parents=True)
    (installed / "00_start.ipynb").write_text("{}")
    monkeypatch.setattr(course, "CHECKOUT", tmp_path / "none")
    monkeypatch.setattr(course, "COURSE", installed)
    monkeypatch.chdir(tmp_path)
    mine = course._course() / "00_start.ipynb"
    assert mine.parent == tmp_path / "lora_nb_course"
    mine.write_text("mine")
    assert (course._course() / "00_start.ipynb").read_text() == "mine"


def test_lab_without_notebooks_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course, "CHECKOUT", tmp_path / "none")
    monkeypatch.setattr(course, "COURSE", tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoraNbError, match="no notebooks"):
        course._course()
