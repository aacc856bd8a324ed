"""What adapters cost at inference: merged and unmerged LoRA, DoRA, three bottleneck adapters and four bits, beside PEFT's LoRA and DoRA.

    python benchmarks/latency.py [--quick] [--only 5.8M 27M 124M batch-5.8M batch-27M batch-124M] [--threads 1 2] [--processor-time]

Writes benchmarks/results/latency.json. All variants of a shape share their weights and take turns; ratios are of one round. Three
shapes of Llama: the embedded base, 27M and 124M parameters; every linear layer adapted, r=8, α=20, in fp32.
On a machine that others use, too, `--threads 1 --processor-time` counts the time that the processor gave to this process alone.
The `batch-…` sections repeat decoding with more rows, to find from how many on an adapter stops costing (within 3 % of the base).
"""

from __future__ import annotations

import os

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from measure import RESULTS, machine
from peers import LORA, llama
from torch import nn

import lora_nb as ln
from lora_nb.variants import sharing

Clock = Callable[[], float]
PROMPT = 64
SHAPES = ("5.8M", "27M", "124M")
ROUNDS = {"5.8M": 60, "27M": 30, "124M": 14}
BATCHES = (1, 4, 16, 64)
MERGED = "LoRA, merged"
# What the ratios should be: (shape, phase, variant, over) → least and most.
TARGETS = {(shape, phase, MERGED, "base"): (0.97, 1.03) for shape in SHAPES for phase in ("decode", "prefill")} | {
    ("124M", "decode", "LoRA", "base"): (0.0, 1.06),
    ("5.8M", "decode", "LoRA", "base"): (0.0, 1.12),
    **{(shape, "decode", "LoRA", "PEFT LoRA"): (0.0, 1.0) for shape in SHAPES},
    **{(shape, "decode", "DoRA", "LoRA"): (0.0, 1.5) for shape in SHAPES},
}


def models(shape: str) -> dict[str, nn.Module]:
    """Ours by `variants`, PEFT's around the same weights; their LoRA and DoRA start as the base, and so are checked to compute it."""
    base = llama(shape).requires_grad_(requires_grad=False)
    dora = {**LORA, "use_dora": True}
    made = ln.variants(
        base,
        {
            "LoRA": ln.LoraConfig(**LORA),
            "DoRA": ln.LoraConfig(**dora),
            "Houlsby": ln.BottleneckConfig.houlsby(),
            "Pfeiffer": ln.BottleneckConfig.pfeiffer(),
            "parallel": ln.BottleneckConfig.parallel(),
            "NF4": ln.QuantConfig(),
        },
    )
    made["PEFT LoRA"] = peft.get_peft_model(sharing(base), peft.LoraConfig(**LORA)).eval()
    made["PEFT DoRA"] = peft.get_peft_model(sharing(base), peft.LoraConfig(**dora)).eval()
    del made["DoRA, merged"]  # the same plain layers as LoRA's
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        for name in ("LoRA", MERGED, "DoRA", "PEFT LoRA", "PEFT DoRA"):
            if not torch.allclose(made[name](input_ids=ids).logits, expected, atol=1e-3, rtol=1e-3):
                raise SystemExit(f"{name} does not compute what the base does: nothing is measured.")
    return made


def single(shape: str, clock: Clock, *, quick: bool) -> list[dict[str, Any]]:
    """Every variant, one row: a token more, and a prompt."""
    made, rows = models("quick" if quick else shape), []
    for phase in ("decode", "prefill"):
        rounds = 2 if quick else ROUNDS[shape] if phase == "decode" else max(8, ROUNDS[shape] // 2)
        tables = {"base": ln.measure_latency(made, phase=phase, seq_len=PROMPT, rounds=rounds, clock=clock)}
        print(tables["base"], flush=True)
        over = sorted({o for s, p, _, o in TARGETS if (s, p) == (shape, phase) and o != "base"})
        pairs = [(n, o) for s, p, n, o in TARGETS if (s, p) == (shape, phase) and o in over]
        for name, other in pairs:
            pair = ln.measure_latency({other: made[other], name: made[name]}, phase=phase, seq_len=PROMPT, rounds=rounds, clock=clock)
            rows.append(row(shape, pair, name))
        rows += [row(shape, tables["base"], name) for name in made if name != "base"]
    return rows


def by_batch(shape: str, clock: Clock, *, quick: bool) -> list[dict[str, Any]]:
    """Decoding with more and more rows."""
    made = models("quick" if quick else shape)
    few = {name: made[name] for name in ("base", "LoRA", "Houlsby", "parallel", "PEFT LoRA")}
    rounds = 2 if quick else max(5, ROUNDS[shape] // 6)
    sweep = ln.sweep_latency(few, batch_sizes=BATCHES[:2] if quick else BATCHES, seq_lens=(PROMPT,), rounds=rounds, clock=clock)
    print(sweep, flush=True)
    free = {name: sweep.free_from(name)[PROMPT] for name in few if name != "base"}
    print({"from this batch on within 3 % of the base": free}, flush=True)
    return [row(shape, table, name) | {"free from batch": free[name]} for table in sweep.tables for name in few if name != "base"]


def row(shape: str, table: ln.LatencyTable, name: str) -> dict[str, Any]:
    target = TARGETS.get((shape, table.phase, name, table.reference)) if table.batch_size == 1 else None
    ratio = table.ratios[name]
    met = {} if target is None else {"target": list(target), "met": target[0] <= ratio <= target[1]}
    return {
        "shape": shape,
        "phase": table.phase,
        "batch": table.batch_size,
        "variant": name,
        "over": table.reference,
        "ratio": round(ratio, 4),
        "middle half": [round(r, 4) for r in table.spread[name]],
        "milliseconds": round(1000 * table.seconds[name], 3),
        "operations": table.operations[name],
        "operations of the other": table.operations[table.reference],
        **met,
    }


SECTIONS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    **{shape: lambda clock, quick, shape=shape: single(shape, clock, quick=quick) for shape in SHAPES},
    **{f"batch-{shape}": lambda clock, quick, shape=shape: by_batch(shape, clock, quick=quick) for shape in SHAPES},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="everything at a tiny size, to see that it runs; writes only with --out")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--processor-time", action="store_true", help="not the clock's time but this process' own")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # a name that PEFT 0.21 still reads
    out = args.out or (None if args.quick else RESULTS / "latency.json")
    found = json.loads(out.read_text()) if out and out.exists() else {}  # sections that are not measured now stay
    for name in args.only:
        for threads in args.threads:
            torch.set_num_threads(threads)
            print(f"\n{name}, {threads} thread{'s' * (threads > 1)}")
            busy = os.getloadavg()[0]  # what else ran: ratios bear it, with a wider spread
            rows = SECTIONS[name](time.process_time if args.processor_time else time.perf_counter, args.quick)
            about = machine() | {"peft": peft.__version__, "load before": round(busy, 1), "load after": round(os.getloadavg()[0], 1)}
            about["time"] = "of the processor" if args.processor_time else "of the clock"
            found[f"{name}, {threads} threads"] = {"machine": about, "rows": rows}
            if out:
                out.parent.mkdir(exist_ok=True)
                out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
