"""Adapters from adapters: the maths on small matrices, and what `combine` does to a model."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_nb.attach import adapters, attach, set_active, weights
from lora_nb.combine import METHODS, RULES, Recipe, blend, combine, merged, thin
from lora_nb.configs import LoraConfig
from lora_nb.configs.bottleneck import BottleneckConfig
from lora_nb.errors import AdapterError, ConfigError, LoraNbError
from lora_nb.factors import Factors, concatenate, factorise, truncate, updates
from tests.models import fill, tiny_gpt2, tiny_llama, token_ids

ATTENTION = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])
EVERY = LoraConfig(r=4, lora_alpha=10)
DENSITY = {m: 0.5 for m in METHODS if RULES.get(m.removesuffix("_svd"), RULES["linear"]).drop}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(seed: int, r: int, sizes: tuple[int, int] = (7, 9), groups: int = 1, scaling: float = 1.5) -> Factors:
    fan_out, fan_in = sizes
    g = seeded(seed)
    return Factors(torch.randn(groups, r, fan_in, generator=g), torch.randn(groups, fan_out, r, generator=g), scaling)


def delta(method: str, parts: list[Factors], by: list[float], density: float | None = None, rank: int = 99) -> Tensor:
    return merged(parts, by, Recipe(method, density), rank, seeded()).delta()


def exact(parts: list[Factors], by: list[float]) -> Tensor:
    return sum(w * p.delta() for w, p in zip(by, parts, strict=True))


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-5 * max(1.0, float(other.abs().max())))


SEED, RANK, GROUPS = st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 3)
WEIGHT = st.floats(0.05, 3).flatmap(lambda w: st.sampled_from([w, -w]))
some = settings(max_examples=40, deadline=None)


@some
@given(SEED, st.lists(st.tuples(RANK, WEIGHT), min_size=1, max_size=4), GROUPS)
def test_cat_adds_the_ranks_and_is_exact(seed: int, drawn: list, groups: int) -> None:
    parts = [random(seed + i, r, groups=groups, scaling=0.5 + i) for i, (r, _) in enumerate(drawn)]
    by = [w for _, w in drawn]
    made = concatenate(parts, by)
    assert made.rank == sum(p.rank for p in parts) == groups * sum(r for r, _ in drawn)
    assert close(made.delta(), exact(parts, by))


@some
@given(SEED, RANK, st.sampled_from(METHODS), GROUPS)
def test_one_adapter_of_weight_1_stays_itself(seed: int, r: int, method: str, groups: int) -> None:
    part = random(seed, r, groups=groups)
    assert close(delta(method, [part], [1.0], 1.0 if method in DENSITY else None), part.delta())


@some
@given(SEED, RANK, WEIGHT, WEIGHT, st.sampled_from(["linear", "cat", "svd"]))
def test_the_order_makes_no_difference(seed: int, r: int, w: float, v: float, method: str) -> None:
    one, two = random(seed, r), random(seed + 1, r, scaling=0.7)
    assert close(delta(method, [one, two], [w, v], rank=2 * r), delta(method, [two, one], [v, w], rank=2 * r))


@some
@given(SEED, RANK, st.lists(st.floats(0.05, 3), min_size=1, max_size=4))
def test_ties_of_all_entries_that_agree_is_the_mean_of_what_linear_sums(seed: int, r: int, by: list[float]) -> None:
    """So 1/n of linear's A and 1/n of its B; with `_svd` 1/n of the exact sum."""
    parts = [Factors(p.A.abs(), p.B.abs(), p.scaling) for p in (random(seed + i, r) for i in range(len(by)))]
    assert close(delta("ties", parts, by, 1.0) * len(by) ** 2, delta("linear", parts, by))
    assert close(delta("ties_svd", parts, by, 1.0) * len(by), exact(parts, by))


@some
@given(SEED, RANK, WEIGHT, WEIGHT)
def test_nothing_dropped_is_linear(seed: int, r: int, w: float, v: float) -> None:
    parts = [random(seed, r), random(seed + 1, r)]
    for method in ("magnitude_prune", "dare_linear"):
        assert close(delta(method, parts, [w, v], 1.0), delta("linear", parts, [w, v]))
        assert close(delta(f"{method}_svd", parts, [w, v], 1.0), exact(parts, [w, v]))


@some
@given(SEED, st.lists(RANK, min_size=1, max_size=3), RANK, GROUPS)
def test_svd_is_the_nearest_of_its_rank(seed: int, ranks: list[int], rank: int, groups: int) -> None:
    """Its error has the size of the singular values left out, also where the ranks together exceed the sizes (7 × 9)."""
    parts = [random(seed + i, r, groups=groups) for i, r in enumerate(ranks)]
    whole, made = concatenate(parts, [1.0] * len(parts)), truncate(concatenate(parts, [1.0] * len(parts)), groups * rank)
    left_out = torch.linalg.svdvals(whole.delta())[:, rank:]
    assert made.rank <= groups * rank
    error = (made.delta() - whole.delta()).norm()
    assert math.isclose(error, left_out.norm(), abs_tol=1e-4 * float(whole.delta().norm()))


def test_linear_is_what_its_formula_says() -> None:
    """√ of each weight times scale before A and before B; a minus goes before A alone."""
    one, two = random(0, 3, scaling=2.0), random(1, 3, scaling=0.5)
    made = merged([one, two], [0.6, -0.8], Recipe("linear"), 99, seeded())
    assert made.scaling == 1
    assert torch.allclose(made.A, 1.2**0.5 * one.A - 0.4**0.5 * two.A)
    assert torch.allclose(made.B, 1.2**0.5 * one.B + 0.4**0.5 * two.B)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("magnitude_prune", [4.0, -1.0, 0.0]),
        ("ties", [2.0, -2.0, 0.0]),  # the mean of 1 and 3; −2 outweighs 1; the smallest are dropped
    ],
)
def test_by_eye(method: str, expected: list[float]) -> None:
    tensors = [torch.tensor([1.0, -2.0, 0.1]), torch.tensor([3.0, 1.0, -0.2])]
    assert blend(tensors, [1.0, 1.0], Recipe(method, 0.7), seeded()).tolist() == expected


def test_frequency_counts_heads_and_total_counts_sizes() -> None:
    tensors = [torch.tensor([-5.0]), torch.tensor([1.0]), torch.tensor([3.0])]
    assert blend(tensors, [1.0] * 3, Recipe("ties", 1.0, "total"), seeded()).item() == -5
    assert blend(tensors, [1.0] * 3, Recipe("ties", 1.0, "frequency"), seeded()).item() == 2


def test_the_election_is_before_the_weights() -> None:
    """As in the paper: what an adapter says of the sign does not depend on how much of it is wanted."""
    tensors = [torch.tensor([-2.0]), torch.tensor([1.0])]
    assert blend(tensors, [0.1, 5.0], Recipe("ties", 1.0), seeded()).item() == pytest.approx(-0.2)


def test_dare_keeps_the_mean() -> None:
    entries = torch.full((100_000,), 3.0)
    thinned = thin(entries, Recipe("dare_linear", 0.2), seeded())
    assert set(thinned.unique().tolist()) == {0.0, 15.0}
    assert thinned.mean().item() == pytest.approx(3, abs=0.1)  # 6 / √100,000 is one deviation: 0.02


def test_factorise_splits_an_update_of_full_rank() -> None:
    full = torch.randn(2, 6, 5)
    assert torch.allclose(factorise(full, 10).delta(), full, atol=1e-5)
    assert factorise(full, 4).A.shape == (2, 2, 5)


def pair(first: LoraConfig = ATTENTION, second: LoraConfig = ATTENTION, make=tiny_llama) -> nn.Module:
    """A model with adapters `a` and `b`."""
    model = make()
    for seed, (name, config) in enumerate({"a": first, "b": second}.items()):
        attach(model, config, name)
        fill(model, name, seed)
    return model


def error(model: nn.Module, name: str, by: dict[str, float]) -> float:
    """Of ΔW against the exact sum, relative, over the whole model."""
    made, parts = updates(model, name), {n: updates(model, n) for n in by}
    wrong = right = 0.0
    for path, f in made.items():
        sum_ = exact([p[path] for p in parts.values() if path in p], [by[n] for n, p in parts.items() if path in p])
        wrong, right = wrong + float((f.delta() - sum_).norm() ** 2), right + float(sum_.norm() ** 2)
    return math.sqrt(wrong / right)


def test_what_linear_costs() -> None:
    """0.7 and 0.3 of two r=4 adapters, as measured on PEFT: linear 0.84, cat 8e-8, svd of rank 8 5e-7 and of rank 4 0.33."""
    model, by = pair(EVERY, EVERY), {"a": 0.7, "b": 0.3}
    combine(model, by, "linear", "linear")
    combine(model, by, "cat", "cat")
    combine(model, by, "svd", "svd8", svd_rank=8)
    combine(model, by, "svd", "svd4")
    # The products of different adapters: √(2·0.7·0.3 / (0.7² + 0.3²)) = 0.85 where these are orthogonal.
    assert error(model, "linear", by) == pytest.approx(0.84, abs=0.04)
    assert error(model, "cat", by) < 2e-7
    assert error(model, "svd8", by) < 2e-6
    assert error(model, "svd4", by) == pytest.approx(0.33, abs=0.04)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_an_adapter_that_acts_and_leaves_the_others(method: str) -> None:
    model = pair()
    before = {n: copy.deepcopy(dict(weights(model, n))) for n in "ab"}
    report = combine(model, {"a": 0.7, "b": -0.3}, method, density=DENSITY.get(method))
    assert adapters(model).active == ("combined",)
    assert adapters(model).reports["combined"] is report
    assert report.matched.keys() == adapters(model).reports["a"].matched.keys()
    assert {m.rank for m in report.matched.values()} == {8 if method == "cat" else 4}
    assert {m.scale for m in report.matched.values()} == {1.0}
    with torch.no_grad():
        combined = model(input_ids=token_ids()).logits
        set_active(model, [])
        assert (model(input_ids=token_ids()).logits - combined).abs().max() > 1e-3
    for n in "ab":
        for path, w in weights(model, n).items():
            assert torch.equal(w.lora_A, before[n][path].lora_A)
            assert torch.equal(w.lora_B, before[n][path].lora_B)


def test_the_sum_acts_as_both_adapters_do() -> None:
    model = pair(EVERY, LoraConfig(r=2, lora_alpha=7, use_rslora=True))
    combine(model, {"a": 1, "b": 1}, "cat")
    with torch.no_grad():
        combined = model(input_ids=token_ids()).logits
        set_active(model, ["a", "b"])
        assert torch.allclose(model(input_ids=token_ids()).logits, combined, atol=1e-5)


def test_conv1d_and_embeddings() -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["wte", "c_attn", "mlp.c_proj"])
    model, by = pair(config, config, tiny_gpt2), {"a": 0.7, "b": 0.3}
    combine(model, by, "cat", "cat")
    combine(model, by, "svd", "svd", svd_rank=8)
    assert error(model, "cat", by) < 2e-7
    assert error(model, "svd", by) < 2e-6


def test_each_module_gets_what_the_adapters_have_there() -> None:
    model = pair(ATTENTION, LoraConfig(r=2, lora_alpha=5, target_modules=["v_proj", "layers.0.mlp.up_proj"]))
    report = combine(model, {"a": 0.5, "b": 2}, "cat")
    ranks = {path: m.rank for path, m in report.matched.items()}
    assert {path.split(".", 2)[2]: r for path, r in ranks.items() if ".0." in path or ".1." in path} == {
        "0.self_attn.q_proj": 4, "0.self_attn.v_proj": 6, "0.mlp.up_proj": 2, "1.self_attn.q_proj": 4, "1.self_attn.v_proj": 6,
    }  # fmt: skip
    assert error(model, "combined", {"a": 0.5, "b": 2}) < 2e-7
    assert list(ranks) == [path for path, _ in model.named_modules() if path in ranks]


def test_svd_takes_the_largest_rank_there_is_where_it_fits() -> None:
    """As PEFT: the largest of all modules, also for a module where the adapters have less."""
    model = pair(LoraConfig(r=2, lora_alpha=6, rank_pattern={"q_proj": 5}), LoraConfig(r=2, lora_alpha=7))
    report = combine(model, {"a": 1, "b": 1}, "svd")
    ranks = {path.rsplit(".", 1)[1]: m.rank for path, m in report.matched.items()}
    assert ranks["q_proj"] == 5
    assert ranks["v_proj"] == 4  # 2 + 2, more is not in it
    assert {m.rank for m in combine(model, {"a": 1, "b": 1}, "svd", "three", svd_rank=3).matched.values()} == {3}


def test_a_path_that_is_the_end_of_another_means_only_itself() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 5)
            self.one, self.two = (nn.ModuleDict({"lin": nn.Linear(6, 5)}) for _ in range(2))

    model = Twice()
    for name, target, r in (("a", "lin", 2), ("b", r"(.*\.)?lin", 3)):
        attach(model, LoraConfig(r=r, lora_alpha=5, target_modules=target), name)
    both = combine(model, {"a": 1, "b": 1}, "cat", "both")
    assert {path: m.rank for path, m in both.matched.items()} == {"lin": 5, "one.lin": 3, "two.lin": 3}
    model = Twice()
    for name in "ab":
        attach(model, LoraConfig(r=2, lora_alpha=5, target_modules=r"lin"), name)
    assert list(combine(model, {"a": 1, "b": 1}, "cat").matched) == ["lin"]


def test_dare_depends_on_the_seed_alone() -> None:
    model = pair()
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        torch.manual_seed(len(name))
        combine(model, {"a": 1, "b": 1}, "dare_ties", name, density=0.5, seed=seed)
    one, two, three = (torch.cat([f.delta().flatten() for f in updates(model, n).values()]) for n in ("one", "two", "three"))
    assert torch.equal(one, two)
    assert not torch.allclose(one, three, atol=1e-3)


EQUAL = {"a": 1.0, "b": 1.0}
REFUSED = {
    "no weights": ({}, "linear", {}, ConfigError, "give a dict of adapter name to weight"),
    "a list": (["a", "b"], "linear", {}, ConfigError, "give a dict"),
    "unknown adapter": ({"a": 1.0, "c": 1.0}, "linear", {}, AdapterError, "no adapter 'c'"),
    "unknown method": (EQUAL, "tise", {}, ConfigError, "Did you mean 'ties'"),
    "zero": ({"a": 1.0, "b": 0}, "linear", {}, ConfigError, "weight of 'b' is 0; leave it out"),
    "nan": ({"a": 1.0, "b": math.nan}, "linear", {}, ConfigError, "weight of 'b' is nan; give a finite number"),
    "infinity": ({"a": -math.inf}, "linear", {}, ConfigError, "finite"),
    "too large for fp32": ({"a": 1e299}, "cat", {}, ConfigError, "fp32 does not hold"),
    "too large for a float": ({"a": 10**400}, "cat", {}, ConfigError, "give a finite number"),
    "a word": ({"a": "1"}, "linear", {}, ConfigError, "finite"),
    "True": ({"a": True}, "linear", {}, ConfigError, "finite"),
    "density left out": (EQUAL, "ties", {}, ConfigError, "say which share of the entries to keep"),
    "density 0": (EQUAL, "ties", {"density": 0}, ConfigError, "above 0 and at most 1"),
    "density 2": (EQUAL, "dare_linear_svd", {"density": 2}, ConfigError, "above 0 and at most 1"),
    "density nan": (EQUAL, "dare_ties", {"density": math.nan}, ConfigError, "above 0 and at most 1"),
    "density of nothing": (EQUAL, "magnitude_prune", {"density": 1e-3}, ConfigError, "keeps none of the 128 entries"),
    "density for nothing": (EQUAL, "linear", {"density": 0.5}, ConfigError, "drops nothing; leave density out"),
    "svd_rank for nothing": (EQUAL, "cat", {"svd_rank": 4}, ConfigError, "leave it out, or use an svd method"),
    "svd_rank 0": (EQUAL, "svd", {"svd_rank": 0}, ConfigError, "at least 1"),
    "svd_rank 2.0": (EQUAL, "svd", {"svd_rank": 2.0}, ConfigError, "at least 1"),
    "majority": (EQUAL, "ties", {"density": 0.5, "majority_sign_method": "mean"}, ConfigError, "'total' or 'frequency'"),
    "a name that is taken": (EQUAL, "cat", {"name": "a"}, AdapterError, "already has an adapter 'a'"),
    "a name that cannot be one": (EQUAL, "cat", {"name": "a.b"}, AdapterError, "cannot name an adapter"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_the_model_left_as_it_was(case: str) -> None:
    given_, method, settings_, kind, words = REFUSED[case]
    model = pair()
    set_active(model, "a")
    with pytest.raises(kind, match=words):
        combine(model, given_, method, **settings_)
    assert list(adapters(model).reports) == ["a", "b"]
    assert adapters(model).active == ("a",)


def test_refused_for_what_the_adapters_are() -> None:
    v_proj = LoraConfig(r=3, lora_alpha=6, target_modules=["v_proj"])
    for second, method, kind, words in (
        (
            LoraConfig(r=3, lora_alpha=6, target_modules=["v_proj"]),
            "linear",
            ConfigError,
            r"ranks must be equal, but at .*v_proj' they are",
        ),
        (v_proj, "ties", ConfigError, "use 'cat', 'svd' or 'ties_svd'"),
        (LoraConfig(r=13, lora_alpha=6, target_modules=["v_proj"]), "cat", ConfigError, "rank 17, but its sizes allow 16.*svd_rank=16"),
        (LoraConfig(r=4, lora_alpha=6, target_modules=["up_proj"]), "cat", AdapterError, "no module in common"),
    ):
        model = pair(ATTENTION, second)
        with pytest.raises(kind, match=words):
            combine(model, {"a": 1, "b": 1}, method, density=DENSITY.get(method))
        assert list(adapters(model).reports) == ["a", "b"]


def test_what_the_refusal_of_a_rank_advises_loses_nothing() -> None:
    model = pair(ATTENTION, LoraConfig(r=13, lora_alpha=6, target_modules=["v_proj"]))
    combine(model, {"a": 1, "b": 1}, "svd", svd_rank=16)
    assert error(model, "combined", {"a": 1, "b": 1}) < 2e-6


BEYOND = {
    "use_dora": ({"use_dora": True}, "DoRA's magnitude"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "bias": ({"bias": "lora_only"}, "a bias of its own"),
    "bias elsewhere": ({"bias": "all"}, "bias"),
    "modules_to_save": ({"modules_to_save": ["ln_f"]}, "whole"),
    "tokens": ({"trainable_token_indices": [3]}, "1 tokens"),
}


@pytest.mark.parametrize("case", BEYOND)
def test_more_than_matrices_is_refused(case: str) -> None:
    """Also where only the second has it, and for one alone."""
    more, words = BEYOND[case]
    plain = LoraConfig(r=4, lora_alpha=6, target_modules=["c_attn"])
    model = pair(plain, LoraConfig(r=4, lora_alpha=6, target_modules=["c_attn"], **more), tiny_gpt2)
    for by in ({"a": 1, "b": 1}, {"b": 1}):
        with pytest.raises(AdapterError, match=rf"'b' does something else at .*\({words}"):
            combine(model, by, "cat")
    assert list(adapters(model).reports) == ["a", "b"]


def test_a_bottleneck_is_refused() -> None:
    model = pair()
    attach(model, BottleneckConfig.pfeiffer(), "bottleneck")
    with pytest.raises(AdapterError, match=r"'bottleneck' does something else at .*\(bottleneck\)"):
        combine(model, {"a": 1, "bottleneck": 1}, "cat")


def test_adapted_parameters_are_refused() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 6, 5))

    model = nn.ModuleDict({"experts": Experts()})
    attach(model, LoraConfig(r=2, lora_alpha=5, target_parameters=["experts.up"]), "a")
    with pytest.raises(AdapterError, match="target_parameters"):
        combine(model, {"a": 1}, "cat")


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(groups: int) -> None:
    """The exact sum acts as both do, where each block of outputs has its own rows of A as well."""
    model, x = nn.Sequential(nn.Conv2d(6, 8, 3, groups=groups)), torch.randn(2, 6, 5, 5)
    for seed, (name, r) in enumerate({"a": 2, "b": 4}.items()):
        attach(model, LoraConfig(r=r, lora_alpha=5, target_modules="0", task_type=None), name)
        fill(model, name, seed)
    with torch.no_grad():
        set_active(model, ["a", "b"])
        both = model(x)
        assert combine(model, {"a": 1, "b": 1}, "cat", "cat").matched["0"].rank == 6
        assert torch.allclose(model(x), both, atol=1e-5)
        assert combine(model, {"a": 1, "b": 1}, "svd", "svd", svd_rank=6).matched["0"].rank == 6
        assert torch.allclose(model(x), both, atol=1e-5)


def test_an_initialisation_from_the_weight_counts_as_what_it_changes() -> None:
    """PiSSA's update is B A less what it began with, hence of twice the rank."""
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"], init_lora_weights="pissa")
    model = pair(config, config)
    report = combine(model, {"a": 1, "b": 1}, "cat")
    assert {m.rank for m in report.matched.values()} == {8}
    with torch.no_grad():
        combined = model(input_ids=token_ids()).logits
        set_active(model, ["a", "b"])
        assert torch.allclose(model(input_ids=token_ids()).logits, combined, atol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_refused_with_its_place(value: float) -> None:
    model = pair()
    with torch.no_grad():
        weights(model, "b")["model.layers.1.self_attn.v_proj"].lora_B[2, 1] = value
    with pytest.raises(LoraNbError, match=r"'b' has NaN or infinity at 'model\.layers\.1\.self_attn\.v_proj'"):
        combine(model, {"a": 1, "b": 1}, "linear")
    assert list(adapters(model).reports) == ["a", "b"]
