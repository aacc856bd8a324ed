"""Four bits against bitsandbytes on the CPU, 4096 × 4096: ratios of times of the same round, bitsandbytes' being 1.

    python benchmarks/nf4.py [--only dequantize|warm|quantize|linear|accuracy] [--threads 1 2] [--quick]
                                                                        writes benchmarks/results/nf4.json

dequantize: each through its public call, and each call's result dropped before the next. bitsandbytes takes new memory from the
  allocator every time and spends most of that call on page faults; ours uses the memory of the dropped result again.
warm: without page faults on either side. bitsandbytes' public call takes no output on a CPU, so its kernel is called by itself
  into one that is used again and again.
linear: 256 tokens in bfloat16 through a layer that trains (bitsandbytes has another way for evaluation, which rounds its scales).
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import torch
from bitsandbytes.cextension import lib
from measure import RESULTS, interleaved, machine
from torch import Tensor, nn

from lora_nb.layers.linear4bit import Linear4bit
from lora_nb.layers.nf4 import dequantize, dequantize_textbook, quantize
from lora_nb.layers.quantized import QuantizedTensor

SIZE, TOKENS = 4096, 256
TARGETS = {
    "dequantize to float32": 0.6,
    "dequantize to bfloat16": 1.0,
    "warm, to float32": 5.0,
    "warm, to bfloat16": 9.0,
    "quantize": 0.5,
    "linear, forward": 1.25,
    "linear, forward, over dense bfloat16": 1.35,
    "linear, forward and backward": 1.25,
    "bits a weight, double quantization": 4.127,
    "relative L2 error, Gaussian weights": 0.0920,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Row = dict[str, Any]


class Bench:
    """Measures, and keeps the rows."""

    def __init__(self, threads: int, rounds: int) -> None:
        self.threads, self.rounds = threads, rounds
        self.rows: list[Row] = []

    def times(self, measure: str, peer: str, variants: dict[str, Callable[[], object]]) -> None:
        """A row of the ratio of "ours" over the peer; other variants besides."""
        times = interleaved(variants, rounds=self.rounds)
        ratio = times.ratio("ours", peer)
        besides = {f"{name} over {peer}": times.ratio(name, peer) for name in variants if name not in {"ours", peer}}
        spread = times.spread("ours", peer) if self.rounds > 1 else (ratio, ratio)
        milliseconds = {name: round(1e3 * times.median(name), 3) for name in variants}
        self.add(measure, ratio, {"middle half": spread, "ms": milliseconds, **besides})

    def add(self, measure: str, value: float, more: Row) -> None:
        target = TARGETS[measure]
        close = measure.startswith(("bits", "relative"))
        met = abs(value - target) <= 5e-4 if close else value <= target
        row = {"threads": self.threads, "measure": measure, "value": value, "target": target, "met": "yes" if met else "no", **more}
        self.rows.append(row)
        print(f"{self.threads} thread(s)  {measure}: {value:.4g} (target {target}) {row['met']}  {more}", flush=True)


def pair(weight: Tensor, dtype: torch.dtype) -> tuple[Callable[[], Tensor], QuantizedTensor]:
    """bitsandbytes' call, and our tensor of the same bytes; shown to give the same bits."""
    packed, state = bnbf.quantize_4bit(weight.to(dtype), quant_type="nf4")
    ours = quantize(weight.to(dtype))
    assert torch.equal(packed, ours.packed)
    assert torch.equal(state.absmax, ours.absmax)
    assert torch.equal(bnbf.dequantize_4bit(packed, state), dequantize(ours))
    assert torch.equal(dequantize_textbook(ours), dequantize(ours))
    return lambda: bnbf.dequantize_4bit(packed, state), ours


def bench_dequantize(bench: Bench, weight: Tensor) -> None:
    for name, dtype in DTYPES.items():
        theirs, ours = pair(weight, dtype)
        bench.times(f"dequantize to {name}", "bitsandbytes", {"bitsandbytes": theirs, "ours": lambda q=ours: dequantize(q)})


def bench_warm(bench: Bench, weight: Tensor) -> None:
    kernels = {"float32": lib.cdequantize_blockwise_cpu_nf4_fp32, "bfloat16": lib.cdequantize_blockwise_cpu_nf4_bf16}
    sizes = [ctypes.c_longlong(n) for n in (64, *weight.shape)]
    for name, dtype in DTYPES.items():
        ours, out = quantize(weight.to(dtype)), torch.empty_like(weight, dtype=dtype)
        kernel = partial(kernels[name], *(bnbf.get_ptr(t) for t in (ours.packed, ours.absmax, out)), *sizes)
        kernel()
        assert torch.equal(out, dequantize(ours))
        variants = {"bitsandbytes": kernel, "ours": lambda q=ours: dequantize(q), "textbook": lambda q=ours: dequantize_textbook(q)}
        bench.times(f"warm, to {name}", "bitsandbytes", variants)


def bench_quantize(bench: Bench, weight: Tensor) -> None:
    variants = {"bitsandbytes": lambda: bnbf.quantize_4bit(weight, quant_type="nf4"), "ours": lambda: quantize(weight)}
    bench.times("quantize", "bitsandbytes", variants)


def layers(weight: Tensor) -> dict[str, nn.Module]:
    """The same weight in bitsandbytes' layer, in ours, and dense; training."""
    out, wide = weight.shape
    dense = nn.Linear(wide, out, bias=False, dtype=torch.bfloat16).requires_grad_(requires_grad=False)
    dense.weight.copy_(weight)
    theirs = bnb.nn.Linear4bit(wide, out, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
    theirs.weight = bnb.nn.Params4bit(dense.weight.clone(), requires_grad=False, quant_type="nf4", module=theirs).to("cpu")
    ours = Linear4bit(wide, out, bias=False, compute_dtype=torch.bfloat16)
    ours.hold(quantize(dense.weight, double_quant=True))
    return {"bitsandbytes": theirs.train(), "ours": ours.train(), "dense": dense.train()}


def bench_linear(bench: Bench, weight: Tensor) -> None:
    made = layers(weight)
    x = torch.randn(min(TOKENS, len(weight)), weight.shape[1], dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(len(x), len(weight), dtype=torch.bfloat16)

    def both(layer: nn.Module) -> Tensor:
        x.grad = None
        layer(x).backward(grad)
        assert x.grad is not None
        return x.grad

    assert torch.equal(made["ours"](x), made["bitsandbytes"](x))
    assert torch.equal(both(made["ours"]), both(made["bitsandbytes"]))
    forward = {name: lambda m=layer: m(x) for name, layer in made.items()}
    bench.times("linear, forward", "bitsandbytes", forward)
    bench.times("linear, forward, over dense bfloat16", "dense", {name: forward[name] for name in ("ours", "dense")})
    bench.times("linear, forward and backward", "bitsandbytes", {name: lambda m=layer: both(m) for name, layer in made.items()})


def bench_accuracy(bench: Bench, weight: Tensor) -> None:
    double = quantize(weight, double_quant=True)
    bench.add("bits a weight, double quantization", round(double.bits_per_parameter, 5), {})
    error = (dequantize(quantize(weight)) - weight).norm() / weight.norm()
    bench.add("relative L2 error, Gaussian weights", round(float(error), 5), {})


SECTIONS: dict[str, Callable[[Bench, Tensor], None]] = {
    "dequantize": bench_dequantize,
    "warm": bench_warm,
    "quantize": bench_quantize,
    "linear": bench_linear,
    "accuracy": bench_accuracy,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SECTIONS), help="this section alone; the others keep what they had")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="a small weight and a few rounds, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "nf4.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    weight = torch.randn(256, 256) if args.quick else torch.randn(SIZE, SIZE)
    sections: dict[str, Any] = json.loads(args.out.read_text())["sections"] if args.out.exists() else {}
    for name, run in SECTIONS.items():
        if args.only not in {None, name}:
            continue
        rows = []
        for threads in args.threads if name != "accuracy" else args.threads[:1]:
            torch.set_num_threads(threads)
            bench = Bench(threads, rounds=3 if args.quick else 5 if name == "quantize" else 15)
            run(bench, weight)
            rows += bench.rows
        sections[name] = {"machine": machine() | {"bitsandbytes": bnb.__version__}, "rows": rows}
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(json.dumps({"sections": sections}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
