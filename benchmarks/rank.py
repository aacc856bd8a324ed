"""Is the rank that one run gives the right one, and what does the answer cost?

    python benchmarks/rank.py [--quick] [--only planted tone stdlib]        writes benchmarks/results/rank.json

planted   a linear layer learns y = (W + ΔW) x + noise, with ΔW of known rank; the noise has 0.1 or 1 times the update's power (and ten
          times, beyond what is asked). Found within ±25 %? Is the cut adapter as good as one trained at the rank found?
tone,     the embedded base at ranks 1 to 128, a run for each, and `find_rank` on the last of them: its choice beside the
stdlib    sweep's by the same rule (within 0.5 % of the lowest held-out loss), and what each of the two has cost.

Finished runs are kept, so a second call goes on. One thread.
"""

from __future__ import annotations

import os

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, machine
from torch import Tensor, nn

import lora_nb as ln

RANKS, NOISES, HARDER, SEEDS = (2, 4, 8, 12, 24), (0.1, 1.0), (10.0,), (0, 1, 2)
SIZES = {"128 × 128": (128, 4096), "256 × 256": (256, 8192)}  # width, examples
MOST, STEPS, HELD_OUT = 48, 600, 1024
SWEEP, TOLERANCE = (1, 2, 4, 8, 16, 32, 64, 128), 0.005
TEXTS = {"tone": {"max_steps": 120, "batch_size": 16, "seq_len": 128}, "stdlib": {"max_steps": 80, "batch_size": 8, "seq_len": 128}}
REPORTED = 16_000  # held-out tokens on which all is compared


class Kept:
    """Results by name, written after each."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {}

    def get(self, section: str, key: str, make: Callable[[], Any]) -> Any:
        found = self.content.setdefault(section, {}).setdefault("runs", {})
        if key not in found:
            found[key] = make()
            self.write()
            print(f"{section} | {key}: {found[key]}", flush=True)
        return found[key]

    def summary(self, section: str, summary: dict[str, Any]) -> None:
        self.content[section] = {"machine": machine(), "summary": summary, "runs": self.content[section]["runs"]}
        self.write()
        print(json.dumps({section: summary}, indent=1), flush=True)

    def write(self) -> None:
        if self.path:
            self.path.parent.mkdir(exist_ok=True)
            self.path.write_text(json.dumps(self.content, indent=1, ensure_ascii=False) + "\n")


# Planted ranks


def task(width: int, examples: int, rank: int, noise: float, seed: int) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """W (out, in), and inputs and outputs to learn from and held out; ΔW is as large as W."""
    g = torch.Generator().manual_seed(1000 * seed + rank)
    w = torch.randn(width, width, generator=g) / width**0.5
    delta = torch.randn(width, rank, generator=g) @ torch.randn(rank, width, generator=g)
    delta *= w.norm() / delta.norm()

    def draw(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, width, generator=g)
        update = x @ delta.T
        return x, x @ w.T + update + (noise**0.5 * update.std()) * torch.randn(update.shape, generator=g)

    return w, draw(examples), draw(HELD_OUT)


def fitted(w: Tensor, data: tuple[Tensor, Tensor], r: int, steps: int) -> nn.Module:
    torch.manual_seed(r)
    model = nn.Sequential(nn.Linear(w.shape[1], w.shape[0], bias=False))
    model[0].weight.data.copy_(w)
    ln.attach(model, ln.LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"]))
    optimizer = torch.optim.AdamW(ln.parameters(model).values(), lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        i = torch.randint(len(data[0]), (256,))
        (model(data[0][i]) - data[1][i]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def one_planted(size: tuple[int, int], rank: int, noise: float, seed: int, *, steps: int) -> dict[str, Any]:
    w, data, (x, y) = task(*size, rank, noise, seed)

    def losses(model: nn.Module) -> Tensor:
        return (model(x) - y).square().mean(1)

    start = time.perf_counter()
    model = fitted(w, data, MOST, steps)
    trained = time.perf_counter() - start
    report = ln.find_rank(model=model, losses=losses)
    direct = float(losses(fitted(w, data, report.rank, steps)).detach().mean())
    cut = report.scores[report.rank].loss
    return {
        "found": report.rank,
        "interval": report.interval,
        "loss, uncut": round(report.scores[MOST].loss, 5),
        "loss, cut": round(cut, 5),
        "cut / trained at that rank": round(cut / direct, 4),
        "cost / run": round(report.seconds / trained, 4),
    }


def planted(kept: Kept, *, quick: bool) -> None:
    ranks, seeds, steps = (RANKS[:2], SEEDS[:1], 60) if quick else (RANKS, SEEDS, STEPS)
    summary: dict[str, Any] = {}
    for size, shape in SIZES.items():
        for title, noises in (("noise 0.1 and 1", NOISES), ("noise 10", HARDER)):
            runs = {
                (rank, noise, seed): kept.get(
                    "planted",
                    f"{size} | rank {rank} | noise {noise:g} | seed {seed}",
                    lambda c=(shape, rank, noise, seed): one_planted(*c, steps=steps),
                )
                for rank in ranks
                for noise in noises
                for seed in seeds
            }
            near = [abs(run["found"] - rank) <= rank / 4 for (rank, _, _), run in runs.items()]
            summary[f"{size}, {title}"] = {
                "within ±25 %": f"{sum(near)} of {len(near)}",
                "exact": sum(run["found"] == rank for (rank, _, _), run in runs.items()),
                "cut / trained at that rank, worst": max(r["cut / trained at that rank"] for r in runs.values()),
                "cost / run, median": statistics.median(r["cost / run"] for r in runs.values()),
                "cost / run, worst": max(r["cost / run"] for r in runs.values()),
            }
    kept.summary("planted", summary)


# A whole sweep


def held_out(name: str, tokenizer: Any, seq_len: int) -> ln.Dataset:
    """Every so manyth block of the test split, the same for all."""
    blocks = ln.dataset(name, "test").encode(tokenizer, seq_len)
    step = max(1, sum(len(b.input_ids) for b in blocks) // REPORTED)
    return ln.dataset(blocks[::step])


def one_run(name: str, r: int, settings: dict[str, Any], *, find: bool) -> dict[str, Any]:
    """A run at one rank: its loss on the same held-out tokens as all others', its seconds, and with `find` what it says of ranks."""
    torch.manual_seed(0)
    model, tokenizer = ln.load("tiny", device="cpu")
    ln.attach(model, ln.LoraConfig(r=r, lora_alpha=32))
    held = held_out(name, tokenizer, settings["seq_len"])
    run = ln.train(model, tokenizer, ln.dataset(name), ln.TrainConfig(**settings, learning_rate=3e-3))
    found = {
        "loss": round(ln.evaluate(model, tokenizer, held, seq_len=settings["seq_len"]).loss, 5),
        "seconds": round(run.seconds, 1),
        "tokens": run.tokens,
    }
    if not find:
        return found
    polish = max(1, settings["max_steps"] // 20)
    for title, cost in (("at 5 %", 0.05), ("on all of it", 1e6)):
        report = ln.find_rank(run, eval_dataset=held, cost=cost)
        low, high = report.interval
        found[title] = {
            "rank": report.rank,
            "interval": [low, high],
            "examples": report.examples,
            "seconds": round(report.seconds, 1),
            "cost / run": round(report.seconds / run.seconds, 4),
            "loss, uncut": round(report.scores[r].loss, 5),
            "loss, cut": round(report.scores[report.rank].loss, 5),
            "saving by ranks of their own": round(report.saving, 3),
            "losses": {k: round(s.loss, 5) for k, s in report.scores.items()},
        }
    start = time.perf_counter()
    polished = ln.find_rank(run, eval_dataset=held, cost=0.05, polish=polish)
    seconds = time.perf_counter() - start
    ln.set_active(model, polished.adapter)
    loss = ln.evaluate(model, tokenizer, held, seq_len=settings["seq_len"]).loss
    found["cut and polished"] = {
        "steps": polish,
        "loss": round(loss, 5),
        "cost / run": round(seconds / run.seconds, 4),
    }
    return found


def sweep(name: str, kept: Kept, *, quick: bool) -> None:
    settings = TEXTS[name] | ({"max_steps": 3} if quick else {})
    ranks = SWEEP[:3] if quick else SWEEP
    most = ranks[-1]
    runs = {r: kept.get(name, f"rank {r}", lambda r=r: one_run(name, r, settings, find=r == most)) for r in reversed(ranks)}
    chosen = runs[most]["on all of it"]["rank"]
    if chosen not in runs:
        kept.get(name, f"rank {chosen}", lambda: one_run(name, chosen, settings, find=False))
    direct = kept.content[name]["runs"][f"rank {chosen}"]["loss"]
    lowest = min(run["loss"] for run in runs.values())
    whole, cheap = runs[most]["on all of it"], runs[most]["at 5 %"]
    kept.summary(
        name,
        {
            "chosen by the sweep": min(r for r, run in runs.items() if run["loss"] <= lowest * (1 + TOLERANCE)),
            "losses of the sweep": {r: runs[r]["loss"] for r in ranks},
            "seconds of the sweep": round(sum(run["seconds"] for run in runs.values()), 1),
            "chosen from one run": whole["rank"],
            "interval": whole["interval"],
            "loss cut to it / trained at it": round(whole["loss, cut"] / direct, 4),
            "chosen at a cost of 5 %": cheap["rank"],
            "its interval": cheap["interval"],
            "its cost / run": cheap["cost / run"],
            "cut and polished / trained at that rank": round(runs[most]["cut and polished"]["loss"] / direct, 4),
            "cost / run with the polish": runs[most]["cut and polished"]["cost / run"],
        },
    )


SECTIONS: dict[str, Callable[..., None]] = {
    "planted": planted,
    "tone": lambda kept, quick: sweep("tone", kept, quick=quick),
    "stdlib": lambda kept, quick: sweep("stdlib", kept, quick=quick),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="everything at a tiny size, to see that it runs; writes only with --out")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    kept = Kept(args.out or (None if args.quick else RESULTS / "rank.json"))
    for name in args.only:
        SECTIONS[name](kept, quick=args.quick)


if __name__ == "__main__":
    main()
