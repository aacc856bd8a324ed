"""A training step, or generation, run on tensors without content, with every storage in the ledger by what it is for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_nb.errors import ConfigError
from lora_nb.fusing import fused
from lora_nb.memory.ledger import Ledger
from lora_nb.training.modes import checkpointing


@dataclass(frozen=True)
class Plan:
    """What to run: `forward` gives the loss; a step is `accumulate` of them, backward, and the optimizer's."""

    model: nn.Module
    forward: Callable[[], Tensor]
    optimizer: str
    accumulate: int
    checkpoint: bool
    fuse: bool


def training_steps(plan: Plan) -> tuple[Ledger, int]:
    """Two steps, since the first has no optimizer state yet; the ledger, and where in it the second starts."""
    model, ledger = plan.model.train(), Ledger(plan.model)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ConfigError("Nothing in the model trains: give trace_memory a config, or a model with adapters and config='attached'.")
    start = 0
    blocks = fused(model) if plan.fuse else nullcontext()
    with checkpointing(model, wanted=plan.checkpoint), blocks, ledger.following(), ledger:
        _note_weights(ledger, model)
        made = torch.optim.AdamW(trained, lr=1e-3, fused=True) if plan.optimizer == "adamw" else torch.optim.SGD(trained, lr=1e-3)
        for turn in range(2):
            start = len(ledger.events) if turn else 0
            for _ in range(plan.accumulate):
                _pass(ledger, model, plan.forward)
            for p in trained:
                if p.grad is not None:
                    ledger.call(p.grad, "gradients")
            ledger.phase = "optimizer"
            nn.utils.clip_grad_norm_(trained, 1.0)
            made.step()
            for state in made.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        ledger.call(value, "optimizer")
            made.zero_grad(set_to_none=True)
    return ledger, start


def _pass(ledger: Ledger, model: nn.Module, forward: Callable[[], Tensor]) -> None:
    """Forward and backward, and what they made by what it was for."""
    first = len(ledger.entries)
    ledger.phase = "forward"
    value = forward()
    kept = {id(entry) for entry in ledger.alive()}
    ledger.phase = "backward"
    value.backward()  # type: ignore[no-untyped-call]
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    for entry in ledger.entries[first:]:
        again = entry.phase == "backward" and entry.forward
        held = again or (entry.phase == "forward" and id(entry) in kept)
        entry.part = "logits" if entry.width == vocabulary else "activations" if held else "workspace"


def _note_weights(ledger: Ledger, model: nn.Module) -> None:
    adapted = {id(p) for n, p in model.named_parameters() if ".adapters." in n or ".lora_" in n or "lora_A" in n or "lora_B" in n}
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.note(tensor, "adapters" if id(tensor) in adapted else "weights")


@torch.no_grad()
def generation(model: Any, given: dict[str, Tensor]) -> tuple[Ledger, int]:
    """The prompt, then one token."""
    model.eval()
    ledger = Ledger(model)
    given = {name: value for name, value in given.items() if name != "labels"}
    with ledger.following(), ledger:
        _note_weights(ledger, model)
        start = len(ledger.events)
        ledger.phase = "prefill"
        more = {"use_cache": True, "logits_to_keep": 1} if type(model).__name__.endswith("ForCausalLM") else {}
        out = model(**given, **more)
        cache = getattr(out, "past_key_values", None)
        _note_cache(ledger, cache)
        if more and cache is not None:
            del out
            ledger.phase = "next token"
            out = model(given["input_ids"][:, :1], past_key_values=cache, use_cache=True)
            _note_cache(ledger, cache)
        for entry in ledger.entries:
            entry.part = entry.part or "workspace"
    return ledger, start


def _note_cache(ledger: Ledger, cache: Any) -> None:
    for layer in getattr(cache, "layers", ()):
        for tensor in (layer.keys, layer.values):
            if isinstance(tensor, Tensor):
                ledger.call(tensor, "KV cache")
