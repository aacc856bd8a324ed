"""Cross-entropy over the labels that count."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lora_nb.blocks import IGNORE


def token_losses(model: nn.Module, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each labelled token, in nats.

    Args:
        input_ids, labels: (batch, seq); labels that are `IGNORE` do not count.

    Returns:
        losses (n,), logits (n, vocabulary) and labels (n,) of the n labelled tokens. Only hidden states of labelled places
        are of interest, but the model computes all; the selection keeps fp32 logits small where most labels are masked.
    """
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]  # the token at t is predicted from those before it
    targets = labels[:, 1:]
    counted = targets != IGNORE
    chosen, goal = logits[counted].float(), targets[counted]
    return F.cross_entropy(chosen, goal, reduction="none"), chosen, goal
