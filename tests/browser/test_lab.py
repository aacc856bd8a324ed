"""The first notebook in a real JupyterLab in a real browser, as a reader meets it: `lora-nb lab`, then Run All."""

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

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]
MINUTE = 60_000
IDLE = ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook-ExecutionIndicator[data-status=idle]"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """The address that `lora-nb lab` prints, once it answers."""
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "JUPYTER_TOKEN")}
    environment["JUPYTER_CONFIG_DIR"] = environment["JUPYTERLAB_SETTINGS_DIR"] = environment["JUPYTERLAB_WORKSPACES_DIR"] = str(tmp_path)
    # A copy: JupyterLab saves what it runs.
    course = shutil.copytree(Path(__file__).parents[2] / "notebooks", tmp_path / "course", ignore=shutil.ignore_patterns("adapters"))
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


def test_first_notebook_runs_from_top_to_bottom(lab: str, browser: Any, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(lab)
    page.wait_for_selector(IDLE, timeout=2 * MINUTE)
    page.click(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
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
