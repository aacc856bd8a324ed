"""Cross-entropy and its gradient at once, for the chunks of `training/loss.py`.

With a head's outputs u, logits z = cap · tanh(scale · u / cap) or scale · u, and labels y,

    L = Σ_i (log Σ_v exp z_iv − z_iy),    ∂L/∂u = (softmax(z) − onehot(y)) ⊙ dz/du,    dz/du = scale · (1 − tanh²(scale · u / cap))

`cross_entropy_triton.py` has the same as a kernel for GPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def loss_and_gradient(u: Tensor, goals: Tensor, scale: float = 1.0, cap: float | None = None) -> tuple[Tensor, Tensor]:
    """From u (n, vocabulary), fp32, and goals (n,): L, and ∂L/∂u in u's own memory.

    The maximum of a row is taken off before the exponential, so nothing overflows: log Σ exp z = m + log Σ exp(z − m).
    """
    z, slope = u, None
    if cap is not None:
        z = z.mul_(scale / cap).tanh_()
        slope = (1 - z * z) * scale
        z *= cap
    elif scale != 1:
        z *= scale
    at = (torch.arange(len(z), device=z.device), goals)
    aimed, top = z[at], z.amax(-1, keepdim=True)
    p = z.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    p /= total
    p[at] -= 1
    if slope is not None or scale != 1:
        p *= scale if slope is None else slope
    return (top[:, 0] + total[:, 0].log() - aimed).sum(), p
