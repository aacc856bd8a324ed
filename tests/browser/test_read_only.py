"""JupyterLab in a folder that cannot be written: all is shown, the panel trains, and what cannot be kept is said in a sentence."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_nb as ln
from tests.browser.conftest import served

pytestmark = [pytest.mark.browser, pytest.mark.slow]
MINUTE = 60_000
PANEL = "import lora_nb as ln\nln.panel()"
# Root may write where file permissions say no, so the server sees the folder on a read-only mount of its own.
SANDBOX = ["unshare", "-rm", "sh", "-c", 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"']


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("read-only")
    model, _ = ln.load("tiny")
    ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6))
    ln.save(model, folder / "course/adapters/tone")
    return folder


@pytest.fixture(scope="module")
def jupyter(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not shutil.which("unshare") or subprocess.run([*SANDBOX, workspace, "true"], check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("needs a mount of its own: Linux's unshare, allowed to make one")
    with served(workspace, tmp_path_factory.mktemp("jupyter"), *SANDBOX, str(workspace)) as address:
        yield address


def test_adapters_are_found_and_shown(lab, command):
    command("lora-nb:side")
    lab.locator(".lora-side").get_by_role("button", name="course/adapters/tone").click()
    shown = lab.locator(".lora-viewer:visible")
    shown.locator(".lora-json").wait_for()
    assert "tiny" in shown.locator(".lora-facts").inner_text()


def test_a_new_notebook_is_refused_in_words(lab, command, workspace):
    for folder, name in (("", "at the top"), ("course", "course")):
        command("lora-nb:panel", cwd=folder)
        dialog = lab.get_by_role("dialog")
        dialog.get_by_text(f"The folder {name} cannot be written to. Go to another one").wait_for()
        lab.keyboard.press("Enter")
        dialog.wait_for(state="detached")
    assert list(workspace.rglob("*.ipynb")) == []


def test_the_panel_trains_and_says_what_it_cannot_keep(opened, run, workspace):
    cell = opened("panel.ipynb", PANEL).first
    run(cell)
    cell.get_by_label("Rank r").wait_for(timeout=2 * MINUTE)
    cell.get_by_label("Steps").fill("400")
    cell.get_by_label("Batch").fill("2")
    cell.get_by_label("Batch").press("Tab")
    cell.get_by_role("button", name="Train", exact=True).click()
    cell.get_by_text(re.compile(r"Step \d+ of 400")).wait_for(timeout=MINUTE)
    cell.get_by_role("button", name="Stop", exact=True).click()
    stopped = cell.get_by_text(re.compile(r"Stopped after \d+ steps"))
    stopped.wait_for(timeout=MINUTE)
    assert "This folder cannot be written, so the log is in" in stopped.inner_text()
    cell.get_by_role("button", name="Save", exact=True).click()
    cell.get_by_role("alert").get_by_text("Read-only file system").wait_for()
    assert "Choose a folder that you may write to" in cell.get_by_role("alert").inner_text()
    cell.get_by_role("button", name="Resume", exact=True).click()
    cell.get_by_text("Done after 400 steps").wait_for(timeout=2 * MINUTE)
    assert [entry.name for entry in workspace.iterdir() if entry.name in ("runs", "adapters")] == []


def test_checks_run_in_a_notebook_that_cannot_be_saved(lab, command, opened):
    opened("checks.ipynb", "print('checked', 6 * 7)")
    command("lora-nb:check")
    lab.get_by_role("button", name="Confirm Kernel Restart").click()
    lab.get_by_text("checked 42").wait_for(timeout=MINUTE)
