"""Make the course's notebooks from their sources: the learner's and the solved one from each.

    python tools/build_course.py [02 05 …] [--no-run]

A source (`notebooks/source/*.py`, cells divided by `# %%`) is the one place where a lesson is written. Between the markers
`### BEGIN SOLUTION` and `### END SOLUTION` (nbgrader's), or after the = of a line that ends in `### SOLUTION`, stands what only
the solved notebook has; the learner's has three dots there. `{{exercise 02.1}}` becomes its heading and hints from
`lora_nb.checks`, `{{badges}}` the links that open the notebook elsewhere. Both notebooks are run from top to bottom and stored
with what they print; `--no-run` keeps the outputs of cells that did not change and drops the others.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode
from run_notebooks import run, tidy

from lora_nb.checks import exercises

ROOT = Path(__file__).parent.parent
SOURCES, LEARNER, SOLVED = ROOT / "notebooks/source", ROOT / "notebooks", ROOT / "notebooks/solutions"
REPOSITORY = "lora-nb/lora_nb"  # owner and name where the project is published: the badges lead there
SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION\n.*?^ *### END SOLUTION$", re.DOTALL | re.MULTILINE)
VALUE = re.compile(r"^( *\w+ = ).*  ### SOLUTION$", re.MULTILINE)
MARKERS = re.compile(r"^ *### (?:BEGIN|END) SOLUTION\n?|  ### SOLUTION$", re.MULTILINE)


def sources(chosen: list[str] | None = None) -> list[Path]:
    """All of them, or those whose names begin so."""
    return [p for p in sorted(SOURCES.glob("*.py")) if not chosen or p.name.startswith(tuple(chosen))]


def cells(source: Path, *, solved: bool) -> NotebookNode:
    """The notebook of a source, not yet run."""
    notebook = jupytext.read(source, fmt="py:percent")
    name = source.with_suffix(".ipynb").name
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{source.stem[:2]}-{number:03d}"
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags"}
        if cell.cell_type == "code":
            cell.source = MARKERS.sub("", cell.source).rstrip() if solved else VALUE.sub(r"\1...", SOLUTION.sub(r"\1...", cell.source))
        else:
            cell.source = _filled(cell.source, f"solutions/{name}" if solved else name)
    return tidy(notebook)


def _filled(text: str, path: str) -> str:
    text = re.sub(r"\{\{exercise ([\d.]+)\}\}", lambda m: _heading(m[1]), text)
    return text.replace("{{badges}}", _badges(path))


def _heading(number: str) -> str:
    task = exercises()[number]
    hints = "\n".join(f"<details><summary>Hint {i}</summary>{hint}</details>" for i, hint in enumerate(task.hints, 1))
    return f"{task.heading()}\n\n{hints}" if hints else task.heading()


def _badges(path: str) -> str:
    colab = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{path}"
    binder = f"https://mybinder.org/v2/gh/{REPOSITORY}/main?urlpath=lab/tree/notebooks/{path}"
    return (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}) "
        f"[![Open in Binder](https://mybinder.org/badge_logo.svg)]({binder})"
    )


def targets(source: Path) -> dict[Path, NotebookNode]:
    """Where each of the two notebooks goes, and what is in it."""
    name = source.with_suffix(".ipynb").name
    return {LEARNER / name: cells(source, solved=False), SOLVED / name: cells(source, solved=True)}


def keep_outputs(new: NotebookNode, path: Path) -> NotebookNode:
    """Outputs of the stored notebook for cells that are the same."""
    old = {c.source: c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"} if path.is_file() else {}
    for cell in new.cells:
        if cell.cell_type == "code" and cell.source in old:
            cell.outputs, cell.execution_count = old[cell.source].outputs, old[cell.source].execution_count
    return new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lessons", nargs="*", help="beginnings of names, such as 02")
    parser.add_argument("--no-run", action="store_true")
    chosen = parser.parse_args()
    for source in sources(chosen.lessons):
        for path, notebook in targets(source).items():
            start = time.perf_counter()
            made = keep_outputs(notebook, path) if chosen.no_run else run(notebook, path.parent)
            path.parent.mkdir(exist_ok=True)
            nbformat.write(made, path)
            print(f"{path.relative_to(ROOT)}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
