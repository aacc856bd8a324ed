"""Each notebook of the course as its reader meets it: Run All in a real JupyterLab, with nothing on screen to stumble over.

nbval runs the same cells at every `make test`; the browser adds what only it can show, and ten minutes. So it asks to be wanted.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
MINUTE = 60_000
IDLE = ".jp-NotebookPanel .jp-Notebook-ExecutionIndicator[data-status=idle]"
BADGES = ("https://colab.research.google.com/assets/colab-badge.svg", "https://mybinder.org/badge_logo.svg")  # pictures of two links
CELLS = """() => jupyterapp.shell.currentWidget.content.widgets.map((cell) => cell.model).filter((m) => m.type === 'code')
  .map((m) => ({ count: m.executionCount, source: m.sharedModel.getSource(), outputs: m.outputs.toJSON() }))"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif("LORA_NB_COURSE" not in os.environ, reason="the whole course in a browser takes ten minutes: LORA_NB_COURSE=1"),
]


@pytest.fixture(params=sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def opened(request: pytest.FixtureRequest, browser: Any, jupyter: str, workspace: Path) -> Iterator[Any]:
    """JupyterLab with a copy of the notebook without its outputs, and no way out of this machine but to two badges, which are blank."""
    notebook = nbformat.read(request.param, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, workspace / request.param.name)
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, far = context.new_page(), []

    def answer(route: Any) -> None:
        if urlsplit(route.request.url).hostname in {"localhost", "127.0.0.1"}:
            route.continue_()
        elif route.request.url in BADGES:
            route.fulfill(content_type="image/svg+xml", body='<svg xmlns="http://www.w3.org/2000/svg"/>')
        else:
            far.append(route.request.url)
            route.abort()

    page.route("http*://**", answer)
    page.goto(jupyter.replace("/lab?", f"/lab/tree/{request.param.name}?"))
    page.wait_for_selector(IDLE, timeout=MINUTE)
    yield page
    page.evaluate("jupyterapp.serviceManager.sessions.shutdownAll()")
    context.close()
    assert far == []


def test_run_all_ends_without_an_error_or_a_warning_in_two_gigabytes(opened: Any, workspace: Path) -> None:
    opened.locator(".jp-NotebookPanel .jp-Notebook").click()
    opened.get_by_role("menuitem", name="Run", exact=True).click()
    opened.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    opened.wait_for_function(f"() => ({CELLS})().every((cell) => cell.count)", timeout=5 * MINUTE)
    opened.wait_for_selector(IDLE, timeout=3 * MINUTE)
    for cell in opened.evaluate(CELLS):
        for output in cell["outputs"]:
            assert output["output_type"] != "error", f"{output['ename']}: {output['evalue']} in\n{cell['source']}"
            assert output.get("name") != "stderr", f"{output['text']} in\n{cell['source']}"
    assert 0 < max(memory_of_kernels(workspace)) < 2 * 10**9


def memory_of_kernels(folder: Path) -> Iterator[int]:
    """Bytes that each kernel in that folder had resident at its highest."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            mine = b"ipykernel_launcher" in (process / "cmdline").read_bytes() and (process / "cwd").readlink() == folder
            status = (process / "status").read_text(encoding="utf-8") if mine else ""
        except OSError:  # it ended in between
            continue
        yield from (1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
