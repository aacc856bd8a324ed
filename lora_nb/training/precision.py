"""Products in 16 bits: autocast, and for fp16 a scaled loss (Micikevicius et al., 2018, arXiv:1710.03740, section 3.2)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from lora_nb.configs import TrainConfig
from lora_nb.errors import TrainingError

LEAST_SCALE = 1.0  # a loss that overflows even so is no matter of scale


class Precision:
    """How a run computes: `autocast()` around the forward, `backward`, `unscale` before clipping, `step`.

    fp16 has no numbers below 6e-8, where many gradients lie. So the loss is multiplied by a scale before the backward pass and
    the gradients are divided by it after; when they overflow, that step is left out and the scale halved.
    """

    def __init__(self, config: TrainConfig, model: nn.Module, device: torch.device) -> None:
        self.device, self.name = device, config.precision or default_precision(device)
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]
        halves = [n for n, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
        if self.name == "fp16" and halves:
            raise TrainingError(
                f"{len(halves)} parameters that train are in float16 (such as {halves[0]!r}), too coarse to add small steps to. Make them "
                "float32 (p.data = p.data.float()); precision='fp16' computes the products in 16 bits all the same."
            )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.name == "fp16")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.name != "fp32")

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        self.scaler.unscale_(optimizer)

    def fits(self, norm: float) -> bool:
        """Is that gradient fit to be used, or an overflow that a smaller scale remedies?"""
        return math.isfinite(norm) or (self.scaler.is_enabled() and self.scaler.get_scale() > LEAST_SCALE)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step, unless gradients overflowed."""
        self.scaler.step(optimizer)
        self.scaler.update()

    def state(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        if state:
            self.scaler.load_state_dict(state)


def default_precision(device: torch.device) -> str:
    """bf16 on GPUs that have it, fp16 on those that do not, fp32 elsewhere."""
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
