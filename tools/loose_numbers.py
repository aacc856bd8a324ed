"""List the numbers in the course's prose that no cell prints and no source is given for.

    python tools/loose_numbers.py [notebooks/02_….ipynb …]

A number is printed if it stands in the notebook's code or in a stored output, at the digits that the prose has; it has a source if its
sentence names one: an arXiv number, a paper with its section or table, or a link. Ordinal numbers of sections, exercises and layers'
names are no claims. The exit status is 1 if anything is listed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w])")
SOURCE = re.compile(r"arXiv|\]\(http|https?://|\bet al\b|\((?:[^()]*)(?:section|table|figure|equation|source)[^()]*\)", re.IGNORECASE)
# Code, maths, links, headings, bold exercise lines, list numbers, and years of papers claim nothing.
NOT_PROSE = re.compile(
    r"`[^`]*`|\$[^$]*\$|\]\([^)]*\)|^#+ .*$|^\*\*Exercise .*$|^\d+\. |<details>.*?</details>|\*\*(?:Time|Needs)[^\n]*|notebook `?\d\d|"
    r"\b(?:1[5-9]|20)\d\d\b",
    re.MULTILINE | re.DOTALL,
)


def values(text: str) -> set[str]:
    """Its numbers, without thousands' commas."""
    return {n.replace(",", "").rstrip(".") for n in NUMBER.findall(text)}


def printed(notebook: nbformat.NotebookNode) -> set[float]:
    """Numbers in code and in stored outputs."""
    found: set[str] = set()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            found |= values(cell.source)
            for output in cell.outputs:
                data = output.get("data", {})
                found |= values(output.get("text", "") + "".join(str(v) for k, v in data.items() if k.startswith("text/")))
    return {float(n) for n in found}


def loose(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """Each number with its sentence."""
    shown, out = printed(notebook), []
    for cell in notebook.cells:
        if cell.cell_type != "markdown":
            continue
        for sentence in re.split(r"(?<=[.!?:])\s+|\n\n", NOT_PROSE.sub(" ", cell.source)):
            if not SOURCE.search(sentence):
                out += [(n, " ".join(sentence.split())) for n in sorted(values(sentence)) if not _is_printed(n, shown)]
    return out


def _is_printed(number: str, shown: set[float]) -> bool:
    """As it stands, or rounded to the prose's digits, or as a share of what is printed in per cent."""
    digits = len(number.partition(".")[2])
    value = float(number)
    return (value <= 12 and digits == 0) or any(round(s, digits) == value or round(100 * s, digits) == value for s in shown)


def main() -> None:
    paths = [Path(a) for a in sys.argv[1:]] or sorted((ROOT / "notebooks").glob("*.ipynb"))
    found = [(path.name, *item) for path in paths for item in loose(nbformat.read(path, as_version=4))]
    for name, number, sentence in found:
        print(f"{name}: {number} in: {sentence[:140]}")
    print(f"{len(found)} numbers without a cell or a source")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
