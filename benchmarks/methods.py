"""Eleven ways to fine-tune the embedded base, side by side: what each learns, and what it costs.

    python benchmarks/methods.py [--only cost tone stdlib topics growing] [--quick]     writes benchmarks/results/methods.json

stdlib, tone, topics: every method sees the same batches. Its learning rate is tuned on seed 0: three neighbours in steps of √10,
  and on outwards while the best stands at the edge; then the best rate runs with two more seeds. Tuning and reporting use
  different held-out examples. α is 32 throughout, the optimizer AdamW, its rate falling to zero.
growing: full fine-tuning and LoRA on `stdlib`, on a quarter and on four times the data, each token once, tuned likewise.
cost: numbers that train, bytes saved, and memory of a step of 2,048 tokens in a process of its own.

The runs are short (40 to 80 steps of 8 pairs or 1,024 tokens, about ten seconds each), so that all of it takes about 50 minutes of
one core; longer runs of fewer methods are in recovery.py and qlora.py. Times are of the processor, one thread. Finished runs are
kept in the results, so that a second call goes on. What the course shows of them is made by summary.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from alone import alone, rise
from measure import machine
from torch import nn

import lora_nb as ln
from lora_nb.blocks import Block
from lora_nb.configs import BottleneckConfig, LoraConfig

RESULT = Path(__file__).parent / "results" / "methods.json"
COMMAND = "python benchmarks/methods.py"
SEEDS = (0, 1, 2)
ALPHA = 32.0
STEP = 10**0.5  # between neighbouring rates
Numbers = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """What is attached (None: everything trains), and the rate to begin with."""

    config: LoraConfig | BottleneckConfig | None
    rate: float
    quant: str | None = None
    plus: float | None = None  # LoRA+: B's rate over A's


def lora(r: int, **settings: Any) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=ALPHA, target_modules="all-linear", **settings)


METHODS = {
    "full": Method(None, 3.16e-3),
    "LoRA r=4": Method(lora(4), 1e-2),
    "LoRA r=16": Method(lora(16), 1e-2),
    "LoRA r=64": Method(lora(64), 1e-2),
    "rsLoRA r=64": Method(lora(64, use_rslora=True), 3.16e-3),
    "DoRA r=16": Method(lora(16, use_dora=True), 1e-2),
    "LoRA+ r=16": Method(lora(16), 3.16e-3, plus=16.0),
    "Houlsby": Method(BottleneckConfig.houlsby(), 1e-2),
    "Pfeiffer": Method(BottleneckConfig.pfeiffer(), 1e-2),
    "parallel": Method(BottleneckConfig.parallel(), 3.16e-3),
    "QLoRA r=16": Method(lora(16), 1e-2, quant="nf4"),
}


@dataclass(frozen=True)
class Task:
    """How much is trained on: `steps` of `batch` rows."""

    steps: int
    batch: int


TASKS = {"tone": Task(80, 8), "stdlib": Task(40, 4), "topics": Task(60, 8)}
GROWING = {"methods": ("full", "LoRA r=16"), "steps": (10, 40, 160), "seeds": {10: SEEDS, 40: SEEDS, 160: SEEDS[:2]}}
SECTIONS = ("cost", *TASKS, "growing")


@cache
def data(task: str) -> dict[str, ln.Dataset]:
    """Blocks to train on, to tune on and to report on; of text some from every held-out file."""
    tokenizer = ln.load("tiny", device="cpu")[1]
    held = ln.dataset(task, "test")
    if held.kind == "text":
        tuning, reporting = (spread(held[i::2].encode(tokenizer, 256), count) for i, count in ((0, 32), (1, 64)))
    else:
        blocks = held.encode(tokenizer, 256)
        tuning, reporting = blocks[::3], [b for i, b in enumerate(blocks) if i % 3]
    parts = {"train": ln.dataset(task, "train").encode(tokenizer, 256), "tuning": tuning, "reporting": reporting}
    return {name: ln.Dataset(task, name, blocks) for name, blocks in parts.items()}


def spread(blocks: list[Block], count: int) -> list[Block]:
    """So many of them, evenly."""
    return [blocks[i * len(blocks) // count] for i in range(min(count, len(blocks)))]


def prepared(method: Method) -> tuple[nn.Module, Any]:
    """The embedded base with what the method trains."""
    model, tokenizer = ln.load("tiny", quant=method.quant, device="cpu")
    if method.config is None:
        model.requires_grad_(requires_grad=True)
    else:
        ln.attach(model, method.config)
    return model, tokenizer


@cache
def before(task: str, quant: str | None) -> float:
    """Bits per byte of the base, on what is reported on."""
    model, tokenizer = ln.load("tiny", quant=quant, device="cpu")
    return ln.evaluate(model, tokenizer, data(task)["reporting"]).bits_per_byte


def one_run(name: str, task: str, rate: float, seed: int, steps: int) -> Numbers:
    """Fine-tune once."""
    method, parts = METHODS[name], data(task)
    torch.manual_seed(seed)
    model, tokenizer = prepared(method)
    config = ln.TrainConfig(max_steps=steps, batch_size=TASKS[task].batch, learning_rate=rate, seed=seed, loraplus_lr_ratio=method.plus)
    start = time.process_time()
    try:
        run = ln.train(model, tokenizer, parts["train"], config)
    except ln.errors.TrainingError as error:
        return {"diverged": str(error)[:200]}
    seconds = (time.process_time() - start) / steps
    tuning, found = (ln.evaluate(model, tokenizer, parts[part]) for part in ("tuning", "reporting"))
    return {
        "tuning": tuning.bits_per_byte,
        "bits_per_byte": found.bits_per_byte,
        "tokens right": found.token_accuracy,
        "examples right": found.exact_match,
        "before": before(task, method.quant),
        "seconds a step": round(seconds, 4),
        "tokens": run.tokens,
        "losses": [round(loss, 3) for loss in run.losses],
    }


def cost(name: str) -> Numbers:
    """Memory of a step of 8 × 256 tokens above the process without a model, numbers that train, bytes saved."""
    import psutil

    torch.set_num_threads(1)
    torch.manual_seed(0)
    method = METHODS[name]
    start = psutil.Process().memory_info().rss
    model, tokenizer = prepared(method)
    gc.collect()
    loaded = psutil.Process().memory_info().rss - start
    ids = torch.randint(100, 6000, (8, 256)).tolist()
    rows = ln.Dataset("random", "train", [Block(row, row) for row in ids])
    growth, _ = rise(lambda: ln.train(model, tokenizer, rows, ln.TrainConfig(max_steps=2, warmup_steps=0, learning_rate=1e-4)), "cpu")
    with tempfile.TemporaryDirectory() as folder:
        if method.config is None:
            model.save_pretrained(folder)
        else:
            ln.save(model, Path(folder) / "adapter")
        saved = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"method": name, "trainable": trainable, "bytes saved": saved, "memory, loaded": loaded, "memory, step": growth}


def on_one_line(text: str) -> str:
    """Lists of numbers as one line each."""
    return re.sub(r"\[([\d.,\s-]+)\]", lambda found: f"[{' '.join(found[1].split())}]", text)


class Results:
    """Everything measured so far, written after each run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: Numbers = json.loads(path.read_text()) if path.exists() else {"runs": {}, "sections": {}}

    def run(self, method: str, task: str, rate: float, seed: int, steps: int) -> Numbers:
        key = f"{task} | {method} | rate {rate:.3g} | seed {seed} | {steps} steps"
        if key not in self.content["runs"]:
            start = time.perf_counter()
            self.content["runs"][key] = one_run(method, task, rate, seed, steps)
            self.write()
            bits = self.content["runs"][key].get("bits_per_byte")
            print(f"{key}: {'diverged' if bits is None else f'{bits:.4f} bits per byte'}, {time.perf_counter() - start:.0f} s", flush=True)
        return self.content["runs"][key]

    def write(self) -> None:
        self.path.parent.mkdir(exist_ok=True)
        self.content = {
            "machine": machine(),
            "command": COMMAND,
            **{k: v for k, v in self.content.items() if k not in ("machine", "command")},
        }
        self.path.write_text(on_one_line(json.dumps(self.content, indent=1)) + "\n")


def tuned(run: Callable[[float, int], Numbers], first: float, seeds: tuple[int, ...], *, quick: bool) -> tuple[float, list[Numbers]]:
    """The best rate on the tuning examples, and its runs over the seeds; `run` takes rate and seed."""
    scores: dict[int, float] = {}  # exponent of √10 → bits per byte

    def score(i: int) -> float:
        if i not in scores:
            scores[i] = run(first * STEP**i, 0).get("tuning", float("inf"))
        return scores[i]

    best = min((0,) if quick else (0, -1, 1), key=score)
    while not quick and not {best - 1, best + 1} <= scores.keys():
        score(best - 1), score(best + 1)
        best = min(scores, key=lambda i: scores[i])
    rate = first * STEP**best
    return rate, [run(rate, seed) for seed in seeds]


def row(method: str, rate: float, runs: list[Numbers], full: list[Numbers]) -> Numbers:
    """One method on one task: means over the seeds, and how far they lie apart."""
    whole = [run for run in runs if "diverged" not in run]
    if not whole:
        return {"method": method, "learning rate": float(f"{rate:.3g}"), "seeds": 0}
    bits = [run["bits_per_byte"] for run in whole]
    shares = [
        100 * (f["before"] - run["bits_per_byte"]) / (f["before"] - f["bits_per_byte"])
        for run, f in zip(runs, full, strict=False)
        if not {"diverged"} & (run.keys() | f.keys())
    ]
    return {
        "method": method,
        "learning rate": float(f"{rate:.3g}"),
        "seeds": len(whole),
        "before": round(whole[0]["before"], 4),
        "bits per byte": round(statistics.mean(bits), 4),
        "lowest and highest": [round(min(bits), 4), round(max(bits), 4)],
        "share of full's gain, %": round(statistics.mean(shares), 1) if shares else None,
        "share, lowest and highest": [round(min(shares), 1), round(max(shares), 1)] if shares else None,
        "tokens right, %": round(100 * statistics.mean(run["tokens right"] for run in whole), 1),
        "examples right, %": round(100 * statistics.mean(run["examples right"] for run in whole), 1),
        "examples right, lowest and highest": [round(100 * f(run["examples right"] for run in whole), 1) for f in (min, max)],
        "seconds a step": round(statistics.median(run["seconds a step"] for run in whole), 4),
        "losses": [run["losses"] for run in whole],
    }


def compare(task: str, results: Results, *, quick: bool) -> None:
    """All methods on one task; the rows so far are written after each."""
    steps, seeds, rows = 2 if quick else TASKS[task].steps, SEEDS[:1] if quick else SEEDS, []
    full: list[Numbers] = []
    for name, method in METHODS.items():
        rate, runs = tuned(lambda rate, seed, name=name: results.run(name, task, rate, seed, steps), method.rate, seeds, quick=quick)
        full = full or runs
        rows.append(row(name, rate, runs, full))
        results.content["sections"][task] = {"steps": steps, "batch": TASKS[task].batch, "rows": rows}
        results.write()


def grow(results: Results, *, quick: bool) -> None:
    """The same two methods on more and more text."""
    rows = []
    for steps in (1, 2) if quick else GROWING["steps"]:
        full: list[Numbers] = []
        for name in GROWING["methods"]:
            seeds = SEEDS[:1] if quick else GROWING["seeds"][steps]
            rate, runs = tuned(
                lambda rate, seed, name=name, steps=steps: results.run(name, "stdlib", rate, seed, steps),
                METHODS[name].rate,
                seeds,
                quick=quick,
            )
            full = full or runs
            found = row(name, rate, runs, full)
            rows.append({"tokens": runs[0].get("tokens"), **{key: value for key, value in found.items() if key != "losses"}})
            results.content["sections"]["growing"] = {"rows": rows}
            results.write()


def show(name: str, rows: list[Numbers]) -> None:
    names = [key for key in rows[0] if key != "losses"]
    print(f"\n{name}\n| " + " | ".join(names) + " |\n|" + " --- |" * len(names))
    for found in rows:
        print("| " + " | ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in (found.get(key) for key in names)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="these sections alone")
    parser.add_argument("--quick", action="store_true", help="two steps, one rate, one seed, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(args.out)
    sections = results.content["sections"]
    if "cost" in args.only and "cost" not in sections:
        sections["cost"] = {"rows": [alone(cost, name) for name in METHODS]}
        results.write()
    for task in TASKS:
        if task in args.only:
            compare(task, results, quick=args.quick)
    if "growing" in args.only:
        grow(results, quick=args.quick)
    for name in args.only:
        show(name, sections[name]["rows"])


if __name__ == "__main__":
    main()
