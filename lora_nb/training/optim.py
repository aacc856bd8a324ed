"""Which parameters step, how fast, and how the rate moves over a run."""

from __future__ import annotations

import math

import torch
from torch import nn

from lora_nb.configs import TrainConfig
from lora_nb.errors import TrainingError


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Everything that asks for a gradient: the active adapters, or the whole of a model without any.

    Raises:
        TrainingError: nothing does.
    """
    found = [p for p in model.parameters() if p.requires_grad]
    if not found:
        raise TrainingError("Nothing in the model trains: attach(model, LoraConfig(…)) first, or set_active(model, …) an adapter.")
    return found


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101), one fused kernel a step."""
    return torch.optim.AdamW(trainable(model), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Rate of step `step` (from 0) of `total`: a linear rise over the warm-up, then as `lr_scheduler_type` says."""
    warmup = min(config.warmup_steps, total - 1)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    rest = (step - warmup) / max(1, total - warmup)
    factor = {"constant": 1.0, "linear": 1.0 - rest, "cosine": 0.5 * (1 + math.cos(math.pi * rest))}[config.lr_scheduler_type]
    return config.learning_rate * factor
