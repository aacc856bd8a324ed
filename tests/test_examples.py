"""Files and rows: whole where they are read, and a reason with the line where they are not."""

from pathlib import Path

import pytest

import lora_nb as ln
from lora_nb.errors import DatasetError
from lora_nb.examples import PAIR_COLUMNS
from tests.text import stored


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "Füße\nund Hände\n", ["Füße\nund Hände\n"]),
        ("a.TXT", "upper case suffix", ["upper case suffix"]),
        ("notes", "no suffix", ["no suffix"]),
        ("a.txt", b"\xef\xbb\xbfmarked", ["marked"]),
        ("a.csv", "prompt,completion\none,eins\n", [ln.Pair("one", "eins")]),
        ("a.csv", b"\xef\xbb\xbftext,label,lang\r\none,eins,de\r\n", [ln.Pair("one", "eins", "de")]),
        ("a.csv", 'text\n"two\nlines, and a comma"\n', ["two\nlines, and a comma"]),
        ("a.csv", "text\none\x85two\u2028three\n", ["one\x85two\u2028three"]),
        ("a.tsv", "question\tanswer\none, two\teins\n", [ln.Pair("one, two", "eins")]),
        ("a.TSV", "question\tanswer\none\teins\n", [ln.Pair("one", "eins")]),
        ("a.jsonl", '{"text": "one"}\n\n"two"\n', ["one", "two"]),
        ("a.jsonl", '["one", "eins"]\r\n{"prompt": "two", "completion": "zwei"}', [ln.Pair("one", "eins"), ln.Pair("two", "zwei")]),
        ("a.jsonl", '{"text": "a\u2028b\x85c"}\n', ["a\u2028b\x85c"]),
        ("a.jsonl", '{"prompt": "one", "completion": "eins", "lang": null}\n', [ln.Pair("one", "eins")]),
    ],
)
def test_files(tmp_path: Path, name: str, content: str | bytes, expected: list[object]) -> None:
    path = stored(tmp_path, name, content)
    for source in (path, str(path)):
        data = ln.dataset(source)
        assert list(data) == expected
        assert (data.name, data.split) == (name, "all")


@pytest.mark.parametrize(("prompt", "completion"), PAIR_COLUMNS)
def test_columns_that_make_a_pair(prompt: str, completion: str) -> None:
    assert list(ln.dataset([{"id": 7, prompt: "one", completion: "eins"}])) == [ln.Pair("one", "eins")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "", "is empty: give it"),
        ("a.txt", " \n", "is empty: give it"),
        ("a.csv", "prompt,completion\n", "is empty: give it"),
        ("a.jsonl", "\n\n", "is empty: give it"),
        ("a.csv", "frage,antwort\none,eins\n", r"line 2 has the columns 'frage', 'antwort'; one of these is needed: prompt\+completion"),
        ("a.csv", "prompt,completion\none\n", "line 2 has None where text is needed: make it text"),
        ("a.csv", 'text\n"never closed\n', "what follows line 1 is not a row of a table .* ends with a quote"),
        ("a.jsonl", '"fine"\n{"text": \n', "line 2 is not JSON .* one JSON value a line"),
        ("a.jsonl", '{"text": 3}', "line 1 has 3 where text is needed"),
        ("a.jsonl", '{"text": " "}', "line 1 has ' ' where text is needed"),
        ("a.jsonl", '["one", "two", "three"]', "line 1 is a list; a text or a pair"),
        ("a.jsonl", '"a text"\n["a", "pair"]', "mixes texts and pairs.*make two"),
        ("a.txt", "Füße".encode("latin-1"), "is not UTF-8 text .* at byte 1.: save it as UTF-8"),
        ("a.pdf", b"%PDF\xff", r"\.pdf files are not read; use \.txt"),
        ("a.json", '{"text": "one"}', r"\.json files are not read; use .*\.jsonl"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        ln.dataset(stored(tmp_path, name, content))


def test_an_instruction_keeps_the_input_that_it_speaks_of() -> None:
    rows = [{"instruction": "Add.", "input": "2 and 3", "output": "5"}, {"instruction": "Greet.", "input": "", "output": "Hello"}]
    assert [p.prompt for p in ln.dataset(rows)] == ["Add.\n2 and 3", "Greet."]
