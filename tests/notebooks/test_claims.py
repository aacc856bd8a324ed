"""Every statement of the article has a verdict, the notebook made it, and `CLAIMS.json` says the same."""

import json
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[2]
VERDICTS = ("holds", "does not hold", "cannot be measured here")


def test_thirty_one_verdicts_as_the_notebook_printed_them() -> None:
    claims = json.loads((ROOT / "notebooks/CLAIMS.json").read_text(encoding="utf-8"))
    assert list(claims) == [f"C{number:02}" for number in range(1, 32)]
    cells = nbformat.read(ROOT / "notebooks/11_claims.ipynb", as_version=4).cells
    printed = "".join(o.get("text", "") for c in cells if c.cell_type == "code" for o in c.outputs)
    for number, claim in claims.items():
        assert claim["verdict"] in VERDICTS or claim["verdict"].startswith("holds when ")
        assert claim["reason"]
        assert claim["source"]
        assert f"{number} {claim['statement']}\n    {claim['verdict']}\n    {claim['reason']}\n" in printed


def test_no_verdict_is_written_by_hand() -> None:
    source = (ROOT / "notebooks/source/11_claims.py").read_text(encoding="utf-8")
    code = "\n".join(line for line in source.splitlines() if not line.startswith("#"))
    helper = code[code.index("def judge") : code.index("print(f", code.index("def judge"))]
    assert all(word not in code.replace(helper, "") for word in ("does not hold", "cannot be measured"))
