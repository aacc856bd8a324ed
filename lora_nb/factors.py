"""An adapter's updates as plain matrices: what combining and comparing adapters work on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_nb.attach import adapters, parts, weights
from lora_nb.errors import AdapterError
from lora_nb.layers.adapted import Part
from lora_nb.layers.dora import DoraWeights
from lora_nb.layers.lora import LoraWeights
from lora_nb.layers.special import ParameterWeights


@dataclass(frozen=True)
class Factors:
    """The update of one module, ΔW = s · B A, with A (groups, r, fan-in) and B (groups, out, r).

    There is one group, but for a convolution in groups: there each block of output channels has r rows of A to itself.
    A kernel is laid flat, fan-in = in · k · …
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """Rows of A in all groups together, as a config counts them."""
        return self.A.shape[0] * self.A.shape[1]

    @property
    def largest_rank(self) -> int:
        """What the sizes of the module allow."""
        return self.A.shape[0] * min(self.B.shape[1], self.A.shape[2])

    def delta(self) -> Tensor:
        """ΔW, (groups, out, fan-in)."""
        return (self.B @ self.A) * self.scaling


@torch.no_grad()
def updates(model: nn.Module, name: str) -> dict[str, Factors]:
    """What an adapter adds to each weight, by the module's path, in the model's order.

    Raises:
        AdapterError: no adapter of that name, one that does more than add B A to weights, or NaN or infinity in it.
    """
    found = {}
    for path, part in parts(model, name).items():
        a, b = (m.detach().float() for m in _plain(model, name, path, part).factors())
        if not (a.isfinite().all() and b.isfinite().all()):
            raise AdapterError(f"Adapter {name!r} has NaN or infinity at {path!r}: train it again, or load a sound copy.")
        groups = int(getattr(model.get_submodule(path), "groups", 1))
        found[path] = Factors(a.view(groups, -1, a.shape[1]), b.view(groups, -1, b.shape[1]), part.scaling)
    return found


def _plain(model: nn.Module, name: str, path: str, part: Part) -> LoraWeights:
    """The part itself, if a product of two matrices is all there is to it."""
    if isinstance(part, ParameterWeights):
        more = "target_parameters"
    elif not isinstance(part, LoraWeights):
        more = adapters(model).reports[name].matched[path].method
    elif isinstance(part, DoraWeights):
        more = "DoRA's magnitude"
    elif part.lora_bias is not None:
        more = "lora_bias"
    elif part.copies():
        more = f"a {' and a '.join(part.copies())} of its own"
    else:
        return part
    raise AdapterError(
        f"Adapter {name!r} does something else at {path!r} than add B A to a layer's weight ({more}), which has no place in a sum of such "
        "updates. Train it with plain LoRA (no use_dora, lora_bias, bias, modules_to_save, target_parameters, trainable_token_indices)."
    )


@torch.no_grad()
def write(model: nn.Module, name: str, made: Mapping[str, Factors]) -> None:
    """Set an attached adapter, whose scale is 1, to these updates."""
    for path, part in weights(model, name).items():
        part.lora_A.copy_(made[path].A.reshape(part.lora_A.shape))
        part.lora_B.copy_(made[path].B.reshape(part.lora_B.shape))


def concatenate(parts: Sequence[Factors], by: Sequence[float]) -> Factors:
    """Σ wᵢ sᵢ Bᵢ Aᵢ = [B₁ B₂ …] [w₁s₁A₁; w₂s₂A₂; …], exactly."""
    return Factors(torch.cat([w * p.scaling * p.A for w, p in zip(by, parts, strict=True)], 1), torch.cat([p.B for p in parts], 2))


def truncate(factors: Factors, rank: int) -> Factors:
    """The nearest update of that rank (Eckart and Young, 1936), from QR of both factors and an SVD of only r × r."""
    left, upper = torch.linalg.qr(factors.B)  # (groups, out, r), (groups, r, r)
    right, lower = torch.linalg.qr(factors.A.mT)
    core = factorise(upper @ lower.mT * factors.scaling, rank)
    return Factors(core.A @ right.mT, left @ core.B)


def factorise(delta: Tensor, rank: int) -> Factors:
    """ΔW (groups, out, fan-in) = U S Vᵀ → A = Vᵀ, B = U S of its largest singular values, `rank` in all groups together."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    r = max(1, rank // len(delta))
    return Factors(Vh[:, :r], U[:, :, :r] * S[:, None, :r])
