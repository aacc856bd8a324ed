"""Run notebooks from top to bottom and store their outputs, without what does not belong in a repository.

    python tools/run_notebooks.py [notebooks/00_start.ipynb …]

Widget state is left out (GitHub refuses notebooks that hold half of it), and so are timestamps and the kernel's minor
version, which would make every run a change.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Keep what a reader sees: code, text, outputs; progress bars, which only move, are dropped."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags"}
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not _is_progress(o)]
    return notebook


def _is_progress(output: nbformat.NotebookNode) -> bool:
    widget = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    return widget or (output.output_type == "stream" and output.name == "stderr")


def run(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """From top to bottom, in a fresh kernel that starts in `folder`."""
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return tidy(notebook)


def main() -> None:
    paths = [Path(a) for a in sys.argv[1:]] or sorted((ROOT / "notebooks").glob("*.ipynb"))
    for path in paths:
        notebook, start = nbformat.read(path, as_version=4), time.perf_counter()
        nbformat.write(run(notebook, path.parent), path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
