"""Sections of `gpu.py`: training steps as the public loop makes them, against PEFT's and against the card's own peak."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from alone import rise
from measure import interleaved
from on_gpu import Bench, Run, Stopwatch, spread
from peers import adapted, llama, our_steps, peft_steps, sharing
from torch import nn

import lora_nb as ln

R, GIB = 16, 2**30


def step(bench: Bench, shape: str, targets: tuple[str, str], quantized: bool = False) -> None:
    """A step of ours over PEFT's, time and peak memory: the same weights and adapter, all-linear, 4 × 1,024 tokens."""
    base = llama(bench.size(shape, "quick"), bench.on)
    batch, length = bench.size((4, 1024), (2, 64))
    ids = torch.randint(3, base.config.vocab_size, (batch, length), device=bench.on)  # type: ignore[union-attr, arg-type]
    both = (base.get_input_embeddings(), base.get_output_embeddings(), base if not quantized else None)  # which the two models share
    ours, theirs = adapted(base, ids, R, in_four_bits(base) if quantized else None)
    del base
    peaks = [peak_of(partial(make, model, ids), bench.on) for make, model in ((our_steps, ours), (peft_steps, theirs))]
    variants = {"lora_nb": our_steps(ours, ids), "PEFT": peft_steps(theirs, ids)}
    times = interleaved(variants, rounds=bench.size(12, 2), clock=Stopwatch(bench.on))
    del variants
    held = [allocated(bench.on)]
    del ours
    held.append(allocated(bench.on))
    del theirs
    held.append(allocated(bench.on))
    del both
    mine, its = peaks[0] - (held[1] - held[2]), peaks[1] - (held[0] - held[1])  # each as if the other's model were not there
    title = f"{'QLoRA' if quantized else 'LoRA'} step, {bench.size(shape, 'tiny')} shape, all-linear r={R}, {batch} × {length:,} tokens"
    milliseconds = f"{1000 * times.median('lora_nb'):.1f} and {1000 * times.median('PEFT'):.1f} ms"
    bench.add(f"{title}: time / PEFT", times.ratio("lora_nb", "PEFT"), targets[0], f"{milliseconds}; {spread(times, 'lora_nb', 'PEFT')}")
    bench.add(f"{title}: peak memory / PEFT", mine / its, targets[1], f"{mine / GIB:.2f} and {its / GIB:.2f} GiB, the base included")


def in_four_bits(base: nn.Module) -> nn.Module:
    """Puts `base` into NF4 by our layers, and returns the same by bitsandbytes' layers."""
    theirs = sharing(base)
    ln.quantize(base, ln.QuantConfig(quant_type="nf4"))
    ln.quantize(theirs, ln.QuantConfig(quant_type="bnb-nf4"))
    theirs.is_loaded_in_4bit = True  # type: ignore[assignment] # by which PEFT knows bitsandbytes' layers
    return theirs


def allocated(on: str) -> int:
    """Bytes of what is still there."""
    gc.collect()
    return torch.cuda.memory_allocated() if on == "cuda" else 0


def peak_of(make: Callable[[], Run], on: str) -> int:
    """The most memory that a step holds, once there has been one."""
    run = make()
    run()
    return rise(run, on)[1]


def share(bench: Bench) -> None:
    """Of the card's own peak in products of bf16 matrices, what a LoRA step reaches."""
    size = bench.size(8192, 128)
    a, b = (torch.randn(size, size, device=bench.on).to(bench.dtype) for _ in range(2))
    peak = 2 * size**3 / min(bench.times({"product": [partial(torch.mm, a, b)]}).seconds["product"])
    del a, b
    model = llama(bench.size("8B", "quick"), bench.on)
    frozen = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear))
    ln.attach(model, ln.LoraConfig(r=R, lora_alpha=24, target_modules="all-linear"))
    batch, length = bench.size((8, 1024), (2, 64))
    ids = torch.randint(3, model.config.vocab_size, (batch, length), device=bench.on)  # type: ignore[union-attr, arg-type]
    times = interleaved({"step": our_steps(model, ids)}, rounds=bench.size(8, 2), clock=Stopwatch(bench.on))
    low_rank = sum(p.numel() for p in ln.parameters(model).values())
    operations = batch * length * (4 * frozen + 6 * low_rank + attention(model.config, length))  # A and B have gradients, W has none
    reached = operations / times.median("step")
    note = f"{reached / 1e12:.0f} of {peak / 1e12:.0f} TFLOP/s, {batch * length / times.median('step'):,.0f} tokens/s"
    bench.add(
        f"LoRA step, {bench.size('8B', 'tiny')} shape, {batch * length:,} tokens: % of the matrix peak", 100 * reached / peak, "≥ 45", note
    )


def attention(config: Any, length: int) -> float:
    """Operations for each token: scores and sums over half of `length` tokens on average, and twice that on the way back."""
    return 3 * 2 * length * config.num_attention_heads * config.head_dim * config.num_hidden_layers
