"""Sections of `gpu.py`: kernels one by one, and a linear layer that serves many adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measure import interleaved
from on_gpu import Bench, Run, Stopwatch, kept, spread
from torch import Tensor

from lora_nb.layers import cross_entropy, lora_gpu
from lora_nb.layers.kernels import kernel, tried
from lora_nb.layers.nf4 import dequantize, dequantize_textbook, quantize
from lora_nb.layers.ways import Plan, add_low_rank

KERNELS = ("nf4_triton", "cross_entropy_triton", "lora_triton", "mixed_triton")
R, COPIES = 16, 4  # rank; sets of tensors in turn


def tries(bench: Bench) -> dict[str, str]:
    """Whether each kernel agrees with its twin here, in words."""
    return {name: tried(name, bench.device)[1] or "agrees" for name in KERNELS}


def nf4(bench: Bench) -> None:
    """Doubly quantized NF4 to bf16, against bitsandbytes on the same bytes."""
    import bitsandbytes.functional as bnb

    for shape in bench.size(((4096, 4096), (14336, 4096)), ((96, 128),)):
        q = quantize(torch.randn(shape, device=bench.on) * 0.02, double_quant=True)
        q = replace(q, dtype=torch.bfloat16)
        parts = q.state_dict("weight")
        state = bnb.QuantState.from_dict({key: part for key, part in parts.items() if key != "weight"}, bench.device)
        if not torch.equal(dequantize(q).cpu(), dequantize_textbook(q.to("cpu"))):
            raise SystemExit(f"NF4 of {shape}: not the bits of the CPU, so not measured.")
        same = torch.equal(dequantize(q), bnb.dequantize_4bit(q.packed, state))
        copies = [copy.deepcopy((q, state)) for _ in range(COPIES)]
        ours = kept([partial(dequantize, mine) for mine, _ in copies])
        theirs = kept([partial(bnb.dequantize_4bit, mine.packed, its) for mine, its in copies])
        times = bench.times({"lora_nb": ours, "bitsandbytes": theirs})
        moved = sum(t.numel() * t.element_size() for t in (q.packed, q.absmax, q.nested_absmax)) + 2 * q.numel()  # type: ignore[union-attr]
        called = interleaved(
            {"lora_nb": ours[0], "bitsandbytes": theirs[0]}, rounds=bench.size(20, 2), repeat=20, clock=Stopwatch(bench.on)
        )
        title = f"NF4, doubly quantized, to bf16, {shape[0]} × {shape[1]}"
        bench.add(
            f"{title}: TB/s", moved / times.median("lora_nb") / 1e12, "≥ 2.0", f"{1e6 * times.median('lora_nb'):.1f} µs; the CPU's bits"
        )
        note = f"{spread(times, 'bitsandbytes', 'lora_nb')}; one by one from Python {called.ratio('bitsandbytes', 'lora_nb'):.2f}"
        bench.add(
            f"{title}: times as fast as bitsandbytes",
            times.ratio("bitsandbytes", "lora_nb"),
            "≥ 1.15",
            note + ("" if same else "; ITS BITS DIFFER"),
        )


def loss(bench: Bench) -> None:
    """A chunk of logits to loss and gradient: the kernel over PyTorch's operators."""
    n, vocabulary = bench.size((512, 128256), (8, 500))
    title = f"loss and gradient of {n} × {vocabulary:,} logits: kernel / operators"
    fast = kernel("cross_entropy_triton", bench.device)
    if fast is None:
        bench.add(title, None, note="no kernel here")
        return
    goals = torch.randint(vocabulary, (n,), device=bench.on)
    logits = [torch.randn(n, vocabulary, device=bench.on).to(bench.dtype) for _ in range(COPIES)]

    def by_operators(u: Tensor) -> Tensor:
        return cross_entropy.loss_and_gradient(u.float(), goals)[1].to(u.dtype)

    times = bench.times(
        {"kernel": [partial(fast.loss_and_gradient, u, goals) for u in logits], "operators": [partial(by_operators, u) for u in logits]}
    )
    bench.add(title, times.ratio("kernel", "operators"), note=spread(times, "kernel", "operators"))


def products(bench: Bench) -> None:
    """LoRA's product by the kernel over PyTorch's operators, which of the two the package takes, and what the low-rank part costs."""
    fast = kernel("lora_triton", bench.device)
    for n, width, out in bench.size(((4096, 2048, 8192), (4096, 4096, 4096), (4096, 4096, 14336), (4096, 14336, 4096)), ((24, 16, 40),)):
        sets = [lora_tensors(n, width, out, bench) for _ in range(2)]
        variants: dict[str, list[Run]] = {
            "operators": kept([partial(lora_gpu.by_steps, *given) for given in sets]),
            "frozen alone": kept([partial(F.linear, *given[:2]) for given in sets]),
        }
        if fast is not None:
            variants["kernel"] = kept([partial(fast.product, *given) for given in sets])
        times = bench.times(variants)
        title = f"LoRA's product, {n:,} × {width} → {out}, r={R}"
        value = times.ratio("kernel", "operators") if fast is not None else None
        note = "no kernel here" if fast is None else f"over the frozen product alone {times.ratio('kernel', 'frozen alone'):.3f}"
        bench.add(f"{title}: kernel / operators", value, note=f"{note}; operators {times.ratio('operators', 'frozen alone'):.3f}")


def lora_tensors(n: int, width: int, out: int, bench: Bench) -> tuple[Any, ...]:
    """x, W, no bias, A, B, s."""
    shapes = ((n, width), (out, width), (R, width), (out, R))
    x, w, a, b = (torch.randn(shape, device=bench.on).to(bench.dtype) / 16 for shape in shapes)
    return x, w, None, a, b, 1.5


def mixed(bench: Bench) -> None:
    """One token each of 64 requests through a linear layer, with as many adapters, over the layer without any."""
    tokens, width = bench.size((64, 4096), (12, 64))
    for count, target in bench.size(((1, 15), (10, 20), (64, 60)), ((1, 15), (12, 60))):
        names = [f"a{i}" for i in range(count)]
        whose = [names[int(i)] for i in torch.randperm(tokens) % count]
        plan = Plan.of([1] * tokens, whose, tuple(names), bench.device)
        _ = plan.others, plan.padded  # found once a batch, not in each layer
        places = [torch.tensor([i for i, name in enumerate(whose) if name == one], device=bench.on) for one in names]
        shapes = ((tokens, width), (width, width), (count, R, width), (count, R, width))
        sets = [[torch.randn(s, device=bench.on).to(bench.dtype) / 16 for s in shapes] for _ in range(COPIES)]
        ways: dict[str, Callable[..., Tensor]] = {
            "plain": lambda x, w, _a, _b: F.linear(x, w),
            "lora_nb": partial(routed, plan=plan),
            "loop": partial(one_by_one, places=places),
        }
        ours, theirs = (ways[name](*sets[0]).float() for name in ("lora_nb", "loop"))
        if (ours - theirs).abs().max() > 2e-2 * theirs.abs().max():
            raise SystemExit(f"{count} adapters in a batch: not what a loop gives, so not measured.")
        times = bench.times({name: kept([partial(way, *given) for given in sets]) for name, way in ways.items()})
        title = f"decode of {tokens} rows, {width}², r={R}, {count} adapters, in a CUDA graph"
        note = f"{1e6 * times.median('lora_nb'):.1f} and {1e6 * times.median('plain'):.1f} µs"
        bench.add(f"{title}: % over the plain layer", 100 * (times.ratio("lora_nb", "plain") - 1), f"≤ {target}", note)
        if count == tokens:
            bench.add(f"{title}: times as fast as a loop", times.ratio("loop", "lora_nb"), "≥ 5", spread(times, "loop", "lora_nb"))


@torch.no_grad()
def routed(x: Tensor, w: Tensor, a: Tensor, b: Tensor, *, plan: Plan) -> Tensor:
    return add_low_rank(F.linear(x, w), x, a, b, plan, in_place=True)


def one_by_one(x: Tensor, w: Tensor, a: Tensor, b: Tensor, *, places: list[Tensor]) -> Tensor:
    """As one writes it first."""
    y = F.linear(x, w)
    for mine, down, up in zip(places, a, b, strict=True):
        y.index_add_(0, mine, x.index_select(0, mine) @ down.T @ up)
    return y
