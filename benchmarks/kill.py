"""Can a run be lost? It is killed (SIGKILL) at random moments and resumed each time, until it is done; then its adapter is compared.

    python benchmarks/kill.py [--kills 50] [--disk-full 20]     writes benchmarks/results/kill.json

Every trial is a run of its own with a checkpoint every other step, killed once at a moment drawn evenly from its whole life (start of
Python excepted), then resumed until it ends. It passes if the final adapter and all losses are those of a run that nobody killed, bit for
bit. The disk that is full is one that refuses a write after a random number of bytes of a checkpoint; the checkpoint before must stay
whole, and the run must resume from it to the same end.
"""

from __future__ import annotations

import os

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import errno
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import RESULTS, machine

STEPS, EVERY = 12, 2


def run(folder: str, resume: str) -> None:
    """One life of the run, in a process of its own; its last line is what came of it."""
    print("begun", flush=True)
    print(json.dumps(train(Path(folder), resume=resume == "resume")), flush=True)


def train(folder: Path, *, resume: bool) -> dict[str, Any]:
    import torch

    import lora_nb as ln

    torch.set_num_threads(1)
    model, tokenizer = ln.load("tiny", device="cpu")
    torch.manual_seed(0)
    ln.attach(model, ln.LoraConfig(r=4, lora_alpha=10, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]))
    settings = {"max_steps": STEPS, "batch_size": 4, "seq_len": 64, "gradient_accumulation_steps": 2, "eval_every": 4}
    config = ln.TrainConfig(**settings, checkpoint_dir=folder, checkpoint_every=EVERY, resume=resume)
    done = ln.train(model, tokenizer, ln.dataset("tone")[:64], config, eval_dataset=ln.dataset("tone", "test")[:4])
    adapter = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for _, p in sorted(ln.parameters(model).items()))).hexdigest()
    return {"adapter": adapter, "losses": done.losses, "eval_losses": done.eval_losses, "steps": done.steps, "stopped_by": done.stopped_by}


def begin(folder: Path, *, resume: bool) -> subprocess.Popen[str]:
    """A life, once it has begun: Python and this file are loaded."""
    words = [sys.executable, __file__, "--run", str(folder), "resume" if resume else "anew"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    process.stdout.readline()
    return process


def outcome(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"A run that nobody killed ended with {process.returncode}.")
    return dict(json.loads(out.strip().splitlines()[-1]))


def killed_and_resumed(after: float, expected: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One trial: what the kill met, and whether the end is the same."""
    process = begin(folder, resume=False)
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = sorted(p.name for p in folder.glob("*")) + sorted(p.name for p in folder.glob(".*"))
    found = outcome(begin(folder, resume=True))
    return {"after_seconds": round(after, 3), "died": process.returncode == -signal.SIGKILL, "left": left, "same": found == expected}


def kills(count: int, seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        expected = outcome(begin(Path(folder) / "whole", resume=False))
        life = time.perf_counter() - start
        trials: list[dict[str, Any]] = []
        while len(trials) < count:
            trial = killed_and_resumed(draw.uniform(0, life), expected, Path(folder) / f"trial-{len(trials)}-{draw.random()}")
            if trial["died"]:  # else the run was over before its time
                trials.append(trial)
                print(
                    f"kill {len(trials)} of {count} after {trial['after_seconds']:.2f} s: {'the same' if trial['same'] else 'ANOTHER END'}",
                    flush=True,
                )
    same = sum(t["same"] for t in trials)
    return {"same": same, "kills": count, "life_seconds": round(life, 2), "expected": expected, "trials": trials}


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Files take `room` bytes in all; the write that goes beyond is cut short and fails, as on a full disk."""
    import builtins
    import io

    left, plain = [room], io.open

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if len(data) > left[0]:
                super().write(memoryview(data)[: left[0]])
                left[0] = 0
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left[0] -= len(data)
            return super().write(data)

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return io.BufferedWriter(Full(file, mode)) if mode == "wb" and str(file).endswith(".tmp") else plain(file, mode, *args, **kwargs)

    io.open = builtins.open = opened  # type: ignore[assignment] # pathlib asks the first, everyone else the second
    try:
        yield
    finally:
        io.open = builtins.open = plain


def disks(count: int, seed: int) -> dict[str, Any]:
    """In this process: the disk fills up in a checkpoint; then there is room again and the run is resumed."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = train(folder / "whole", resume=False)
        size = max(p.stat().st_size for p in (folder / "whole").glob("*.safetensors"))
        trials = []
        for i in range(count):
            here, room = folder / str(i), draw.randrange(size * STEPS // EVERY)
            with full_disk(room), warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                through = train(here, resume=False)
            left = sorted(p.name for p in here.glob("*.safetensors"))
            warned = any("cannot be written" in str(w.message) for w in said)
            same = train(here, resume=True) | {"stopped_by": ""} == expected | {"stopped_by": ""}
            trials.append({"room_bytes": room, "warned": warned, "left": left, "ran_on": through == expected, "same": same})
            print(f"disk full after {room:,} bytes: left {', '.join(left) or 'none'}; {'the same' if same else 'ANOTHER END'}", flush=True)
    good = sum(t["same"] and t["ran_on"] and t["warned"] and len(t["left"]) == min(2, t["room_bytes"] // size) for t in trials)
    return {"whole": good, "disks": count, "checkpoint_bytes": size, "trials": trials}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--disk-full", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "kill.json")
    parser.add_argument("--run", nargs=2, metavar=("FOLDER", "HOW"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(*args.run)
        return
    found = {"machine": machine(), "kill": kills(args.kills, args.seed), "disk_full": disks(args.disk_full, args.seed)}
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"killed: the same end {found['kill']['same']} of {args.kills}")
    print(f"disk full: the checkpoint before whole, the same end {found['disk_full']['whole']} of {args.disk_full}")


if __name__ == "__main__":
    main()
