"""The course as its sources say: both notebooks agree with them, unsolved exercises fail politely, solutions pass."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from lora_nb.checks import exercises

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
build_course = pytest.importorskip("build_course", reason="jupytext reads the sources")
SOURCES = build_course.sources()
CHECK = re.compile(r"ln\.check\(\"([\d.]+)\"")


@pytest.fixture(params=SOURCES, ids=lambda p: p.stem)
def source(request: pytest.FixtureRequest) -> Path:
    return request.param


def checks(path: Path) -> dict[str, str]:
    """Number of each exercise → what its check printed."""
    cells = nbformat.read(path, as_version=4).cells
    return {
        found[1]: str(cell.outputs[-1].get("data", {}).get("text/plain", ""))
        for cell in cells
        if cell.cell_type == "code" and (found := CHECK.search(cell.source))
    }


def test_every_notebook_has_a_source_and_both_agree_with_it(source: Path) -> None:
    for path, made in build_course.targets(source).items():
        stored = nbformat.read(path, as_version=4)
        assert [(c.cell_type, c.source, c.metadata.get("tags")) for c in stored.cells] == [
            (c.cell_type, c.source, c.metadata.get("tags")) for c in made.cells
        ], f"{path.name} differs from its source: run tools/build_course.py {source.stem[:2]}"


def test_unsolved_exercises_are_open_and_solved_ones_right(source: Path) -> None:
    name = source.with_suffix(".ipynb").name
    learner, solved = checks(ROOT / "notebooks" / name), checks(ROOT / "notebooks/solutions" / name)
    assert learner.keys() == solved.keys()
    assert all(said.startswith("… open.") for said in learner.values()), learner
    assert all(said.startswith("✓ right.") for said in solved.values()), solved


def test_every_exercise_stands_in_its_notebook_with_difficulty_minutes_and_hints() -> None:
    numbers = {n for path in SOURCES for n in CHECK.findall(path.read_text(encoding="utf-8"))}
    assert numbers == set(exercises())
    for task in exercises().values():
        assert 1 <= task.difficulty <= 5
        assert 1 <= task.minutes <= 60
        assert task.hints, task.number
        lesson = next(p for p in SOURCES if p.name.startswith(task.number[:2]))
        assert f"{{{{exercise {task.number}}}}}" in lesson.read_text(encoding="utf-8")


def test_every_number_in_the_prose_is_printed_by_a_cell_or_has_a_source() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools/loose_numbers.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
