"""PEFT's `add_weighted_adapter` and our `combine`, on the same adapters: the same updates, to 1e-5."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_nb as ln
from lora_nb.attach import attach, detach, weights
from lora_nb.combine import METHODS, combine
from lora_nb.configs import LoraConfig
from lora_nb.factors import updates
from tests.interop.conftest import gap
from tests.models import fill, peft_config, peft_layers, tiny_gpt2, tiny_llama

ATTENTION = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])
OTHER = LoraConfig(r=4, lora_alpha=10, target_modules=["v_proj", "down_proj"])
GPT2 = LoraConfig(r=4, lora_alpha=6, target_modules=["wte", "c_attn"])
BY = {"a": 0.7, "b": -0.3}
DROPS = ("magnitude_prune", "ties", "dare_linear", "dare_ties")


def adapted(make: Callable[[], nn.Module], **configs: LoraConfig) -> nn.Module:
    model = make()
    for seed, (name, config) in enumerate(configs.items()):
        attach(model, config, name)
        fill(model, name, seed)
    return model


@torch.no_grad()
def twin(model: nn.Module, **configs: LoraConfig) -> peft.PeftModel:
    """PEFT's model with the same base and the same adapters."""
    base = copy.deepcopy(model)
    detach(base)
    first, *others = configs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out and ties, in words
        theirs = peft.get_peft_model(base, peft_config(configs[first]), first)
        for name in others:
            theirs.add_adapter(name, peft_config(configs[name]))
    for name in configs:
        for path, layer in peft_layers(theirs).items():
            ours = weights(model, name).get(path.removeprefix("base_model.model."))
            if ours is not None:
                for there, here in zip(matrices(layer, name), (ours.lora_A, ours.lora_B), strict=True):
                    there.copy_(here)
    return theirs


def matrices(layer: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


@torch.no_grad()
def their_updates(theirs: nn.Module, name: str) -> dict[str, Tensor]:
    found = {}
    for path, layer in peft_layers(theirs).items():
        if name in layer.scaling:
            a, b = matrices(layer, name)
            found[path.removeprefix("base_model.model.")] = b.flatten(1) @ a.flatten(1) * layer.scaling[name]
    return found


def add_theirs(theirs: peft.PeftModel, by: dict[str, float], method: str, monkeypatch: pytest.MonkeyPatch, seed: int = 0, **more) -> None:
    """The random numbers that PEFT drops entries by start where ours do: at the seed, when the new adapter is in place."""
    inject = type(theirs.base_model).inject_adapter

    def then_seed(*args: object, **kwargs: object) -> None:
        inject(*args, **kwargs)
        torch.manual_seed(seed)

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(type(theirs.base_model), "inject_adapter", then_seed)
        theirs.base_model.add_weighted_adapter(list(by), list(by.values()), "combined", combination_type=method, **more)


def same(model: nn.Module, theirs: nn.Module) -> None:
    """Every module's update equal to 1e-5."""
    ours, other = updates(model, "combined"), their_updates(theirs, "combined")
    assert list(ours) == list(other)
    for path, f in ours.items():
        assert other[path].abs().max() > 1e-3
        assert torch.allclose(f.delta()[0], other[path], atol=1e-5), path


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, majority: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three adapters of different scale that cover different modules, one of them subtracted."""
    configs = {"a": ATTENTION, "b": OTHER, "c": LoraConfig(r=4, lora_alpha=7, use_rslora=True, target_modules=["v_proj"])}
    density = 0.4 if method.removesuffix("_svd") in DROPS else None
    model = adapted(tiny_llama, **configs)
    theirs, by = twin(model, **configs), BY | {"c": 0.5}
    combine(model, by, method, density=density, majority_sign_method=majority, seed=7)
    add_theirs(theirs, by, method, monkeypatch, seed=7, density=density, majority_sign_method=majority)
    same(model, theirs)


@pytest.mark.parametrize("method", [m for m in METHODS if not (m.startswith("dare") and m.endswith("svd"))])
def test_conv1d_and_embedding(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT draws the entries of an update that is stored transposed in another order, so `dare_…_svd` cannot agree there."""
    configs = {"a": GPT2, "b": LoraConfig(r=4, lora_alpha=10, target_modules=["wte", "c_attn"])}
    density = 0.4 if method.removesuffix("_svd") in DROPS else None
    model = adapted(tiny_gpt2, **configs)
    theirs = twin(model, **configs)
    combine(model, BY, method, density=density)
    add_theirs(theirs, BY, method, monkeypatch, density=density)
    same(model, theirs)


class Cnn(nn.Module):
    """Kernels of 3 × 3 and 1 × 1."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(5, 8, 3), nn.Conv2d(8, 9, 1)
        self.config = {"model_type": "cnn"}

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.wide(x))


@pytest.mark.parametrize("method", METHODS)
def test_convolutions(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = {n: LoraConfig(r=4, lora_alpha=a, target_modules=["wide", "narrow"], task_type=None) for n, a in (("a", 6), ("b", 10))}
    density = 0.4 if method.removesuffix("_svd") in DROPS else None
    model = adapted(Cnn, **configs)
    theirs = twin(model, **configs)
    combine(model, BY, method, density=density)
    add_theirs(theirs, BY, method, monkeypatch, density=density)
    same(model, theirs)


@pytest.mark.parametrize(("method", "rank", "least"), [("linear", 8, 8), ("svd", 20, 20), ("cat", 28, 28), ("svd", 3, 3)])
def test_resulting_ranks(method: str, rank: int, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in PEFT's own tests: of ranks 8 and 8, 8 and 20."""
    r = 8 if method == "linear" else 20
    configs = {
        "a": LoraConfig(r=8, lora_alpha=6, target_modules=["q_proj"]),
        "b": LoraConfig(r=r, lora_alpha=10, target_modules=["q_proj"]),
    }
    model = adapted(tiny_llama, **configs)
    theirs = twin(model, **configs)
    svd_rank = rank if rank == 3 else None
    report = combine(model, BY, method, svd_rank=svd_rank)
    add_theirs(theirs, BY, method, monkeypatch, svd_rank=svd_rank)
    assert {m.rank for m in report.matched.values()} == {least}
    assert theirs.peft_config["combined"].r == rank
    same(model, theirs)


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_ranks_of_their_own(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT gives every module the largest rank and fills up with zeros; ours have what they need."""
    configs = {
        "a": LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 5}, alpha_pattern={"v_proj": 9}),
        "b": LoraConfig(r=3, lora_alpha=10, target_modules=["v_proj"]),
    }
    model = adapted(tiny_llama, **configs)
    theirs = twin(model, **configs)
    report = combine(model, BY, method)
    add_theirs(theirs, BY, method, monkeypatch)
    assert {m.rank for m in report.matched.values()} == {5}
    same(model, theirs)


@pytest.mark.parametrize("method", ["cat", "linear"])
def test_peft_reads_the_combination(method: str, tmp_path: Path) -> None:
    """With ranks that differ from module to module."""
    model = adapted(tiny_llama, a=ATTENTION, b=OTHER)
    combine(model, BY, method)
    ln.save(model, tmp_path)
    base = copy.deepcopy(model)
    detach(base)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert gap(theirs, model) <= 1e-5
    ln.load_adapter(base, tmp_path)
    assert gap(base, model) == 0


def test_where_we_differ_the_scale_of_rslora(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT takes the first adapter's config with α = r, which under rsLoRA means √r and not 1: its sum is √8 times what it should be."""
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj"])
    model = adapted(tiny_llama, a=config, b=config)
    theirs = twin(model, a=config, b=config)
    combine(model, BY, "cat")
    add_theirs(theirs, BY, "cat", monkeypatch)
    for path, f in updates(model, "combined").items():
        exact = sum(w * updates(model, n)[path].delta() for n, w in BY.items())
        assert torch.allclose(f.delta(), exact, atol=1e-6)
        assert torch.allclose(their_updates(theirs, "combined")[path], 8**0.5 * exact[0], atol=1e-5)


def test_where_we_differ_one_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT turns every method for one adapter into `linear`, in silence; ours does what was asked."""
    model = adapted(tiny_llama, a=ATTENTION)
    theirs = twin(model, a=ATTENTION)
    report = combine(model, {"a": 1}, "svd", svd_rank=2)
    add_theirs(theirs, {"a": 1}, "svd", monkeypatch, svd_rank=2)
    assert {m.rank for m in report.matched.values()} == {2}
    assert all(torch.linalg.matrix_rank(d) == 4 for d in their_updates(theirs, "combined").values())
