"""Hundreds of adapters served for a long time, while they come, go and break: no wrong text, no leak, nobody stuck, a clean stop.

    python benchmarks/soak.py [--minutes 20] [--adapters 237] [--out FILE]        writes benchmarks/results/soak.json

Requests arrive at random, for a few adapters often and for most seldom; some are cancelled, some have little time, now and then far too
many come at once. Some folders are broken or of another base, some vanish and come back. Every text that was written is compared with the
one that `ln.generate` wrote for its adapter alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
from measure import RESULTS, machine
from torch import nn

import lora_nb as ln
from lora_nb.errors import AdapterError, QueueFullError
from lora_nb.tickets import Ticket

PROMPTS = ["The old man opened the door and", "Could you please", "She had never", "In the morning, when the rain had stopped, and"]
TOKENS, SLOTS, HOST, STUCK = 12, 16, 64, 300.0
NEAR = 1e-3  # two tokens whose logits differ by less may change places: a batch rounds otherwise than a single row
SPOILT = ("broken weights", "no weights", "broken config", "another base", "nan")


def make_adapters(folder: Path, count: int) -> dict[str, tuple[str, ...]]:
    """Saved adapters of several ranks, targets and kinds; name → what each writes after the prompts when it is alone."""
    model, tokenizer = ln.load("tiny", device="cpu")
    kinds = [
        ln.LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "v_proj"]),
        ln.LoraConfig(r=8, lora_alpha=12, target_modules="all-linear"),
        ln.LoraConfig(r=16, lora_alpha=20, target_modules="all-linear", use_rslora=True),
        ln.LoraConfig(r=6, lora_alpha=10, target_modules=["gate_proj", "up_proj", "down_proj"]),
        ln.LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "o_proj"], use_dora=True),
    ]
    expected: dict[str, tuple[str, ...]] = {"": tuple(ln.generate(model, tokenizer, PROMPTS, max_new_tokens=TOKENS))}
    for i in range(count):
        name = f"adapter-{i:03}"
        ln.attach(model, kinds[i % len(kinds)] if i % 20 else kinds[-1], name)
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for key, p in ln.parameters(model, name).items():
                if key.endswith("lora_B"):
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
        ln.save(model, folder / name)
        expected[name] = tuple(ln.generate(model, tokenizer, PROMPTS, max_new_tokens=TOKENS))
        ln.detach(model)
    return expected


def spoil(folder: Path, good: str) -> list[str]:
    """Folders that must be refused."""
    names = []
    for i, how in enumerate(SPOILT * 2):
        name = f"spoilt-{i}"
        shutil.copytree(folder / good, folder / name)
        weights, config = folder / name / "adapter_model.safetensors", folder / name / "adapter_config.json"
        if how == "broken weights":
            weights.write_bytes(weights.read_bytes()[: 1000 + 37 * i])
        elif how == "no weights":
            weights.unlink()
        elif how == "broken config":
            config.write_text('{"peft_type": "LORA", "r": ')
        else:
            raw = bytearray(weights.read_bytes())
            if how == "nan":
                raw[-4:] = b"\x00\x00\xc0\x7f"
            else:
                raw = re.sub(rb'("base_fingerprint\w*":")(.)', lambda m: m[1] + (b"1" if m[2] == b"0" else b"0"), raw)
            weights.write_bytes(bytes(raw))
        names.append(name)
    return names


def near_tie(folder: Path, name: str, prompt: str, written: str, expected: str) -> bool:
    """Whether two texts part where two tokens are as good as equal."""
    model, tokenizer = ln.load("tiny", device="cpu")
    if name:
        ln.load_adapter(model, folder / name, name)
    ids = [[tokenizer.bos_token_id, *tokenizer(prompt + " " + t.lstrip())["input_ids"]] for t in (written, expected)]
    same = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), 0)
    with torch.no_grad():
        best = model(input_ids=torch.tensor([ids[1][:same]])).logits[0, -1].topk(2).values
    return bool(best[0] - best[1] < NEAR)


class Soak:
    """Sends requests, keeps count, and compares."""

    def __init__(self, folder: Path, expected: dict[str, tuple[str, ...]], spoilt: list[str], seed: int) -> None:
        self.folder, self.expected, self.spoilt, self.rng = folder, expected, spoilt, random.Random(seed)
        self.names = sorted(expected)
        self.loose = set(self.names[2::8])  # these vanish and come back
        self.away: set[str] = set()
        self.count: Counter[str] = Counter()
        self.open: list[tuple[Ticket, str, int]] = []
        self.wrong: list[tuple[str, int, str]] = []
        self.failures: list[str] = []

    def send(self, server: ln.AdapterServer) -> None:
        """One request for somebody."""
        rank = min(int(self.rng.paretovariate(0.6)), len(self.names)) - 1
        name = self.rng.choice(self.spoilt) if self.rng.random() < 0.03 else self.names[rank]
        which = self.rng.randrange(len(PROMPTS))
        limit = self.rng.choice([0.05, 0.5]) if self.rng.random() < 0.05 else None
        try:
            ticket = server.submit(PROMPTS[which], name or None, max_new_tokens=TOKENS, time_limit=limit)
        except QueueFullError:
            self.count["refused: queue full"] += 1
        except AdapterError:
            self.count["refused: no such adapter"] += 1
            if name not in self.away and name in self.expected:
                self.failures.append(f"{name} is there, but was refused")
        else:
            self.count["sent"] += 1
            self.open.append((ticket, name, which))

    def collect(self) -> None:
        """What has ended, and who waits for too long."""
        still = []
        for ticket, name, which in self.open:
            if ticket.done:
                self.judge(ticket, name, which)
            else:
                still.append((ticket, name, which))
                if time.monotonic() - ticket.made > STUCK:
                    self.failures.append(f"a request for {name!r} is stuck")
        self.open = still

    def judge(self, ticket: Ticket, name: str, which: int) -> None:
        reason = str(ticket.finish_reason)
        if name in self.spoilt and reason not in {"error", "cancelled", "time_limit"}:
            self.failures.append(f"{name} was served")
        if reason == "error" and name not in self.spoilt and name not in self.loose:
            self.failures.append(f"{name}: {ticket.error}")
        self.count[f"ended: {reason}"] += 1
        text, whole = ticket.text().strip() if ticket.error is None else "", self.expected.get(name, ("",) * 4)[which]
        if (reason in {"stop", "length"} and text != whole) or (text and not whole.startswith(text.rstrip("\ufffd"))):
            self.wrong.append((name, which, text))

    def move_one(self) -> None:
        """An adapter vanishes, or comes back."""
        name = self.rng.choice(sorted(self.loose))
        here, there = self.folder / name, self.folder / f".away-{name}"
        if name in self.away:
            there.rename(here)
            self.away.discard(name)
        else:
            self.away.add(name)
            here.rename(there)
        self.count["moves of folders"] += 1

    def run(self, server: ln.AdapterServer, seconds: float) -> list[tuple[float, float]]:
        """Seconds since the start and resident MiB, every two seconds."""
        process, memory, start = psutil.Process(), [], time.monotonic()
        sampled = said = 0.0
        while (now := time.monotonic() - start) < seconds and not self.failures:
            for _ in range(300 if self.rng.random() < 0.002 else self.rng.randrange(3)):
                self.send(server)
            while len(self.open) > 40 and self.rng.random() < 0.9:  # mostly they wait for one another
                time.sleep(0.01)
                self.collect()
            if self.open and self.rng.random() < 0.1:
                self.rng.choice(self.open)[0].cancel()
            if self.rng.random() < 0.02:
                self.move_one()
            self.collect()
            time.sleep(self.rng.expovariate(1 / 0.03))
            if now - sampled > 2:
                sampled = now
                gc.collect()
                memory.append((round(now, 1), process.memory_info().rss / 2**20))
            if now - said > 30:
                said = now
                print(f"{now:6.0f} s  {memory[-1][1]:.0f} MiB  {len(self.open)} open  {dict(self.count)}", flush=True)
        return memory


def soak(minutes: float, adapters: int, seed: int = 0) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        expected = make_adapters(folder, adapters)
        task = Soak(folder, expected, spoil(folder, "adapter-001"), seed)
        print(f"{adapters} adapters are made", flush=True)
        model, tokenizer = ln.load("tiny", device="cpu")
        before, threads = {n: p.clone() for n, p in model.state_dict().items()}, threading.active_count()
        server = ln.AdapterServer(model, tokenizer, SLOTS, HOST, folder=folder)
        memory = task.run(server, 60 * minutes)
        figures = server.figures()
        print(figures)
        end = time.monotonic()
        while task.open and time.monotonic() - end < STUCK:
            task.collect()
            time.sleep(0.05)
        task.failures += [f"a request for {name!r} never ended" for _, name, _ in task.open]
        server.close()
        if threading.active_count() > threads:
            task.failures.append(f"threads are left: {[t.name for t in threading.enumerate()]}")
        after = model.state_dict()
        if before.keys() != after.keys() or any(not torch.equal(before[n], after[n]) for n in before):
            task.failures.append("the base is not what it was")
        if any(type(m).__name__.startswith("Adapted") for m in model.modules() if isinstance(m, nn.Module)):
            task.failures.append("adapters are left on the model")
        for name in list(task.away):
            (folder / f".away-{name}").rename(folder / name)
        known = [w for w in task.wrong if w[0] in expected]
        ties = [w for w in known if near_tie(folder, w[0], PROMPTS[w[1]], w[2], expected[w[0]][w[1]])]
    return verdict(task, memory, figures, len(ties), minutes)


def verdict(task: Soak, memory: list[tuple[float, float]], figures: Any, ties: int, minutes: float) -> dict[str, Any]:
    warm = [m for t, m in memory if 15 * minutes <= t < 20 * minutes]  # the fourth and fifth part of fifteen
    late = [m for t, m in memory if t >= 45 * minutes]  # the last quarter
    growth = statistics.median(late) / statistics.median(warm) - 1 if warm and late else None
    rows = {
        "minutes": minutes,
        "adapters": len(task.expected) - 1,
        "requests": dict(task.count),
        "tokens": figures.tokens,
        "steps": figures.steps,
        "loads": sum(figures.loads.values()),
        "wrong rows": len(task.wrong) - ties,
        "rows that part at a tie of two tokens": ties,
        "failures": task.failures,
        "resident MiB after warm-up": round(statistics.median(warm), 1) if warm else None,
        "resident MiB at the end": round(statistics.median(late), 1) if late else None,
        "growth of memory": None if growth is None else round(growth, 4),
        "memory by time": [(t, round(m, 1)) for t, m in memory[:: max(1, len(memory) // 60)]],
    }
    met = not task.failures and len(task.wrong) == ties and growth is not None and growth <= 0.05
    return {**rows, "target": "no wrong row, memory flat within 5 %, no stuck request, clean stop", "met": "yes" if met else "no"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--adapters", type=int, default=237)
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    found = soak(settings.minutes, settings.adapters)
    settings.out.write_text(json.dumps({"machine": machine(), **found}, indent=2) + "\n")
    print({k: v for k, v in found.items() if k != "memory by time"})
    sys.exit(found["met"] != "yes")


if __name__ == "__main__":
    main()
