"""Where A and B start. Every start leaves the layer's output as the base's.

| name | A (r, in) | B (out, r) | source |
| --- | --- | --- | --- |
| `True` | uniform in ±1/√in | 0 | PEFT, loralib |
| `"gaussian"` | normal, deviation 1/r | 0 | Hu et al., 2021, section 4.1 |
| `"orthogonal"` | X Q₁, | Y Q₂, with Q₁ Q₂ᵀ = 0, so B A = 0 | PEFT, `init_lora_weights="orthogonal"` |
| `"pissa"` | √(S/s) Vᵀ, | U √(S/s), of the r largest singular values of W | Meng et al., 2024, arXiv:2404.02948 |
| `"pissa_niter_4"` | the same | by a randomised SVD with that many iterations | the same, section 4 |
| `"olora"` | R, | Q, the first r of W = Q R | Büyükakyüz, 2024, arXiv:2406.01775 |

PiSSA and OLoRA begin with a part of W itself, which has to be taken off again: it is returned as constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Constants = tuple[Tensor, Tensor] | tuple[None, None]


def start(a: Tensor, b: Tensor, init: bool | str, weight: Callable[[], Tensor], scaling: float) -> Constants:
    """Fill `a` (r, in…) and `b` (out, r…) in place; `weight()` gives W as a matrix, for those that start from it.

    Returns:
        The constants (A₀, B₀) whose product has to be subtracted, or (None, None).
    """
    if init == "orthogonal":
        _orthogonal(a, b)
    elif init == "olora" or str(init).startswith("pissa"):
        w, r = weight().float(), len(a)
        left, right = _olora(w, r) if init == "olora" else _pissa(w / scaling, r, str(init))
        a.copy_(right.reshape(a.shape))
        b.copy_(left.reshape(b.shape))
        return a.detach().clone(), b.detach().clone()
    else:
        if init == "gaussian":
            nn.init.normal_(a, std=1 / len(a))
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(b)
    return None, None


def _orthogonal(a: Tensor, b: Tensor) -> None:
    """Odd rows of an orthogonal r × r matrix for one side, even rows for the other; r is even."""
    r = len(a)
    q = torch.linalg.qr(torch.randn(r, r))[0]
    a.copy_((q[0::2].T @ torch.randn(r // 2, a[0].numel()) / 10).reshape(a.shape))
    b.copy_((torch.randn(len(b), r // 2) @ q[1::2] / 10).reshape(b.shape))


def _pissa(w: Tensor, r: int, init: str) -> tuple[Tensor, Tensor]:
    if init == "pissa":
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
        u, s, vt = u[:, :r], s[:r], vt[:r]
    else:
        u, s, v = torch.svd_lowrank(w, r, niter=int(init.rsplit("_", 1)[-1]))
        vt = v.T
    root = s.sqrt()
    return u * root, root[:, None] * vt


def _olora(w: Tensor, r: int) -> tuple[Tensor, Tensor]:
    q, right = torch.linalg.qr(w)
    return q[:, :r], right[:r]
