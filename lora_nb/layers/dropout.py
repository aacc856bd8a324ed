"""Dropout whose mask is not kept for the backward pass, but drawn again: from the state that the generator of random numbers was in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def random_state(x: Tensor) -> Tensor:
    """Of the generator that dropout on x draws from."""
    return torch.cuda.get_rng_state(x.device) if x.device.type == "cuda" else torch.get_rng_state()


def dropout_mask(state: Tensor, x: Tensor, dtype: torch.dtype, p: float) -> Tensor:
    """What dropout multiplied x by when the generator was in that state; the generator is left as it is now."""
    now, device = random_state(x), x.device
    put = (lambda to: torch.cuda.set_rng_state(to, device)) if device.type == "cuda" else torch.set_rng_state
    put(state)
    try:
        return F.dropout(torch.ones_like(x, dtype=dtype), p)
    finally:
        put(now)
