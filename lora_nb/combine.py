"""A new adapter from several: weighted sums of updates, exact or thinned out, under the names that Hugging Face PEFT gives them.

Task arithmetic (Ilharco et al., 2022, arXiv:2212.04089) adds what several trainings changed. An update is s · B A, and there
are two places to add: the matrices A and B by themselves, cheap and rough, or the product B A, exact.

| method | what it computes |
| --- | --- |
| `cat` | the exact sum, the matrices side by side; the ranks add |
| `svd` | the exact sum, cut to its `svd_rank` largest singular values (default: the largest rank among the adapters) |
| `linear` | sums of A and of B, each with √(wᵢ sᵢ), for equal ranks: has products Bᵢ Aⱼ of different adapters in it, too |
| `magnitude_prune` | `linear` of the share `density` of the entries, those of largest size |
| `dare_linear` | `linear` of a random share, made 1/density larger (Yu et al., 2023, arXiv:2311.03099, section 3.2) |
| `ties` | the largest entries, then the mean of those of the majority's sign (Yadav et al., 2023, arXiv:2306.01708, section 4) |
| `dare_ties` | as `ties`, but random entries as in `dare_linear` |
| `ties_svd`, … | each of the last four on the updates themselves, factorised again as in `svd`: slow on large layers |

The `ties` kinds give a weighted mean, not a sum: where n adapters agree, 1/n of it (of A and of B each, but with `_svd`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_nb.attach import adapters, attach, check_name
from lora_nb.attach_report import AttachReport
from lora_nb.configs import LoraConfig
from lora_nb.configs.checks import is_count, is_number
from lora_nb.errors import AdapterError, ConfigError, nearest
from lora_nb.factors import Factors, concatenate, factorise, truncate, updates, write
from lora_nb.targets import base_modules, named, short_names


class Rule(NamedTuple):
    """How tensors become one: which entries are dropped first, and whether a majority decides each entry's sign."""

    drop: str | None
    elect: bool


RULES = {
    "linear": Rule(None, elect=False),
    "magnitude_prune": Rule("smallest", elect=False),
    "ties": Rule("smallest", elect=True),
    "dare_linear": Rule("random", elect=False),
    "dare_ties": Rule("random", elect=True),
}
METHODS = (*RULES, "cat", "svd", *(f"{name}_svd" for name in RULES if name != "linear"))


@dataclass(frozen=True)
class Recipe:
    """The settings of `combine`, checked.

    Raises:
        ConfigError: a value that is not allowed, or one that the method would ignore.
    """

    method: str
    density: float | None = None
    majority_sign_method: str = "total"
    svd_rank: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"combine(method={self.method!r}) is not known." + nearest(str(self.method), METHODS))
        if self.majority_sign_method not in ("total", "frequency"):
            raise ConfigError(f"combine(majority_sign_method={self.majority_sign_method!r}): it is 'total' or 'frequency'.")
        self._check_density()
        if self.svd_rank is not None and not self.by_svd:
            raise ConfigError(
                f"combine(svd_rank={self.svd_rank!r}): {self.method!r} decomposes nothing; leave it out, or use an svd method."
            )
        if self.svd_rank is not None and not is_count(self.svd_rank):
            raise ConfigError(f"combine(svd_rank={self.svd_rank!r}): it is a whole number of at least 1.")

    def _check_density(self) -> None:
        asked = f"combine(method={self.method!r}, density={self.density!r})"
        if self.rule.drop is None:
            if self.density is not None:
                raise ConfigError(f"{asked}: this method drops nothing; leave density out, or use ties, dare_… or magnitude_prune.")
        elif self.density is None:
            raise ConfigError(f"{asked}: say which share of the entries to keep, such as 0.2 (TIES) or 0.5.")
        elif not is_number(self.density) or not 0 < self.density <= 1:
            raise ConfigError(f"{asked}: it is the share of the entries to keep, above 0 and at most 1.")

    @property
    def by_svd(self) -> bool:
        """Whether updates are combined, rather than A and B by themselves, and factorised again."""
        return self.method.endswith("svd")

    @property
    def rule(self) -> Rule:
        return RULES.get(self.method.removesuffix("_svd"), RULES["linear"])


@torch.no_grad()
def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    method: str,
    name: str = "combined",
    *,
    density: float | None = None,
    majority_sign_method: str = "total",
    svd_rank: int | None = None,
    seed: int = 0,
) -> AttachReport:
    """Add a new adapter, Σ wᵢ ΔWᵢ by one of several methods, beside those that it is made of, and make it the active one.

    A module that only some of the adapters cover gets what these have.

    Args:
        weights: name of an attached adapter → its weight; a negative one subtracts.
        method: `"cat"` or `"svd"` for the exact sum, of full or of limited rank; `"linear"`, `"magnitude_prune"`, `"ties"`,
            `"dare_linear"`, `"dare_ties"` on A and B by themselves; `"ties_svd"` and so on for the last four on the updates.
        name: of the new adapter.
        density: share of the entries to keep, in (0, 1]; for the methods that drop some, and only these.
        majority_sign_method: `"total"` (the sign of the sum) or `"frequency"` (the sign that more of them have).
        svd_rank: the rank of an svd method at most; a smaller module, or a sum of smaller rank, gets what it can have.
        seed: of the entries that `dare_…` drops.

    Raises:
        ConfigError: settings that mean nothing or contradict each other, a weight of zero, ranks that do not go together.
        AdapterError: unknown adapters, ones that share no module, do more than add B A to weights, or hold NaN.
    """
    recipe = Recipe(method, density, majority_sign_method, svd_rank)
    _check(model, weights, name)
    parts = {n: updates(model, n) for n in weights}
    _refuse_disjoint(parts)
    made = _made(model, parts, weights, recipe, torch.Generator().manual_seed(seed))
    report = attach(model, _config(model, made, next(iter(weights))), name)
    write(model, name, made)
    return report


def _made(
    model: nn.Module, parts: Mapping[str, Mapping[str, Factors]], by: Mapping[str, float], recipe: Recipe, generator: torch.Generator
) -> dict[str, Factors]:
    """The new adapter's parts by path, in the model's order, and with it that of the random numbers."""
    rank = recipe.svd_rank or max(f.rank for modules in parts.values() for f in modules.values())
    made = {}
    for path in (path for path, _ in model.named_modules() if any(path in modules for modules in parts.values())):
        here = {n: modules[path] for n, modules in parts.items() if path in modules}
        _refuse_ranks(path, here, recipe)
        made[path] = merged(list(here.values()), [by[n] for n in here], recipe, rank, generator)
        if not (made[path].A.isfinite().all() and made[path].B.isfinite().all()):
            raise ConfigError(f"combine(weights={dict(by)!r}) gives numbers at {path!r} that fp32 does not hold: smaller weights do.")
    return made


def merged(parts: Sequence[Factors], by: Sequence[float], recipe: Recipe, rank: int, generator: torch.Generator) -> Factors:
    """One module's part of the new adapter; `by` has the weights, `rank` limits the svd methods."""
    if recipe.method == "cat":
        return concatenate(parts, by)
    if recipe.method == "svd":  # the sum's rank is small, so there is no need to form it
        return truncate(concatenate(parts, by), rank)
    if recipe.by_svd:
        return factorise(blend([p.delta() for p in parts], by, recipe, generator), rank)
    scaled = [w * p.scaling for w, p in zip(by, parts, strict=True)]
    roots = [math.sqrt(abs(s)) for s in scaled]
    signed = [math.copysign(root, s) for root, s in zip(roots, scaled, strict=True)]
    return Factors(blend([p.A for p in parts], signed, recipe, generator), blend([p.B for p in parts], roots, recipe, generator))


def blend(tensors: Sequence[Tensor], by: Sequence[float], recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Tensors of one shape, thinned out and added up with weights `by`; after an election the mean of those that won it."""
    kept = torch.stack([thin(t, recipe, generator) for t in tensors])
    weighted = kept * torch.tensor(by, device=kept.device).view(-1, *[1] * (kept.ndim - 1))
    if not recipe.rule.elect:
        return weighted.sum(0)
    votes = kept if recipe.majority_sign_method == "total" else kept.sign()
    majority = torch.where(votes.sum(0) >= 0, 1, -1)
    won = kept.sign() == majority
    return (weighted * won).sum(0) / won.sum(0).clamp(min=1)


def thin(tensor: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """The tensor with a share `density` of its entries: the largest, or random ones made 1/density larger, so that their mean stays."""
    if recipe.rule.drop is None or recipe.density is None or recipe.density == 1:
        return tensor
    if recipe.rule.drop == "random":
        # Drawn on the CPU, so that a seed means the same on every device.
        keep = torch.bernoulli(torch.full(tensor.shape, recipe.density), generator=generator)
        return tensor * keep.to(tensor.device) / recipe.density
    count = int(recipe.density * tensor.numel())
    if count == 0:
        raise ConfigError(f"combine(density={recipe.density!r}) keeps none of the {tensor.numel()} entries of a matrix: keep more.")
    largest = tensor.abs().flatten().topk(count).indices
    return torch.zeros_like(tensor).flatten().index_copy(0, largest, tensor.flatten()[largest]).view_as(tensor)


def _check(model: nn.Module, given: Mapping[str, float], name: str) -> None:
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(f"combine(weights={given!r}): give a dict of adapter name to weight, such as {{'tone': 0.7, 'french': 0.3}}.")
    check_name(model, name)
    for adapter, weight in given.items():
        if not is_number(weight) or weight == 0:
            hint = "leave it out" if is_number(weight) else "give a finite number"
            raise ConfigError(f"combine: the weight of {adapter!r} is {weight!r}; {hint}.")


def _refuse_disjoint(parts: Mapping[str, Mapping[str, Factors]]) -> None:
    covered = Counter(path for modules in parts.values() for path in modules)
    if len(parts) > 1 and max(covered.values()) == 1:
        raise AdapterError(
            f"The adapters {', '.join(map(repr, parts))} have no module in common, so there is nothing to combine: "
            f"set_active(model, {list(parts)!r}) lets them act side by side."
        )


def _refuse_ranks(path: str, here: Mapping[str, Factors], recipe: Recipe) -> None:
    ranks = {name: f.rank for name, f in here.items()}
    most = next(iter(here.values())).largest_rank
    if recipe.method in RULES and len(set(ranks.values())) > 1:
        raise ConfigError(
            f"combine(method={recipe.method!r}) adds the A and the B of several adapters, so their ranks must be equal, but at {path!r} "
            f"they are {ranks}: use 'cat', 'svd'" + (f" or '{recipe.method}_svd'." if recipe.method != "linear" else ".")
        )
    rank = sum(ranks.values()) if recipe.method == "cat" else 0 if recipe.by_svd else max(ranks.values())
    if rank > most:
        raise ConfigError(
            f"combine(method={recipe.method!r}) would give {path!r} the rank {rank}, but its sizes allow {most}: "
            f"use 'svd' with svd_rank={most}, which loses nothing there."
        )


def _config(model: nn.Module, made: Mapping[str, Factors], first: str) -> LoraConfig:
    """A config that means these modules with these ranks and a scale of 1; the rest is as in the first adapter's."""
    like = adapters(model).reports[first].config
    assert isinstance(like, LoraConfig)  # updates() refuses others
    names = short_names(model, list(made))
    exact = {path for path, _ in base_modules(model) if path and named(path, names)} == set(made)  # a path may be another's end
    rank = Counter(f.rank for f in made.values()).most_common(1)[0][0]
    own = {"^" + re.escape(path): f.rank for path, f in made.items() if f.rank != rank}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=names if exact else "|".join(map(re.escape, made)),
        rank_pattern=own,
        alpha_pattern=own,
        lora_dropout=like.lora_dropout,
        task_type=like.task_type,
    )
