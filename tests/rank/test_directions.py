"""Directions against a dense SVD of the weighted update, and cutting that leaves no trace."""

import itertools

import pytest
import torch
from torch import nn

from lora_nb.attach import attach, weights
from lora_nb.configs import LoraConfig
from lora_nb.errors import AdapterError
from lora_nb.rank.directions import directions, rewritten
from tests.models import fill, tiny_gpt2, tiny_llama, token_ids

CONFIG = LoraConfig(r=4, lora_alpha=6, target_modules=["0"])


def linear(config: LoraConfig = CONFIG, module: nn.Module | None = None) -> nn.Module:
    model = nn.Sequential(module or nn.Linear(7, 5)).eval()
    attach(model, config)
    fill(model)
    return model


def inputs(n: int = 50) -> torch.Tensor:
    return torch.randn(n, 7) * torch.tensor([5.0, 1, 1, 1, 0.2, 0.1, 3])


def test_they_are_the_singular_vectors_of_the_update_weighted_by_its_inputs() -> None:
    model, x = linear(), inputs()
    found = directions(model, "default", lambda: model(x))["0"]
    delta, moment = weights(model, "default")["0"].delta().double(), (x.double().T @ x.double()) / len(x)
    values, vectors = torch.linalg.eigh(moment)
    root = vectors @ values.sqrt().diag() @ vectors.T
    u, s, _ = torch.linalg.svd(delta @ root)
    assert torch.allclose(found.values.double(), s[:4], rtol=1e-4)
    for k in (1, 2, 3):
        best = (u[:, :k] @ u[:, :k].T @ delta).float()
        assert torch.allclose(1.5 * found.left[:, :k] @ found.right[:k], best, atol=1e-5)  # α/r is 1.5
    assert found.power == pytest.approx(float(model(x).detach().square().sum(1).mean()), rel=1e-5)
    assert (found.rank, found.cost) == (4, 12)


def test_what_a_direction_adds_is_its_value() -> None:
    """E‖y_k − y_{k−1}‖² = λ_k², measured on the module's own outputs."""
    model, x = linear(), inputs()
    found = directions(model, "default", lambda: model(x))
    outputs = []
    with torch.no_grad(), rewritten(model, "default", found) as cut:
        for k in range(5):
            cut({"0": k})
            outputs.append(model(x))
        assert torch.allclose(outputs[0], model[0].base(x), atol=1e-6)
    powers = [float((b - a).square().sum(1).mean()) ** 0.5 for a, b in itertools.pairwise(outputs)]
    assert powers == pytest.approx(found["0"].values.tolist(), rel=1e-3)
    assert torch.allclose(outputs[4], model(x), atol=1e-5)


def test_afterwards_the_adapter_is_what_it_was_even_after_a_failure() -> None:
    model, x = linear(), inputs()
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = directions(model, "default", lambda: model(x))

    def fail() -> None:
        with rewritten(model, "default", found) as cut:
            cut({"0": 1})
            assert not torch.equal(model[0].adapters["default"].lora_A, before["0.adapters.default.lora_A"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Embedding(11, 6), torch.randint(11, (3, 9))),
        (nn.Conv1d(3, 8, 3, padding=1), torch.randn(2, 3, 10)),
        (nn.Conv2d(3, 8, (2, 3)), torch.randn(2, 3, 6, 7)),
    ],
    ids=["embedding", "conv1d", "conv2d"],
)
def test_other_layers_too(module, x) -> None:
    model = linear(module=module)
    found = directions(model, "default", lambda: model(x))
    with torch.no_grad(), rewritten(model, "default", found) as cut:
        whole = model(x)
        cut({"0": 4})
        assert torch.allclose(model(x), whole, atol=1e-5)
        cut({"0": 3})
        rows = whole.movedim(1, -1).reshape(-1, 8) if whole.ndim > 3 or isinstance(module, nn.Conv1d) else whole.reshape(-1, 6)
        lost = (model(x) - whole).square().sum() / len(rows)
        assert float(lost) ** 0.5 == pytest.approx(float(found["0"].values[3]), rel=1e-3)


@pytest.mark.parametrize(("make", "own"), [(tiny_llama, "down_proj"), (tiny_gpt2, "mlp.c_proj")])
def test_on_whole_models(make, own) -> None:
    model = make()
    attach(model, LoraConfig(r=3, lora_alpha=5, use_rslora=True, rank_pattern={own: 2}))
    fill(model)
    ids = token_ids()
    found = directions(model, "default", lambda: model(input_ids=ids))
    assert found.keys() == weights(model, "default").keys()
    with torch.no_grad(), rewritten(model, "default", found) as cut:
        before = model(input_ids=ids).logits
        cut({path: d.rank for path, d in found.items()})
        assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "module", "says"),
    [
        (LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=True), nn.Linear(7, 5), "DoRA's magnitude"),
        (LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights="pissa"), nn.Linear(7, 5), "start from the weight"),
        (CONFIG, nn.Conv1d(8, 8, 3, groups=2), "2 groups"),
    ],
)
def test_what_is_not_a_plain_product_is_refused(config, module, says) -> None:
    with pytest.raises(AdapterError, match=says):
        directions(linear(config, module), "default", lambda: pytest.fail("ran"))


def test_a_module_that_does_not_run_is_named() -> None:
    with pytest.raises(AdapterError, match="'0' was not used"):
        directions(linear(), "default", lambda: None)
