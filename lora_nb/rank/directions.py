"""An adapter's update taken apart into directions, the weightiest first, so that it can be cut to any rank.

With h = A x of the inputs that a module gets, and C = E[h hᵀ] (r, r), the update s · B A x has the output power

    E‖s B A x‖² = s² · ‖B C^½‖²_F = Σ λ_i²,    Q R = B,    U Σ Vᵀ = R C^½,    λ = s · Σ

The first k columns of Q U span the outputs that matter most: no other update of rank k changes the module's output less on these
inputs than (QU)_k (QU)_kᵀ s B A (Eckart and Young, 1936). B A itself is never formed: all matrices but A and B are r × r.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_nb.attach import layers, weights
from lora_nb.errors import AdapterError
from lora_nb.factors import updates
from lora_nb.layers.lora import LoraWeights


@dataclass(frozen=True)
class Directions:
    """One module's update as Σ left_i right_i, with left (out, r) of unit length and right (r, fan-in), without the scale s.

    `values` are the λ_i (r,): square roots of the output power that each adds, in falling order. `power` is E‖y‖² of the module's
    whole output, to compare modules by.
    """

    left: Tensor
    right: Tensor
    values: Tensor
    power: float

    @property
    def rank(self) -> int:
        return len(self.values)

    @property
    def cost(self) -> int:
        """Parameters that one direction takes."""
        return len(self.left) + self.right.shape[1]


@torch.no_grad()
def directions(model: nn.Module, name: str, run: Callable[[], object]) -> dict[str, Directions]:
    """The directions of each module that an adapter adapts, weighted by the inputs that it gets while `run` uses the model.

    Raises:
        AdapterError: an adapter that is not a sum of plain products B A.
    """
    updates(model, name)  # refuses what is more than B A, and what is not finite
    _check(model, name)
    moments = _moments(model, name, run)
    return {path: _directions(part, *moments[path]) for path, part in weights(model, name).items()}


@contextmanager
def rewritten(model: nn.Module, name: str, found: Mapping[str, Directions]) -> Iterator[Callable[[Mapping[str, int]], None]]:
    """Within the `with` block, a function that cuts the adapter's modules to given ranks; afterwards it is what it was, bit for bit.

    The matrices really are the smaller ones, so that a low rank is also quick to try; of rank 0 a direction is left, of zeros.
    """
    parts = weights(model, name)
    before = {path: (part.lora_A.data, part.lora_B.data) for path, part in parts.items()}

    @torch.no_grad()
    def cut(ranks: Mapping[str, int]) -> None:
        for path, part in parts.items():
            (a, b), k = before[path], max(1, ranks[path])
            part.lora_A.data = found[path].right[:k].reshape(k, *a.shape[1:])
            part.lora_B.data = (found[path].left[:, :k] * (ranks[path] > 0)).reshape(len(b), k, *b.shape[2:])

    try:
        yield cut
    finally:
        for path, part in parts.items():
            part.lora_A.data, part.lora_B.data = before[path]


def _check(model: nn.Module, name: str) -> None:
    for path, part in weights(model, name).items():
        groups = int(getattr(model.get_submodule(path), "groups", 1))
        if groups > 1 or part.start_a is not None:
            what = f"a convolution in {groups} groups" if groups > 1 else "a start from the weight's own directions"
            raise AdapterError(
                f"Adapter {name!r} has {what} at {path!r}, where its rank cannot be cut as it stands: train it with init_lora_weights=True "
                "and on layers without groups."
            )


def _moments(model: nn.Module, name: str, run: Callable[[], object]) -> dict[str, tuple[Tensor, float]]:
    """E[h hᵀ] of h = A x for each module, (r, r) in float64, and E‖y‖² of its output."""
    sums: dict[str, Tensor] = {}
    powers: dict[str, float] = {}
    counts: Counter[str] = Counter()

    def noting(path: str, part: LoraWeights) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def note(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            h = part.down(layer, part.dropped(args[0]), part.lora_A)  # type: ignore[arg-type]
            h = (h.movedim(1, -1) if part.lora_B.ndim > 2 else h).reshape(-1, part.r).double()  # a convolution has channels second
            sums[path] = sums[path] + h.T @ h if path in sums else h.T @ h
            powers[path] = powers.get(path, 0.0) + float(output.double().square().sum())
            counts[path] += len(h)

        return note

    parts = weights(model, name)
    hooks = [layer.register_forward_hook(noting(path, parts[path])) for path, layer in layers(model, name) if path in parts]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    unused = [path for path in parts if path not in sums]
    if unused:
        raise AdapterError(f"{unused[0]!r} was not used when the model ran on the held-out data: nothing can be said of its rank.")
    return {path: (sums[path] / counts[path], powers[path] / counts[path]) for path in parts}


def _directions(part: LoraWeights, moment: Tensor, power: float) -> Directions:
    a, b = part.lora_A.detach().flatten(1).double(), part.lora_B.detach().flatten(1).double()  # (r, fan-in), (out, r)
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.clamp_min(0).sqrt()  # C = root rootᵀ, as good as C^½
    q, r = torch.linalg.qr(b)
    u, s, _ = torch.linalg.svd(r @ root)
    left = q @ u
    return Directions(left.to(part.lora_B.dtype), (left.T @ b @ a).to(part.lora_A.dtype), (s * abs(part.scaling)).float(), power)
