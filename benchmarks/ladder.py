"""The ladder of `training.py`: from a loop as one writes it first to everything, one thing more at each rung.

Pairs of `tone` on a random Llama with a large vocabulary: what counts here is speed and memory, not what is learnt. Speed counts
tokens of text, not padding. A rung whose feature is not there, or not on this device, says so.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from alone import rise
from peers import Missing, llama
from torch import Tensor, nn

import lora_nb as ln
from lora_nb.blocks import IGNORE

R, ALPHA, PAIRS = 8, 20.0, 32


@dataclass(frozen=True)
class Found:
    """A rung's speed (tokens of text a second), how far memory rose over its steps and its peak (bytes), the mean loss (nats)."""

    tokens_per_second: float | None = None
    growth: int = 0
    peak: int = 0
    loss: float = 0.0
    missing: str = ""


@dataclass
class Start:
    """What all rungs start from: a model without adapters, the data, and how much of it makes a step."""

    model: nn.Module
    tokenizer: Any
    data: ln.Dataset
    device: str
    pairs: int

    @property
    def rows(self) -> int:
        """Packed rows of a step: each takes some eight pairs."""
        return self.pairs // 8

    room = 224


Turn = Iterator[float]  # does a step, and gives its loss
Rung = tuple[Turn, float]  # and the tokens of text in one step


class PlainLora(nn.Module):
    """W x + s · B A x, as one writes it from the paper."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.randn(R, base.in_features, device=base.weight.device) / base.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, R, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(x.to(self.A.dtype), self.A), self.B) * (ALPHA / R)
        return self.base(x) + update.to(x.dtype)


def by_hand(start: Start, *, packed: bool = False, chunked: bool = False) -> Rung:
    """A loop of ten lines around the plain expression of LoRA."""
    model = start.model.requires_grad_(requires_grad=False).train()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, PlainLora(module))
    blocks, size = start.data.encode(start.tokenizer, start.room), start.pairs
    tokens = sum(len(b.input_ids) for b in blocks)
    if packed:
        blocks, size = packed_rows(blocks, start.room), start.rows
    return loop(model, blocks, size, chunked=chunked), tokens / len(blocks) * size


def loop(model: Any, blocks: list[Any], size: int, *, chunked: bool) -> Turn:
    from lora_nb.blocks import collate
    from lora_nb.training.loss import loss_sum

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    while True:
        ids, labels, positions = (None if t is None else t.to(model.device) for t in collate(random.sample(blocks, size), 0)[:3])
        if chunked:
            loss = loss_sum(model, ids, labels, positions) / (labels[:, 1:] != IGNORE).sum()
        else:
            loss = model(input_ids=ids, labels=labels, position_ids=positions, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss.detach())


def packed_rows(blocks: list[Any], room: int) -> list[Any]:
    try:
        from lora_nb.blocks import pack
    except ImportError as error:
        raise Missing("missing: packing") from error
    return pack(blocks, room)


def by_lora_nb(start: Start, quantize: str | None = None, **settings: Any) -> Rung:
    """The public loop, packed, with more and more of its settings."""
    if quantize:
        if not hasattr(ln, "quantize"):
            raise Missing("missing: ln.quantize")
        ln.quantize(start.model, ln.QuantConfig(quant_type=quantize))
    ln.attach(start.model, ln.LoraConfig(r=R, lora_alpha=ALPHA))
    if not has_own_backward(start.model):
        raise Missing("missing: a LoRA layer with a backward pass of its own")
    if start.device == "cpu" and settings.pop("optimizer", None) and not quantize:
        raise Missing("bitsandbytes' optimizers need CUDA")
    try:
        config = ln.TrainConfig(max_steps=10**6, learning_rate=1e-4, batch_size=start.rows, seq_len=start.room, packing=True, **settings)
    except ln.errors.ConfigError as error:
        raise Missing(f"missing: {error}") from error
    blocks = start.data.encode(start.tokenizer, start.room)
    tokens = sum(len(b.input_ids) for b in blocks) / len(packed_rows(blocks, start.room)) * start.rows
    turns = ln.steps(start.model, start.tokenizer, start.data, config)
    if not 0.75 * tokens < next(turns).tokens < 1.25 * tokens:
        raise Missing("missing: packing in the loop")
    return (step.loss for step in turns), tokens


def has_own_backward(model: nn.Module) -> bool:
    """Is a custom autograd function at work in an adapted layer?"""
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(512, layer.in_features, device=layer.weight.device, requires_grad=True).to(next(model.parameters()).dtype)
    seen, nodes = set(), [layer(x).grad_fn]
    while nodes:
        node = nodes.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [n for n, _ in node.next_functions]
    return False


def rungs() -> dict[str, Any]:
    """Each with all that the rungs before it have."""
    out = {
        "naive loop": by_hand,
        "+ packing": partial(by_hand, packed=True),
        "+ chunked loss": partial(by_hand, packed=True, chunked=True),
        "+ fused LoRA": by_lora_nb,
    }
    settings: dict[str, Any] = {}
    for name, more in (
        ("+ checkpointing", {"gradient_checkpointing": True}),
        ("+ compile", {"compile": True}),
        ("+ 8-bit optimizer", {"optimizer": "adamw_8bit"}),
        ("+ QLoRA", {"quantize": "nf4"}),
    ):
        settings |= more
        out[name] = partial(by_lora_nb, **settings)
    return out


RUNGS = rungs()


def measured(rung: str, device: str, quick: bool, threads: int) -> Found:
    """One rung, in the process that it has for itself: two steps to warm up, then those that count."""
    torch.set_num_threads(threads)
    random.seed(0)
    model = llama("quick" if quick else "27M, 32k" if device == "cpu" else "1B", device)
    pairs = 16 if quick else 32 if device == "cpu" else 256
    start = Start(model, ln.load("tiny", device="cpu")[1], ln.dataset("tone")[: 8 * pairs], device, pairs)
    try:
        turns, tokens = RUNGS[rung](start)
    except Missing as gone:
        return Found(missing=str(gone))
    for _ in range(2):
        next(turns)
    losses, count = [], 2 if quick else 6
    began = time.perf_counter()
    growth, peak = rise(lambda: losses.extend(next(turns) for _ in range(count)), device)
    return Found(count * tokens / (time.perf_counter() - began), growth, peak, sum(losses) / count)
