"""What a teacher relies on: each notebook opens and closes alike, is in TEACHING.md's table, and is mostly compared by nbval."""

import re
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import compared_cells  # noqa: E402 - a tool, not a package

NOTEBOOKS = compared_cells.notebooks()
TEACHING = (ROOT / "notebooks/TEACHING.md").read_text(encoding="utf-8")


@pytest.fixture(params=NOTEBOOKS, ids=lambda p: f"{p.parent.name}/{p.name}")
def notebook(request: pytest.FixtureRequest) -> nbformat.NotebookNode:
    return nbformat.read(request.param, as_version=4)


def test_most_cells_with_output_are_compared(notebook: nbformat.NotebookNode) -> None:
    count, of = compared_cells.compared(notebook)
    assert count >= compared_cells.LEAST * of


def test_it_opens_with_badges_time_and_needs_and_the_same_first_cell(notebook: nbformat.NotebookNode) -> None:
    opening, first = notebook.cells[:2]
    assert re.match(r"# \S", opening.source)
    for part in ("colab-badge.svg", "mybinder.org/badge_logo.svg", "**Time:**", "not measured", "**Needs:**"):
        assert part in opening.source
    assert first.source == nbformat.read(NOTEBOOKS[0], as_version=4).cells[1].source
    assert any(re.search(r'^BASE = "', c.source, re.MULTILINE) for c in notebook.cells)


def test_it_closes_with_three_things_to_remember_and_where_to_read_on(notebook: nbformat.NotebookNode) -> None:
    closing = notebook.cells[-1]
    assert closing.cell_type == "markdown"
    _, found, rest = closing.source.partition("## Three things to remember\n")
    assert found
    assert re.findall(r"^(\d)\. ", rest, re.MULTILINE) == ["1", "2", "3"]
    assert "**To read on:**" in rest


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name == "notebooks"], ids=lambda p: p.stem)
def test_it_is_in_the_teachers_table(path: Path) -> None:
    assert re.search(rf"^\| `{path.stem}` \|", TEACHING, re.MULTILINE), f"write a line for {path.stem} into notebooks/TEACHING.md"


def test_the_times_of_a_run_are_added_up_by_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    report = tmp_path / "nbval.xml"
    cells = "".join(f'<testcase classname="notebooks.00_start.ipynb" name="Cell {i}" time="{30 + i}"/>' for i in range(3))
    report.write_text(
        f'<testsuites><testsuite>{cells}<testcase classname="notebooks.solutions.00_start.ipynb" time="7"/></testsuite></testsuites>'
    )
    monkeypatch.setattr(sys, "argv", ["compared_cells.py", str(report)])
    with pytest.raises(SystemExit):
        compared_cells.main()
    said = capsys.readouterr().out
    assert re.search(r"notebooks/00_start\.ipynb +\d+ of \d+ +\d+% +93 s", said)
    assert re.search(r"notebooks/solutions/00_start\.ipynb .* 7 s", said)
    assert "notebooks: 1.6 minutes" in said
