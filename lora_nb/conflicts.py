"""How far adapters get in each other's way: where they read, where they write, and whether they pull in one direction.

Everything is computed from the factors of ΔW = s · B A. Of ΔW itself no more than some rows are formed at a time; the scales
s > 0 cancel in all that is measured here.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lora_nb.errors import AdapterError
from lora_nb.factors import Factors, truncate, updates
from lora_nb.render import html_table, svg_heatmap, text_table

BLOCK = 1 << 22  # entries of ΔW formed at once, 16 MiB in fp32
Pair = tuple[str, str]
V = TypeVar("V")


class Overlap(NamedTuple):
    """What two updates share, from 0 to 1: of the input directions that they read (A) and of the output directions that they write (B)."""

    A: float
    B: float


@dataclass(frozen=True)
class ConflictReport:
    """Each measure by pair of adapters, in the order given, and module: `report.cosine["tone", "french"]["model.layers.0.mlp.up_proj"]`.

    `overlap` has the mean squared cosine of the principal angles between the row spaces of A, and between the column spaces
    of B (as far as the product uses them): 1 for the same space or one within the other, 0 for orthogonal ones; random spaces
    in n dimensions come to r/n, r being the larger rank. `cosine` is that of the updates ΔW, from −1 (one undoes the other)
    to 1. `sign_conflict` is the share of entries in which the signs of the updates differ, each counted by the product of the
    two sizes, so that the entries matter in which both are large: 0 for none, 1/2 for updates that have nothing to do with
    each other.
    """

    names: tuple[str, ...]
    overlap: dict[Pair, dict[str, Overlap]]
    cosine: dict[Pair, dict[str, float]]
    sign_conflict: dict[Pair, dict[str, float]]

    def _measures(self, pair: Pair) -> dict[str, dict[str, float]]:
        """Heading → module → value."""
        return {
            "overlap of A": {path: o.A for path, o in self.overlap[pair].items()},
            "overlap of B": {path: o.B for path, o in self.overlap[pair].items()},
            "cosine": self.cosine[pair],
            "sign conflict": self.sign_conflict[pair],
        }

    def _table(self, pair: Pair) -> tuple[list[str], list[list[str | float]]]:
        """Means over the layers, a row for each kind of module."""
        measures, at = self._measures(pair), places(list(self.cosine[pair]))
        rows: list[list[str | float]] = []
        for kind in dict.fromkeys(kind for kind, _ in at.values()):
            paths = [path for path, (k, _) in at.items() if k == kind]
            rows.append([kind, *(fmean(by[path] for path in paths) for by in measures.values())])
        return ["module, mean over layers", *measures], rows

    def __repr__(self) -> str:
        return "\n\n".join(_title(pair) + "\n" + text_table(*self._table(pair)) for pair in self.cosine)

    def _repr_html_(self) -> str:
        parts = [html_table(*self._table(pair)) + self._maps(pair) for pair in self.cosine]
        titles = [f"<summary><b>{html.escape(_title(pair))}</b></summary>" for pair in self.cosine]
        # One pair is open: among ten adapters there are 45.
        opened = ["<details open>", *["<details>"] * (len(parts) - 1)]
        return "".join(f"{o}{title}{part}</details>" for o, title, part in zip(opened, titles, parts, strict=True))

    def _maps(self, pair: Pair) -> str:
        """A heat map of each measure, kind of module × layer."""
        at = places(list(self.cosine[pair]))
        rows, columns = (list(dict.fromkeys(place[i] for place in at.values())) for i in (0, 1))
        maps = [
            svg_heatmap(rows, columns, {at[path]: value for path, value in by.items()}, f"{heading}, by module and layer")
            for heading, by in self._measures(pair).items()
        ]
        return f'<div style="display:flex;flex-wrap:wrap;gap:12px">{"".join(maps)}</div>'


def _title(pair: Pair) -> str:
    return f"adapters {pair[0]!r} and {pair[1]!r}"


def places(paths: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Path → (kind of module, number of its layer): `model.layers.3.mlp.up_proj` is `up_proj` of layer 3."""
    numbers = {path: re.search(r"(?<![^.])\d+(?=\.)", path) for path in paths}
    kinds = {path: f"{path[: n.start()]}*{path[n.end() :]}" if n else path for path, n in numbers.items()}
    first, last = min(kinds.values()), max(kinds.values())  # what these two begin with alike, all do
    alike = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    start = first.rfind(".", 0, alike) + 1
    return {path: (kinds[path][start:], n[0] if n else "–") for path, n in numbers.items()}


@torch.no_grad()
def conflicts(model: nn.Module, names: Sequence[str]) -> ConflictReport:
    """Compare attached adapters, each with each, on the modules that both of a pair cover.

    Where one of them changes nothing, as B is zero, they share nothing: all measures are 0.

    Raises:
        AdapterError: unknown adapters, fewer than two of them, ones that share no module, do more than add B A to weights,
            hold NaN, or change nothing at all.
    """
    wanted = tuple(dict.fromkeys(names)) if not isinstance(names, str) else (names,)
    if len(wanted) < 2:
        raise AdapterError(f"conflicts(names={names!r}): name two adapters or more, such as ['tone', 'french'].")
    parts = {name: {path: settled(f) for path, f in updates(model, name).items()} for name in wanted}
    for name, modules in parts.items():
        if not any(f.B.any() for f in modules.values()):
            raise AdapterError(f"Adapter {name!r} changes nothing yet, so nothing can conflict with it: train it first.")
    pairs = {(a, b): [path for path in parts[a] if path in parts[b]] for a, b in combinations(wanted, 2)}
    shared = {pair: paths for pair, paths in pairs.items() if paths}
    if not shared:
        raise AdapterError(f"The adapters {', '.join(map(repr, wanted))} have no module in common: their weights cannot conflict.")

    def measured(measure: Callable[[Factors, Factors], V]) -> dict[Pair, dict[str, V]]:
        return {(a, b): {path: measure(parts[a][path], parts[b][path]) for path in paths} for (a, b), paths in shared.items()}

    return ConflictReport(wanted, measured(overlap), measured(cosine), measured(sign_conflict))


def settled(f: Factors) -> Factors:
    """The same, or zeros where the product is zero but for rounding: PiSSA's B A − B₀ A₀ before the first step."""
    idle = inner(f, f) <= 1e-12 * f.A.double().square().sum() * f.B.double().square().sum()
    return Factors(f.A * 0, f.B * 0) if idle else f


def overlap(one: Factors, two: Factors) -> Overlap:
    """Mean cos² of the principal angles, from orthonormal bases: ‖Q₁ᵀQ₂‖² / min(r₁, r₂) (Björck and Golub, 1973)."""
    (rows1, columns1), (rows2, columns2) = spaces(one), spaces(two)
    return Overlap(_shared(rows1, rows2), _shared(columns1, columns2))


def spaces(f: Factors) -> tuple[Tensor, Tensor]:
    """Orthonormal columns that span the rows of ΔW, (groups, fan-in, r), and its columns, (groups, out, r).

    These are the spaces of A and of B where both have full rank. What ΔW does not use becomes zeros.
    """
    svd = truncate(f, f.rank)  # A = Vᵀ, B = U S
    S = svd.B.norm(dim=1, keepdim=True)
    used = 10 * torch.finfo(S.dtype).eps * f.scaling * f.A.norm() * f.B.norm() < S
    return svd.A.mT * used, torch.where(used, svd.B / S, 0)


def _shared(one: Tensor, two: Tensor) -> float:
    dimensions = torch.minimum(*(q.square().sum((1, 2)).round() for q in (one, two))).sum()
    return float((one.mT @ two).square().sum() / dimensions.clamp(min=1))


def cosine(one: Factors, two: Factors) -> float:
    """⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖), from products of r × r only."""
    sizes = inner(one, one).sqrt() * inner(two, two).sqrt()
    return float(inner(one, two) / sizes) if sizes > 0 else 0.0


def inner(one: Factors, two: Factors) -> Tensor:
    """⟨B₁A₁, B₂A₂⟩ = tr(A₁ᵀB₁ᵀB₂A₂), the sum of the entries of (B₁ᵀB₂) ⊙ (A₁A₂ᵀ), in fp64 as its terms may cancel."""
    a1, b1, a2, b2 = (m.double() for m in (one.A, one.B, two.A, two.B))
    return ((b1.mT @ b2) * (a1 @ a2.mT)).sum()


def sign_conflict(one: Factors, two: Factors) -> float:
    """Σ |ΔW₁ ΔW₂| over the entries whose signs differ, by that over all."""
    rows = max(1, BLOCK // (one.A.shape[0] * one.A.shape[2]))
    against = total = 0.0
    for b1, b2 in zip(torch.split(one.B, rows, 1), torch.split(two.B, rows, 1), strict=True):
        product = (b1 @ one.A) * (b2 @ two.A)
        against += float(product.clamp(max=0).sum().abs())
        total += float(product.abs().sum())
    return against / total if total > 0 else 0.0
