"""Say of each notebook how many of its cells with output nbval compares, and how long it took.

    pytest --nbval … --junitxml=build/nbval.xml notebooks/; python tools/compared_cells.py [build/nbval.xml]

`make test` does both. Without the file the times are left out. The exit status is 1 if a notebook compares less than 60 % of its
cells with output; times are for the reader, as machines differ: a learner's notebook may take 90 seconds, all of them 12 minutes.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import nbformat

from lora_nb.render import text_table

ROOT = Path(__file__).parent.parent
LEAST = 0.6
IGNORED = "nbval-ignore-output"


def notebooks() -> list[Path]:
    """The learner's, then the solved ones."""
    return [p for folder in ("notebooks", "notebooks/solutions") for p in sorted((ROOT / folder).glob("*.ipynb"))]


def compared(notebook: nbformat.NotebookNode) -> tuple[int, int]:
    """How many cells are compared, of how many with output."""
    shown = [c for c in notebook.cells if c.cell_type == "code" and c.outputs]
    return sum(IGNORED not in c.metadata.get("tags", []) for c in shown), len(shown)


def seconds(report: Path) -> Counter[str]:
    """Path of each notebook, dots for slashes as pytest writes it → seconds of all its cells and of its kernel's start."""
    found: Counter[str] = Counter()
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 - pytest's own file
        found[case.get("classname", "")] += float(case.get("time", 0))  # type: ignore[assignment]
    return found


def main() -> None:
    times = seconds(Path(sys.argv[1])) if len(sys.argv) > 1 else Counter[str]()
    rows, short = [], []
    for path in notebooks():
        name = str(path.relative_to(ROOT))
        count, of = compared(nbformat.read(path, as_version=4))
        took = times.get(name.replace("/", "."))
        rows.append([name, f"{count} of {of}", f"{count / max(1, of):.0%}", "–" if took is None else f"{took:.0f} s"])
        short += [name] if count < LEAST * of else []
    print(text_table(["notebook", "compared", "share", "took"], rows))
    for folder in ("notebooks", "notebooks.solutions") if times else ():
        total = sum(took for name, took in times.items() if name.rpartition(".ipynb")[0].rpartition(".")[0] == folder)
        print(f"{folder}: {total / 60:.1f} minutes")
    print(f"less than {LEAST:.0%} compared: {', '.join(short) or 'none'}")
    sys.exit(bool(short))


if __name__ == "__main__":
    main()
