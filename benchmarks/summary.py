"""What the course shows of the committed results, gathered in one small file of the package: notebooks run without a checkout.

    python benchmarks/summary.py            writes lora_nb/data/measured.json from benchmarks/results/*.json

Run it whenever one of these results has changed; a test compares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
OUT = Path(__file__).parents[1] / "lora_nb" / "data" / "measured.json"
VARIANTS = ("LoRA", "LoRA, merged", "Houlsby", "Pfeiffer", "parallel")
CURVES = "tone"  # the task of which the losses step by step are kept
Numbers = dict[str, Any]


def summary() -> Numbers:
    """Section → its figures, each with the command that made them."""
    return {
        "methods": methods(read("methods")),
        "latency": latency(read("latency")),
        "serving": serving(read("serving")),
        "rank": rank(read("rank")),
        "recovery": {"command": "python benchmarks/recovery.py", "rows": read("recovery")["table"]},
        "merging": {"command": "python benchmarks/qlora.py --only merging", "rows": read("qlora")["sections"]["merging"]["targets"]},
    }


def read(name: str) -> Numbers:
    content: Numbers = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def methods(found: Numbers) -> Numbers:
    """The tables whole; the losses of each step for one task."""
    for name, section in found["sections"].items():
        for row in section["rows"] if name != CURVES else ():
            row.pop("losses", None)
    return {"command": found["command"], **found["sections"]}


def latency(found: Numbers) -> Numbers:
    """Time over the base, of the embedded base alone."""
    kept = ("phase", "batch", "variant", "ratio", "middle half")
    rows = [
        {key: row[key] for key in kept}
        for name, section in found.items()
        for row in section["rows"]
        if "5.8M, 1 threads" in name and row["over"] == "base" and row["variant"] in VARIANTS
    ]
    return {"command": "python benchmarks/latency.py --threads 1", "rows": rows}


def serving(found: Numbers) -> Numbers:
    kept = ("measure", "threads", "value", "note")
    sections = {name: [{key: row[key] for key in kept} for row in section["rows"]] for name, section in found["sections"].items()}
    return {"command": "python benchmarks/serving.py", **{name: sections[name] for name in ("active", "loaded") if name in sections}}


def rank(found: Numbers) -> Numbers:
    """On planted ranks how often one run finds them; on text the sweep, and what ranks by module save at the same loss."""
    whole = {name: found[name]["runs"]["rank 128"]["on all of it"] for name in ("tone", "stdlib")}
    text = {name: {**found[name]["summary"], "saving": run["saving by ranks of their own"]} for name, run in whole.items()}
    return {"command": "python benchmarks/rank.py", "planted": found["planted"]["summary"], **text}


def written() -> str:
    """The file's content, a section a line."""
    lines = [f"{json.dumps(name)}: {json.dumps(section, ensure_ascii=False)}" for name, section in summary().items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    OUT.write_text(written(), encoding="utf-8")
    print(f"{OUT.name}: {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
