"""How much of full fine-tuning's gain does LoRA recover? Held-out bits per byte on `stdlib`, rates tuned, three seeds.

    python benchmarks/recovery.py [--jobs 2] [--steps 80]        writes benchmarks/results/recovery.json

Every method sees the same batches. For each, the learning rate is tuned on seed 0: three neighbours in steps of √10, and
on outwards while the best stands at the edge. Then the best rate runs with two more seeds. Tuning and reporting use
different held-out files, so the rate is not chosen on what is reported. Finished runs are kept, so a second call goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "recovery.json"
METHODS = {"full": 0, "lora r=4": 4, "lora r=8": 8, "lora r=32": 32}
FIRST_RATE = {"full": 1e-3, "lora r=4": 3.16e-3, "lora r=8": 3.16e-3, "lora r=32": 3.16e-3}
SEEDS = (0, 1, 2)
ALPHA = 32.0


def one_run(rank: int, rate: float, seed: int, steps: int) -> dict[str, float]:
    """Fine-tune the embedded base once; rank 0 is full fine-tuning."""
    import torch

    import lora_nb as ln

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, tokenizer = ln.load("tiny", device="cpu")
    held = ln.dataset("stdlib", "test")
    tuning, reporting = held[0::2], held[1::2]
    before = ln.evaluate(model, tokenizer, reporting, max_blocks=160)
    report = ln.attach(model, ln.LoraConfig(r=rank, lora_alpha=ALPHA)) if rank else None
    if not rank:
        model.requires_grad_(requires_grad=True)
    config = ln.TrainConfig(max_steps=steps, batch_size=8, seq_len=256, learning_rate=rate, seed=seed, lr_scheduler_type="linear")
    start = time.perf_counter()
    try:
        run = ln.train(model, tokenizer, ln.dataset("stdlib", "train"), config)
    except ln.errors.TrainingError:
        return {"tuning": float("inf"), "bits_per_byte": float("inf"), "before": before.bits_per_byte, "seconds": 0.0, "trainable": 0}
    return {
        "tuning": ln.evaluate(model, tokenizer, tuning, max_blocks=80).bits_per_byte,
        "bits_per_byte": ln.evaluate(model, tokenizer, reporting, max_blocks=160).bits_per_byte,
        "before": before.bits_per_byte,
        "seconds": time.perf_counter() - start,
        "tokens": run.tokens,
        "trainable": report.trainable if report else sum(p.numel() for p in model.parameters()),
    }


class Results:
    """Runs by name, written after each."""

    def __init__(self, path: Path, steps: int) -> None:
        self.path, self.steps = path, steps
        self.runs: dict[str, dict[str, float]] = json.loads(path.read_text())["runs"] if path.exists() else {}

    def get(self, method: str, rate: float, seed: int) -> dict[str, float]:
        key = f"{method} | rate {rate:.3g} | seed {seed} | {self.steps} steps"
        if key not in self.runs:
            words = [sys.executable, __file__, "--one", str(METHODS[method]), str(rate), str(seed), str(self.steps)]
            done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            self.runs[key] = json.loads(done.stdout.splitlines()[-1])
            self.path.parent.mkdir(exist_ok=True)
            self.path.write_text(json.dumps({"runs": self.runs}, indent=1))
            print(f"{key}: {self.runs[key]['bits_per_byte']:.4f} bits per byte, {self.runs[key]['seconds']:.0f} s", flush=True)
        return self.runs[key]


def tuned(method: str, results: Results) -> tuple[float, list[dict[str, float]]]:
    """The best rate on the tuning files, and its runs over all seeds."""
    scores: dict[int, float] = {}  # exponent of √10 → bits per byte on the tuning files

    def score(i: int) -> float:
        if i not in scores:
            scores[i] = results.get(method, FIRST_RATE[method] * 10 ** (i / 2), 0)["tuning"]
        return scores[i]

    best = min((-1, 0, 1), key=score)
    while (best - 1 not in scores) or (best + 1 not in scores):
        score(best - 1), score(best + 1)
        best = min(scores, key=lambda i: scores[i])
    rate = FIRST_RATE[method] * 10 ** (best / 2)
    return rate, [results.get(method, rate, seed) for seed in SEEDS]


def table(found: dict[str, tuple[float, list[dict[str, float]]]]) -> list[dict[str, object]]:
    full = found["full"][1]
    rows: list[dict[str, object]] = []
    for method, (rate, runs) in found.items():
        bits = [r["bits_per_byte"] for r in runs]
        share = [100 * (r["before"] - r["bits_per_byte"]) / (f["before"] - f["bits_per_byte"]) for r, f in zip(runs, full, strict=True)]
        rows.append(
            {
                "method": method,
                "trainable": int(runs[0]["trainable"]),
                "learning rate": float(f"{rate:.3g}"),
                "bits per byte, before": round(runs[0]["before"], 4),
                "after, mean": round(statistics.mean(bits), 4),
                "after, spread": round(max(bits) - min(bits), 4),
                "share of full's gain, %": round(statistics.mean(share), 1),
                "share, lowest": round(min(share), 1),
                "share, highest": round(max(share), 1),
            }
        )
    return rows


def main() -> None:
    if "--one" in sys.argv:
        rank, rate, seed, steps = sys.argv[sys.argv.index("--one") + 1 :]
        print(json.dumps(one_run(int(rank), float(rate), int(seed), int(steps))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of 2,048 tokens")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()

    results = Results(args.out, args.steps)
    with ThreadPoolExecutor(args.jobs) as pool:
        found = dict(zip(METHODS, pool.map(lambda m: tuned(m, results), METHODS), strict=True))
    rows = table(found)
    import torch

    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, one thread a run; Python {platform.python_version()}, torch {torch.__version__}"
    )
    today = datetime.now(tz=UTC).date().isoformat()
    content = {"date": today, "machine": machine, "steps": args.steps, "table": rows, "runs": results.runs}
    args.out.write_text(json.dumps(content, indent=1))
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + " --- |" * len(names))
    for row in rows:
        print("| " + " | ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()) + " |")


if __name__ == "__main__":
    main()
