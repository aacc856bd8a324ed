"""What the package makes of a CUDA GPU, each figure against a peer in the same run.

    python benchmarks/gpu.py [--only nf4 mixed …] [--minutes 9]      writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --cpu [--out FILE]                      the same code at a tiny size on a CPU, to see that it runs

It builds nothing and downloads nothing: models are of known shapes with random weights. First every kernel is tried against its twin in
plain PyTorch. Single kernels are timed within CUDA graphs, over more tensors in turn than the card's cache holds, training steps as the
public loop makes them, all by CUDA's events; variants take turns, and ratios are medians over the rounds. What no longer fits into the
time is left out by name; so is what fails, with its reason, and the others go on.
"""

from __future__ import annotations

import os

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # the largest steps come near to what a card has

import argparse
import json
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import loss, mixed, nf4, products, tries
from gpu_memory import memory
from gpu_steps import share, step
from measure import RESULTS, machine
from on_gpu import Bench, free, until

warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # a name that PEFT 0.21 still reads

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "nf4": nf4,
    "loss": loss,
    "products": products,
    "mixed": mixed,
    "step-1B": partial(step, shape="1B", targets=("≤ 0.75", "≤ 0.6")),
    "step-8B": partial(step, shape="8B", targets=("≤ 0.75", "≤ 0.6")),
    "qlora-8B": partial(step, shape="8B", targets=("≤ 0.85", "≤ 0.7"), quantized=True),
    "share": share,
    "memory": memory,
}


def versions(on: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("bitsandbytes", "peft", "transformers", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    if on == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= {"device": card.name, "memory, GiB": round(card.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return found


def measured(name: str, bench: Bench) -> bool:
    """Whether that section could be measured. One that could not is a line of the table, with its reason, and takes no other along."""
    if bench.is_late():
        bench.add(name, None, note="left out: the time was over")
        return True
    try:
        with until(bench.deadline):
            SECTIONS[name](bench)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - by whatever it fails, the rest is to be seen
        traceback.print_exc(limit=-5)
        bench.add(name, None, note=f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=9.0, help="after which it ends; what would begin in the last one is left out")
    parser.add_argument("--cpu", action="store_true", help="everything at a tiny size on the CPU; writes only with --out")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        print("No CUDA GPU here, so nothing is measured. With --cpu everything runs at a tiny size, to see that it runs.")
        return
    began = time.monotonic() - time.process_time()  # what was imported counts, too
    bench = Bench("cpu" if args.cpu else "cuda", began + 60 * args.minutes)
    said = machine() | versions(bench.on)
    agree = tries(bench)
    out = args.out or (None if args.cpu else RESULTS / "gpu.json")

    def write() -> None:
        rows = [asdict(row) | {"met": row.met} for row in bench.lines]
        if out:
            out.parent.mkdir(exist_ok=True)
            content = {"machine": said, "kernels": agree, "rows": rows, "memory": bench.cases}
            out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    print("\n".join(f"{name}: {outcome}" for name, outcome in (said | agree).items()))
    print("| measure | measured | target | met | |\n|" + " --- |" * 5)
    write()
    failed = []
    for name in args.only:
        if not measured(name, bench):
            failed.append(name)
        write()  # after each section, should the next one be the last
        free(bench.on)
    if failed:
        raise SystemExit(f"Not measured, for reasons in the table: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
