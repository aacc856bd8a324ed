"""The benchmarks run from end to end at a tiny size, and say what they found in the shape that others read."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SECTIONS = {"step-27M": 2, "step-5.8M": 2, "tone": 2, "memory": 1, "decode": 2, "ladder": 8}  # lines of each, at one thread


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_training(tmp_path: Path) -> None:
    words = [sys.executable, str(BENCHMARKS / "training.py"), "--quick", "--threads", "1", "--out", str(tmp_path / "training.json")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    sections = json.loads((tmp_path / "training.json").read_text())["sections"]
    devices = 2 if any("cuda:" in row["measure"] for row in sections["ladder"]["rows"]) else 1
    assert {name: len(s["rows"]) for name, s in sections.items()} == SECTIONS | {"ladder": 8 * devices}
    for section in sections.values():
        assert {"processor", "cores", "torch", "peft", "transformers", "date"} <= section["machine"].keys()
        for row in section["rows"]:
            assert row["note"] or row["value"]
            assert (row["value"] is None) or row["value"] > 0
            assert row["measure"] in done.stdout
            assert row["met"] in ({"yes", "no"} if row["target"] and row["value"] else {""})


def ran(script: str, folder: Path, *words: str) -> dict[str, Any]:
    """What a benchmark wrote at its tiny size."""
    out = folder / "out.json"
    command = [sys.executable, str(BENCHMARKS / script), "--quick", "--out", str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_rank(tmp_path: Path) -> None:
    found = ran("rank.py", tmp_path, "--only", "planted")["planted"]
    assert len(found["runs"]) == 2 * 2 * 3  # sizes, ranks, noises
    assert found["summary"]["128 × 128, noise 0.1 and 1"]["within ±25 %"] == "4 of 4"
    assert {"processor", "cores", "torch", "date"} <= found["machine"].keys()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_budgets(tmp_path: Path) -> None:
    found = ran("budgets.py", tmp_path, "--only", "stdlib")["stdlib"]
    one, by_module = (found["methods"][name] for name in ("one rank", "find_rank's ranks"))
    assert 0.99 * one["parameters"] <= by_module["parameters"] <= one["parameters"]
    assert max(one["median"], by_module["median"]) < found["base"]
    assert found["ranks"][0] < 8 < found["ranks"][1]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_latency(tmp_path: Path) -> None:
    (section,) = ran("latency.py", tmp_path, "--only", "124M", "--threads", "1").values()
    rows = {(row["phase"], row["variant"], row["over"]): row for row in section["rows"]}
    merged, lora = rows["decode", "LoRA, merged", "base"], rows["decode", "LoRA", "base"]
    assert merged["target"] == [0.97, 1.03]
    assert merged["operations"] == merged["operations of the other"]
    assert lora["operations"] > lora["operations of the other"]
    assert rows["decode", "LoRA", "PEFT LoRA"]["ratio"] > 0
    assert {"processor", "cores", "torch", "peft", "date"} <= section["machine"].keys()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_serving(tmp_path: Path) -> None:
    out, sections = tmp_path / "serving.json", {"layer": 3, "part": 2, "active": 3, "beside": 1}
    words = [sys.executable, str(BENCHMARKS / "serving.py"), "--quick", "--threads", "1", "--out", str(out), "--only", *sections]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())["sections"]
    assert {name: len(s["rows"]) for name, s in found.items()} == sections
    assert all(row["value"] > 0 and row["measure"] in done.stdout for s in found.values() for row in s["rows"])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_soak(tmp_path: Path) -> None:
    """For some seconds: too short to judge the memory, not to see that nobody gets a wrong text or none."""
    out = tmp_path / "soak.json"
    words = [sys.executable, str(BENCHMARKS / "soak.py"), "--minutes", "0.2", "--adapters", "10", "--out", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    found = json.loads(out.read_text())
    assert found["failures"] == [], done.stdout[-3000:]
    assert found["wrong rows"] == 0
    assert found["requests"]["ended: length"] + found["requests"].get("ended: stop", 0) > 10


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nf4(tmp_path: Path) -> None:
    """Times at this size say nothing; that the bits are bitsandbytes' is asserted inside, and accuracy does not depend on size."""
    sections = ran("nf4.py", tmp_path, "--threads", "1")["sections"]
    assert {name: len(s["rows"]) for name, s in sections.items()} == {"dequantize": 2, "warm": 2, "quantize": 1, "linear": 3, "accuracy": 2}
    rows = [row for section in sections.values() for row in section["rows"]]
    assert all(row["value"] > 0 and row["met"] in {"yes", "no"} for row in rows)
    assert {row["met"] for row in sections["accuracy"]["rows"]} == {"yes"}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("section", ["step", "loading"])
def test_qlora(tmp_path: Path, section: str) -> None:
    found = ran("qlora.py", tmp_path, "--only", section)["sections"][section]
    assert found["total" if section == "step" else "peak"] > 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_gpu_at_a_tiny_size_on_a_cpu(tmp_path: Path) -> None:
    """Every line of the table is there; none of them claims to meet a target of a GPU's."""
    out = tmp_path / "gpu.json"
    words = [sys.executable, str(BENCHMARKS / "gpu.py"), "--cpu", "--out", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    said = " ".join(row["measure"] for row in found["rows"])
    assert len(found["rows"]) == 16
    assert all(
        words in said
        for words in ("NF4", "logits", "LoRA's product", "decode", "LoRA step", "QLoRA step", "matrix peak", "estimate", "trace")
    )
    assert {row["met"] for row in found["rows"]} == {""}
    assert not [row["note"] for row in found["rows"] if "failed" in row["note"]]
    assert found["kernels"].keys() == {"nf4_triton", "cross_entropy_triton", "lora_triton", "mixed_triton"}
    assert {"processor", "torch", "peft", "bitsandbytes", "date"} <= found["machine"].keys()
    assert found["memory"][0]["estimate"] > found["memory"][0]["trace_memory"] / 2 > 0


FAILING = """
import time

import gpu
import on_gpu

def ends(bench):
    bench.add("half of it", 1.0)
    raise SystemExit("not the bits of the CPU")

def raises(bench):
    raise KeyError("a name that a library has changed")

def short_of_time(bench):
    bench.add("NF4", 2.0)
    bench.deadline, on_gpu.NEEDED = time.monotonic() + 2, 1

def takes_long(bench):
    while True:
        time.sleep(0.1)

gpu.SECTIONS = {"ends": ends, "raises": raises, "nf4": short_of_time, "takes long": takes_long, "late": raises}
gpu.tries = lambda bench: {}
gpu.main()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_gpu_tells_what_failed_and_loses_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    words = [sys.executable, "-c", FAILING, "--cpu", "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": f"{BENCHMARKS}:{BENCHMARKS.parent}"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False, env=env)
    assert done.returncode == 1
    assert "Not measured, for reasons in the table: ends, raises, takes long." in done.stderr
    found = json.loads(out.read_text())
    assert [(row["measure"], row["value"], row["note"]) for row in found["rows"]] == [
        ("half of it", 1.0, ""),
        ("ends", None, "failed: SystemExit: not the bits of the CPU"),
        ("raises", None, "failed: KeyError: 'a name that a library has changed'"),
        ("NF4", 2.0, ""),
        ("takes long", None, "failed: Late: the time was over"),
        ("late", None, "left out: the time was over"),
    ]
    assert {"torch", "transformers", "date"} <= found["machine"].keys()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_gpu_without_one_says_so(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(BENCHMARKS / "gpu.py")], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert "No CUDA GPU here" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_methods(tmp_path: Path) -> None:
    found = ran("methods.py", tmp_path, "--only", "cost", "topics", "growing")["sections"]
    methods = [row["method"] for row in found["topics"]["rows"]]
    assert len(methods) == 11
    assert methods == [row["method"] for row in found["cost"]["rows"]]
    assert found["topics"]["rows"][0]["share of full's gain, %"] == 100
    assert all(row["trainable"] > 0 and row["bytes saved"] > 4 * row["trainable"] for row in found["cost"]["rows"])
    assert [row["method"] for row in found["growing"]["rows"]] == ["full", "LoRA r=16"] * 2


def test_what_the_course_shows_is_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    summary = importlib.import_module("summary")
    assert summary.OUT.read_text(encoding="utf-8") == summary.written(), "run: python benchmarks/summary.py"
