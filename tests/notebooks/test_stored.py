"""The notebooks as they lie in the repository: run, without errors, readable where nothing runs."""

from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = [*sorted((ROOT / "notebooks").glob("*.ipynb")), *sorted((ROOT / "notebooks/solutions").glob("*.ipynb"))]


@pytest.fixture(params=NOTEBOOKS, ids=lambda p: f"{p.parent.name}/{p.name}")
def notebook(request: pytest.FixtureRequest) -> nbformat.NotebookNode:
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [c for c in notebook.cells if c.cell_type == "code"]


def test_there_are_notebooks() -> None:
    assert [p.name for p in NOTEBOOKS][:1] == ["00_start.ipynb"]


def test_every_cell_was_run_in_order_and_none_failed(notebook: nbformat.NotebookNode) -> None:
    cells = code_cells(notebook)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert not any(o.output_type == "error" for c in cells for o in c.outputs)


def test_nothing_is_stored_that_only_a_running_kernel_can_show(notebook: nbformat.NotebookNode) -> None:
    assert "widgets" not in notebook.metadata
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


def test_a_cell_fits_on_a_screen_and_prose_stands_before_it(notebook: nbformat.NotebookNode) -> None:
    for before, cell in zip(notebook.cells, notebook.cells[1:], strict=False):
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 14, cell.source
            assert before.cell_type == "markdown" or len(before.source.splitlines()) + len(cell.source.splitlines()) <= 14
