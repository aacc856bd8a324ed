"""The conflict report against its definitions on dense matrices, and against cases that can be told by eye."""

import importlib
import math
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_nb.attach import attach, weights
from lora_nb.configs import LoraConfig
from lora_nb.conflicts import ConflictReport, Overlap, conflicts, cosine, overlap, sign_conflict
from lora_nb.errors import AdapterError
from lora_nb.factors import Factors
from tests.models import fill, tiny_gpt2, tiny_llama

CONFIG = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])


def random(seed: int, r: int, sizes: tuple[int, int] = (11, 9), groups: int = 1) -> Factors:
    g = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(groups, r, sizes[1], generator=g), torch.randn(groups, sizes[0], r, generator=g), 0.5 + seed % 3)


def principal(one: Tensor, two: Tensor) -> float:
    """Mean cos² of the angles between the column spaces, from their textbook definition."""
    cosines = torch.linalg.svdvals(torch.linalg.qr(one)[0].T @ torch.linalg.qr(two)[0])
    return float(cosines.square().mean())


SEED, RANK = st.integers(0, 10**6), st.integers(1, 5)
some = settings(max_examples=40, deadline=None)


@some
@given(SEED, RANK, RANK)
def test_each_measure_is_its_definition(seed: int, r: int, q: int) -> None:
    one, two = random(seed, r), random(seed + 1, q)
    d1, d2 = one.delta()[0], two.delta()[0]
    assert overlap(one, two) == pytest.approx((principal(one.A[0].T, two.A[0].T), principal(one.B[0], two.B[0])), abs=1e-5)
    assert cosine(one, two) == pytest.approx(float(torch.cosine_similarity(d1.flatten(), d2.flatten(), dim=0)), abs=1e-5)
    product = (d1 * d2).double()
    assert sign_conflict(one, two) == pytest.approx(float(-product[product < 0].sum() / product.abs().sum()), abs=1e-5)


@some
@given(SEED, RANK, st.integers(1, 3))
def test_an_adapter_with_itself_and_with_its_opposite(seed: int, r: int, groups: int) -> None:
    one = random(seed, r, groups=groups)
    opposite = Factors(one.A, -one.B, 7.0)
    assert overlap(one, opposite) == pytest.approx((1, 1), abs=1e-5)
    assert (cosine(one, one), sign_conflict(one, one)) == (pytest.approx(1), 0)
    assert (cosine(one, opposite), sign_conflict(one, opposite)) == (pytest.approx(-1), 1)


def test_by_eye() -> None:
    """ΔW₁ = [[3, 0], [1, 0]], ΔW₂ = [[1, 0], [−1, 0]]: one entry against, with a weight of 1 in 4; one space read, two lines written."""
    one = Factors(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[3.0], [1.0]]]))
    two = Factors(torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.5], [-0.5]]]))
    assert sign_conflict(one, two) == 0.25
    assert cosine(one, two) == pytest.approx(2 / math.sqrt(10 * 2))
    assert overlap(one, two) == pytest.approx((1.0, 0.2))  # cos of (3, 1) and (1, −1): 2/√20


def test_random_spaces_overlap_as_said() -> None:
    """The larger rank by the number of dimensions."""
    seen = [overlap(random(seed, 6, (40, 60)), random(seed + 500, 2, (40, 60))) for seed in range(100)]
    assert sum(o.A for o in seen) / 100 == pytest.approx(6 / 60, abs=0.02)
    assert sum(o.B for o in seen) / 100 == pytest.approx(6 / 40, abs=0.02)


def test_a_row_twice_is_one_direction() -> None:
    """Else a space of one dimension would count as two: ΔW is (1, 2, 0) ⊗ e₁, the identity of a plane, and (0, 1, 1) ⊗ e₃."""
    line = Factors(torch.tensor([[[1.0, 0, 0], [2.0, 0, 0]]]), torch.eye(3)[None, :, :2])
    plane = Factors(torch.eye(3)[None, :2], torch.eye(3)[None, :, :2])
    other = Factors(torch.tensor([[[0.0, 0, 1], [0, 0, 1]]]), torch.eye(3)[None, :, 1:])
    assert overlap(line, plane) == pytest.approx((1, 1))
    assert overlap(line, other) == pytest.approx((0, 0.4))  # cos of (1, 2, 0) and (0, 1, 1): 2/√10


def test_pissa_is_compared_by_what_it_changed() -> None:
    """Not by what it began with, which two of them have in common."""
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"], init_lora_weights="pissa")
    model = trained(config, config)
    attach(model, config, "fresh")
    deltas = {n: {path: w.delta().detach() for path, w in weights(model, n).items()} for n in "ab"}
    report = conflicts(model, ["a", "b"])
    for path, d in deltas["a"].items():
        e = deltas["b"][path]
        assert report.cosine["a", "b"][path] == pytest.approx(float((d * e).sum() / d.norm() / e.norm()), abs=1e-4)
        u, v = (torch.linalg.svd(m)[0][:, :4] for m in (d, e))
        assert pytest.approx(float((u.T @ v).square().sum() / 4), abs=1e-3) == report.overlap["a", "b"][path].B
    with pytest.raises(AdapterError, match="'fresh' changes nothing yet"):
        conflicts(model, ["a", "fresh"])


class Largest(TorchDispatchMode):
    """Records the most entries that any tensor made meanwhile has."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.entries = max(self.entries, result.numel())
        return result


def test_only_some_rows_of_an_update_are_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = random(0, 3, (101, 60)), random(1, 3, (101, 60))
    at_once = sign_conflict(one, two)
    monkeypatch.setattr(importlib.import_module("lora_nb.conflicts"), "BLOCK", 600)
    with Largest() as seen:
        assert sign_conflict(one, two) == pytest.approx(at_once, rel=1e-5)
        cosine(one, two)
        overlap(one, two)
    assert 300 < seen.entries <= 600


def trained(*configs: LoraConfig, make=tiny_llama):
    model = make()
    for i, config in enumerate(configs):
        attach(model, config, "abcdef"[i])
        fill(model, "abcdef"[i], i)
    return model


def test_report_by_pair_and_module() -> None:
    model = trained(CONFIG, CONFIG, LoraConfig(r=2, lora_alpha=5, target_modules=["v_proj", "up_proj"]))
    report = conflicts(model, ["c", "a", "b"])
    assert report.names == ("c", "a", "b")
    for measure in (report.overlap, report.cosine, report.sign_conflict):
        assert list(measure) == [("c", "a"), ("c", "b"), ("a", "b")]
        assert list(measure["a", "b"]) == list(weights(model, "a"))
        assert list(measure["c", "a"]) == [f"model.layers.{i}.self_attn.v_proj" for i in range(3)]
    path = "model.layers.1.self_attn.v_proj"
    a, c = (weights(model, n)[path] for n in "ac")
    one, two = a.delta().detach().flatten(), c.delta().detach().flatten()
    assert report.cosine["c", "a"][path] == pytest.approx(float(one @ two / one.norm() / two.norm()), abs=1e-5)
    spaces = [(w.lora_A.detach().T, w.lora_B.detach()) for w in (c, a)]
    assert report.overlap["c", "a"][path] == pytest.approx([principal(one, two) for one, two in zip(*spaces, strict=True)], abs=1e-5)


def test_a_module_where_one_changes_nothing() -> None:
    model = trained(CONFIG, CONFIG)
    path = "model.layers.1.self_attn.v_proj"
    with torch.no_grad():
        weights(model, "b")[path].lora_B.zero_()
    report = conflicts(model, ["a", "b"])
    assert report.overlap["a", "b"][path] == Overlap(0, 0)
    assert report.cosine["a", "b"][path] == report.sign_conflict["a", "b"][path] == 0
    assert report.overlap["a", "b"]["model.layers.0.self_attn.v_proj"].A > 0


def test_groups_of_a_convolution_are_compared_one_by_one() -> None:
    """As one matrix each: B by blocks of outputs, and zeros beside them."""
    model = nn.Sequential(nn.Conv2d(6, 8, 3, groups=2))
    for name in "ab":
        attach(model, LoraConfig(r=4, lora_alpha=6, target_modules="0", task_type=None), name)
        fill(model, name, ord(name))
    report, dense = conflicts(model, ["a", "b"]), []
    for name in "ab":
        w = weights(model, name)["0"]
        a, b = w.lora_A.detach().flatten(1), w.lora_B.detach().flatten(1)
        dense.append(torch.block_diag(b[:4], b[4:]) @ a)
    one, two = dense
    assert report.cosine["a", "b"]["0"] == pytest.approx(float((one * two).sum() / one.norm() / two.norm()), abs=1e-5)
    product = one * two
    assert report.sign_conflict["a", "b"]["0"] == pytest.approx(float(-product[product < 0].sum() / product.abs().sum()), abs=1e-5)
    assert 0 < report.overlap["a", "b"]["0"].B < 1


def test_embeddings_and_conv1d() -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["wte", "c_attn"])
    report = conflicts(trained(config, config, make=tiny_gpt2), ["a", "b"])
    assert len(report.cosine["a", "b"]) == 4
    assert all(abs(c) < 0.5 for c in report.cosine["a", "b"].values())


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a"], "name two adapters or more"),
        (["a", "a"], "name two adapters or more"),
        ("ab", "name two adapters or more"),
        (["a", "x"], "no adapter 'x'"),
        (["a", "far"], "no module in common"),
        (["a", "fresh"], "'fresh' changes nothing yet"),
        (["a", "broken"], "'broken' has NaN or infinity"),
    ],
)
def test_refused(names: list[str], words: str) -> None:
    model = trained(CONFIG, CONFIG)
    attach(model, LoraConfig(r=2, lora_alpha=5, target_modules=["up_proj"]), "far")
    fill(model, "far")
    attach(model, CONFIG, "fresh")
    attach(model, CONFIG, "broken")
    with torch.no_grad():
        weights(model, "broken")["model.layers.0.self_attn.q_proj"].lora_A[0, 0] = math.nan
    with pytest.raises(AdapterError, match=words):
        conflicts(model, names)


def made_up() -> ConflictReport:
    paths = {f"model.layers.{i}.{m}": (i + 1) / 10 for i in range(3) for m in ("attn.q<b>", "mlp.up")} | {"lm_head": -0.25}
    one = {path: Overlap(v, v / 2) for path, v in paths.items()}
    return ConflictReport(("a", "b<i>"), {("a", "b<i>"): one}, {("a", "b<i>"): paths}, {("a", "b<i>"): paths})


def test_text_form_has_the_means_of_each_kind() -> None:
    lines = repr(made_up()).splitlines()
    assert lines[0] == "adapters 'a' and 'b<i>'"
    assert re.split(r"\s{2,}", lines[1]) == ["module, mean over layers", "overlap of A", "overlap of B", "cosine", "sign conflict"]
    assert lines[3].split() == ["model.layers.*.attn.q<b>", "0.2", "0.1", "0.2", "0.2"]
    assert lines[5].split() == ["lm_head", "-0.25", "-0.125", "-0.25", "-0.25"]


def test_html_has_a_cell_for_each_module_and_layer() -> None:
    html = made_up()._repr_html_()
    root = ET.fromstring(f"<p>{html.replace('<details open>', '<details>')}</p>")  # noqa: S314 - our own
    assert [b.text for b in root.iter("b")] == ["adapters 'a' and 'b<i>'"]  # names and paths are text, not markup
    assert not list(root.iter("i"))
    assert len(list(root.iter("svg"))) == 4
    cosines = list(root.iter("svg"))[2]
    assert cosines.get("aria-label") == "cosine, by module and layer: from -0.250 to 0.300"
    assert [t.text for t in cosines.iter("title")][2:4] == ["model.layers.*.attn.q<b>, 1: 0.2000", "model.layers.*.mlp.up, 1: 0.2000"]
    assert next(iter(list(cosines.iter("title"))[-1:])).text == "lm_head, –: -0.2500"


def test_kinds_lose_what_they_begin_with_alike() -> None:
    report = conflicts(trained(CONFIG, CONFIG), ["a", "b"])
    assert [line.split()[0] for line in repr(report).splitlines()[3:]] == ["q_proj", "v_proj"]
