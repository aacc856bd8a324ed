"""Which parameters step, how fast, and how the rate moves over a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lora_nb.configs import TrainConfig
from lora_nb.errors import TrainingError

EMBEDDING_RATE = 1e-6  # of adapters on embeddings under LoRA+, as in the authors' code and in PEFT


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Everything that asks for a gradient: the active adapters, or the whole of a model without any.

    Raises:
        TrainingError: nothing does.
    """
    return list(named_trainable(model).values())


def named_trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """`trainable` by name."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise TrainingError("Nothing in the model trains: attach(model, LoraConfig(…)) first, or set_active(model, …) an adapter.")
    return found


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101), one fused kernel a step; or bitsandbytes' with less state.

    Each group's `initial_lr` is its peak rate, from which `set_rates` follows the schedule.

    Raises:
        TrainingError: nothing trains, or the optimizer needs a CUDA GPU and the model is not on one.
    """
    groups = parameter_groups(model, config)
    for group in groups:
        group["initial_lr"] = group["lr"]
    if config.optimizer != "adamw":
        return _bitsandbytes(config.optimizer, next(model.parameters()).device)(groups)
    return OffloadedAdamW(groups) if config.offload_optimizer else torch.optim.AdamW(groups, fused=True)


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """One group; or with `loraplus_lr_ratio` λ the groups of LoRA+ (arXiv:2402.12354, section 4): B steps at λ times A's rate.

    Biases and other vectors go with B, biases without decay; adapters on embeddings keep a small rate of their own, since
    there A is the matrix that starts at zero.
    """
    named, ratio = named_trainable(model), config.loraplus_lr_ratio
    if ratio is None:
        return [{"params": list(named.values()), "lr": config.learning_rate, "weight_decay": config.weight_decay}]
    rates = {"A": config.learning_rate, "embedding": EMBEDDING_RATE, "B": ratio * config.learning_rate}
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, p in named.items():
        kind = _loraplus_kind(model, name, p)
        members.setdefault((kind, kind == "B" and _undecayed(model, name)), []).append(p)
    return [
        {"params": params, "lr": rates[kind], "weight_decay": 0.0 if undecayed else config.weight_decay}
        for (kind, undecayed), params in members.items()
    ]


def _loraplus_kind(model: nn.Module, name: str, p: nn.Parameter) -> str:
    layer, adapter, _ = name.partition(".adapters.")
    if adapter and isinstance(model.get_submodule(layer), nn.Embedding):
        return "embedding"
    return "B" if "lora_B" in name or p.ndim == 1 else "A"


def _undecayed(model: nn.Module, name: str) -> bool:
    """Biases and the weights of norms, which decay would only pull off their scale."""
    return "bias" in name or isinstance(model.get_submodule(name.rpartition(".")[0]), nn.LayerNorm)


class OffloadedAdamW(torch.optim.Optimizer):
    """AdamW whose two moments live in the CPU's memory, where the update is computed too.

    A step copies gradients and parameters down (2 × 4 bytes a parameter) and the new parameters up. The parameters on the
    device stay the ones that count, so whoever changes them between two steps is heard.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        self.twins = [[torch.empty_like(p, device="cpu", requires_grad=True) for p in group["params"]] for group in self.param_groups]
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        self.inner = torch.optim.AdamW([{**s, "params": t} for s, t in zip(settings, self.twins, strict=True)], fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group, inner, twins in zip(self.param_groups, self.inner.param_groups, self.twins, strict=True):
            inner["lr"] = group["lr"]
            for p, twin in zip(group["params"], twins, strict=True):
                twin.copy_(p)
                twin.grad = None if p.grad is None else p.grad.to("cpu")
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)
        for group, twins in zip(self.param_groups, self.twins, strict=True):
            for p, twin in zip(group["params"], twins, strict=True):
                p.copy_(twin)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)


def _bitsandbytes(name: str, device: torch.device) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    """Dettmers et al., 2022, arXiv:2110.02861 (8 bit), and 2023, arXiv:2305.14314, section 3 (paged)."""
    if device.type != "cuda":
        raise TrainingError(
            f"optimizer={name!r} is bitsandbytes' and needs a CUDA GPU, but the model is on {device.type!r}: use optimizer='adamw'. "
            "For an adapter its state is small."
        )
    from bitsandbytes.optim import adamw as bnb

    kinds = {"adamw_8bit": bnb.AdamW8bit, "paged_adamw": bnb.PagedAdamW32bit, "paged_adamw_8bit": bnb.PagedAdamW8bit}
    return kinds[name]


def set_rates(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, total: int) -> float:
    """Give each group its rate for step `step` (from 0), and return that of the config."""
    factor = _factor(config, step, total)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return config.learning_rate * factor


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Rate of step `step` (from 0) of `total`: a linear rise over the warm-up, then as `lr_scheduler_type` says."""
    return config.learning_rate * _factor(config, step, total)


def _factor(config: TrainConfig, step: int, total: int) -> float:
    """The schedule, at most 1."""
    warmup = min(config.warmup_steps, total - 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    rest = (step - warmup) / max(1, total - warmup)
    return {"constant": 1.0, "linear": 1.0 - rest, "cosine": 0.5 * (1 + math.cos(math.pi * rest))}[config.lr_scheduler_type]
