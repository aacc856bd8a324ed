"""The course in a real JupyterLab in a real browser, as a reader meets it: `lora-nb lab`, then Run All.

The first notebook is run each time. nbval runs all of them, too; in the browser they take ten minutes more, so that asks to be wanted.
"""

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
MINUTE = 60_000
BADGE = re.compile(r"!\[([^]]*)\]\(https://[^)]*\)")
IDLE = ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook-ExecutionIndicator[data-status=idle]"


@pytest.fixture
def course(tmp_path: Path) -> Path:
    """A copy: JupyterLab saves what it runs."""
    return shutil.copytree(NOTEBOOKS, tmp_path / "course", ignore=shutil.ignore_patterns("adapters"))


@pytest.fixture
def lab(course: Path, tmp_path: Path) -> Iterator[str]:
    """The address that `lora-nb lab` prints, once it answers."""
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "JUPYTER_TOKEN")}
    environment["JUPYTER_CONFIG_DIR"] = environment["JUPYTERLAB_SETTINGS_DIR"] = environment["JUPYTERLAB_WORKSPACES_DIR"] = str(tmp_path)
    words = [sys.executable, "-m", "lora_nb.cli", "lab", "--no-browser", "--folder", str(course)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as server:
        assert server.stdout is not None
        address = re.search(r"http://\S+", server.stdout.readline())
        assert address
        for _ in range(120):
            try:
                urllib.request.urlopen(address[0], timeout=5).close()  # noqa: S310 - our own server
                break
            except OSError:
                server.poll()
                assert server.returncode is None, "JupyterLab ended before it answered"
                time.sleep(0.5)
        yield address[0]
        server.terminate()


def run_all(page: Any) -> None:
    page.wait_for_selector(IDLE, timeout=2 * MINUTE)
    page.click(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def test_first_notebook_runs_from_top_to_bottom(lab: str, browser: Any, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(lab)
    run_all(page)
    cells = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell")
    last = page.get_by_text("PEFT agrees to 1e-5: True")
    last.wait_for(timeout=8 * MINUTE)
    page.wait_for_selector(IDLE, timeout=MINUTE)
    errors = page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr'] >> text=Traceback")
    assert errors.count() == 0
    assert cells.count() > 0
    # What a reader looks at: the sentences. The panel is named, as the table of contents has a notebook's words, too.
    outputs = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-OutputArea")
    outputs.filter(has_text="word for word").first.scroll_into_view_if_needed()
    news = page.get_by_role("button", name="No", exact=True)  # JupyterLab asks whether to fetch its news
    if news.count():
        news.first.click()
    picture = Path(os.environ.get("LORA_NB_SCREENSHOT", tmp_path / "lab.png"))
    page.screenshot(path=picture)
    page.close()
    assert picture.stat().st_size > 20_000  # a blank page is smaller


@pytest.mark.skipif("LORA_NB_COURSE" not in os.environ, reason="the whole course in a browser takes ten minutes: LORA_NB_COURSE=1")
@pytest.mark.parametrize("name", sorted(path.name for path in NOTEBOOKS.glob("*.ipynb")))
def test_run_all_ends_without_an_error_or_a_warning_in_two_gigabytes(name: str, lab: str, course: Path, page: Any) -> None:
    empty = nbformat.read(course / name, as_version=4)
    for cell in empty.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        cell.source = BADGE.sub(r"\1", cell.source)  # a picture of the web, for which a browser without network shows these words
    nbformat.write(empty, course / name)
    page.goto(lab.replace("00_start.ipynb", name))
    run_all(page)
    for _ in range(100):
        page.wait_for_timeout(3000)
        page.keyboard.press("Control+s")
        try:
            cells = [cell for cell in nbformat.read(course / name, as_version=4).cells if cell.cell_type == "code"]
        except nbformat.reader.NotJSONError:
            continue  # it is being saved at this moment
        if all(cell.execution_count for cell in cells):
            break
    assert all(cell.execution_count for cell in cells), "not all cells have run after five minutes"
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error", f"{output.ename}: {output.evalue} in\n{cell.source}"
            assert output.get("name") != "stderr", f"{output.text} in\n{cell.source}"
    assert 0 < max(memory_of_kernels(course)) < 2 * 10**9


def memory_of_kernels(folder: Path) -> Iterator[int]:
    """Bytes that each kernel in that folder had resident at its highest."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            mine = b"ipykernel_launcher" in (process / "cmdline").read_bytes() and (process / "cwd").readlink() == folder
            status = (process / "status").read_text(encoding="utf-8") if mine else ""
        except OSError:  # it ended in between
            continue
        yield from (1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
