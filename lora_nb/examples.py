"""One example to learn from, a text or a pair, and how files and tables say it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lora_nb.blocks import Block
from lora_nb.errors import DatasetError

# Column names that say what a table holds, the first that fits wins.
PAIR_COLUMNS = (
    ("prompt", "completion"),
    ("formal", "informal"),
    ("text", "label"),
    ("instruction", "output"),
    ("question", "answer"),
    ("input", "output"),
    ("source", "target"),
)


@dataclass(frozen=True)
class Pair:
    """A prompt and the completion to learn."""

    prompt: str
    completion: str
    lang: str = ""

    def __str__(self) -> str:
        return f"{self.prompt} => {self.completion}"


Example = str | Pair | Block


def read_file(path: Path) -> list[Example]:
    """The examples of a file, read by its ending.

    Raises:
        DatasetError: an ending that is not known, no UTF-8 text, or rows that are no examples.
    """
    kind = path.suffix.lower()
    if kind not in READERS:
        raise DatasetError(f"{str(path)!r}: {kind} files are not read; use .txt, .md, .py, .csv, .tsv or .jsonl.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{str(path)!r} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8.") from error
    except OSError as error:
        raise DatasetError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    return READERS[kind](text, str(path))


def _read_text(text: str, _where: str) -> list[Example]:
    return [text] if text.strip() else []


def _read_jsonl(text: str, where: str) -> list[Example]:
    out = []
    for number, line in enumerate(io.StringIO(text), 1):  # splitlines would also split inside strings, at U+2028 and others
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DatasetError(f"{where!r}, line {number} is not JSON ({error}): a .jsonl file holds one JSON value a line.") from error
        out.append(example_of(row, f"{where!r}, line {number}"))
    return out


def _read_table(text: str, where: str) -> list[Example]:
    rows = csv.DictReader(io.StringIO(text), delimiter="\t" if where.lower().endswith(".tsv") else ",", strict=True)
    try:
        return [example_of(row, f"{where!r}, line {rows.line_num}") for row in rows]
    except csv.Error as error:
        said = f"{where!r}: what follows line {rows.line_num} is not a row of a table ({error})"
        raise DatasetError(f"{said}: a cell in quotes ends with a quote, and a quote within it is doubled.") from error


READERS: dict[str, Callable[[str, str], list[Example]]] = {
    **dict.fromkeys((".txt", ".md", ".py", ".rst", ""), _read_text),
    ".jsonl": _read_jsonl,
    **dict.fromkeys((".csv", ".tsv"), _read_table),
}


def example_of(row: object, where: str) -> Example:
    """A text, a pair, or a row with columns that say which of the two it is."""
    if isinstance(row, Block):
        return row
    if isinstance(row, Pair):
        return replace(row, prompt=_said(row.prompt, where), completion=_said(row.completion, where))
    if isinstance(row, str):
        return _said(row, where)
    if isinstance(row, tuple | list) and len(row) == 2:
        return Pair(_said(row[0], where), _said(row[1], where))
    if isinstance(row, dict):
        for prompt, completion in PAIR_COLUMNS:
            if prompt in row and completion in row:
                return Pair(_prompt(row, prompt, where), _said(row[completion], where), str(row.get("lang") or ""))
        if "text" in row:
            return _said(row["text"], where)
        known = ", ".join(f"{p}+{c}" for p, c in PAIR_COLUMNS)
        raise DatasetError(f"{where} has the columns {', '.join(map(repr, row))}; one of these is needed: {known}, or text.")
    raise DatasetError(f"{where} is a {type(row).__name__}; a text or a pair (prompt, completion) is needed.")


def _prompt(row: dict[str, object], column: str, where: str) -> str:
    """The prompt's column; to an instruction belongs the input that it speaks of, where the row has one."""
    said = _said(row[column], where)
    return f"{said}\n{_said(row['input'], where)}" if column == "instruction" and row.get("input") else said


def _said(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DatasetError(f"{where} has {repr(value)[:80]} where text is needed: make it text, or leave the row out.")
    return str(value)  # of NumPy's own strings too
