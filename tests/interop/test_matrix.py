"""Twelve models times all that a config can say, in both directions: the same outputs, gradients and merged weights as PEFT's.

Each cell goes through files: what one writes the other reads. The cells that PEFT refuses are listed, and it is held to that.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_nb as ln
from lora_nb.adapter_files import PREFIX
from lora_nb.attach import parts
from lora_nb.errors import AdapterError, TargetError
from tests.interop.conftest import trained
from tests.interop.zoo import ZOO, Kind, run

DAILY = ("names",)
CONFIGS: dict[str, Callable[[Kind], dict]] = {
    "names": lambda kind: {"target_modules": list(kind.layers)},
    "all-linear": lambda _: {"target_modules": "all-linear"},
    "regex": lambda kind: {"target_modules": rf".*\.?({kind.layers[0]}|{kind.layers[1]})".replace(".d", r"\.d")},
    "excluding": lambda kind: {"target_modules": list(kind.layers), "exclude_modules": r".*\.1\..*"},
    "layers": lambda kind: {"target_modules": [kind.layers[0]], "layers_to_transform": [1]},
    "rslora": lambda kind: {"target_modules": list(kind.layers), "use_rslora": True},
    "patterns": lambda kind: {
        "target_modules": list(kind.layers),
        "rank_pattern": {kind.layers[0]: 2},
        "alpha_pattern": {kind.layers[1]: 7},
    },
    "dropout": lambda kind: {"target_modules": list(kind.layers), "lora_dropout": 0.3},
    "dora": lambda kind: {"target_modules": list(kind.layers), "use_dora": True},
    "dora-rslora-dropout": lambda kind: {
        "target_modules": [kind.layers[0]],
        "use_dora": True,
        "use_rslora": True,
        "lora_dropout": 0.3,
    },
    "lora_bias": lambda kind: {"target_modules": list(kind.layers), "lora_bias": True},
    "bias-all": lambda kind: {"target_modules": [kind.layers[0]], "bias": "all"},
    "bias-lora_only": lambda kind: {"target_modules": list(kind.layers), "bias": "lora_only"},
    "modules_to_save": lambda kind: {"target_modules": [kind.layers[0]], "modules_to_save": [kind.whole]},
    "embedding": lambda kind: {"target_modules": [kind.embedding, kind.layers[0]]},
    "embedding-dora": lambda kind: {"target_modules": [kind.embedding], "use_dora": True},
    "tokens": lambda kind: {"target_modules": [kind.layers[0]], "trainable_token_indices": {kind.embedding: [3, 11, 40]}},
    "parameters": lambda kind: {"target_modules": [kind.layers[0]], "target_parameters": [kind.parameter]},
    "gaussian": lambda kind: {"target_modules": list(kind.layers), "init_lora_weights": "gaussian"},
    "orthogonal": lambda kind: {"target_modules": list(kind.layers), "init_lora_weights": "orthogonal"},
    "pissa": lambda kind: {"target_modules": list(kind.layers), "init_lora_weights": "pissa"},
    "olora": lambda kind: {"target_modules": list(kind.layers), "init_lora_weights": "olora"},
}
FROM_WEIGHT = ("pissa", "olora")
# What PEFT refuses, and in which words.
UNKNOWN = "Unknown initialization"
PEFT_CANNOT_MAKE = {
    ("gpt2", "olora"): "size mismatch",  # of the file of its start: Conv1D's W is not transposed
    ("gpt2", "parameters"): "ParamWrapper does not work with fan_in_fan_out",
    **{("cnn", init): UNKNOWN for init in ("orthogonal", *FROM_WEIGHT)},  # on a convolution
}
PEFT_CANNOT_READ = {("gpt2", "parameters"): "ParamWrapper does not work with fan_in_fan_out"}
# What has no meaning on a model, to either of the two.
MEANINGLESS = {("cnn", "tokens")}
# What lora_bias adds has no place in a layer without bias: neither merges it.
NOBODY_MERGES = {(model, "lora_bias") for model in ("llama", "mistral", "falcon", "t5", "qwen3", "gemma", "mixtral", "cnn")}
# Where the embedding is the output head as well, PEFT merges an update of the one into both.
TIED = ("falcon", "gpt2", "bert", "roberta", "t5", "gemma")
PEFT_MERGES_INTO_BOTH = {(model, config) for model in TIED for config in ("embedding", "embedding-dora")} | {("t5", "tokens")}


def cells(refused: Mapping[tuple[str, str], str]) -> list[Any]:
    """All but the refused ones; the plainest of each model are fast enough for every day."""
    every = [(model, config) for model in ZOO for config in CONFIGS if (model, config) not in MEANINGLESS | refused.keys()]
    return [pytest.param(*cell, id="-".join(cell), marks=() if cell[1] in DAILY else pytest.mark.slow) for cell in every]


def settings(model: str, config: str) -> dict:
    return {"r": 4, "lora_alpha": 10, "task_type": ZOO[model].task, **CONFIGS[config](ZOO[model])}


def under_peft(model: str, config: str) -> nn.Module:
    return peft.get_peft_model(ZOO[model].make(), peft.LoraConfig(**settings(model, config), fan_in_fan_out=model == "gpt2"))


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return run(model.eval())


def backward(model: nn.Module) -> None:
    """Of ⟨output, fixed random numbers⟩, with the same dropout for all."""
    torch.manual_seed(0)
    y = run(model.train())
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()


def our_gradients(model: nn.Module) -> dict[str, Tensor]:
    backward(model)
    return {
        f"{PREFIX}{path}{end}": p.grad
        for path, part in parts(model, "default").items()
        for end, p in part.tensors().items()
        if p.grad is not None
    }


@torch.no_grad()
def peft_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Under the keys of its file, which PEFT gives to whatever lies in its parameters."""
    with torch.enable_grad():
        backward(model)
    for p in model.parameters():
        if p.requires_grad:
            p.copy_(torch.full_like(p, torch.nan) if p.grad is None else p.grad)
    return peft.get_peft_model_state_dict(model, save_embedding_layers=False)


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5, what: str = "") -> None:
    """To `tolerance` of the largest entry, or of 1."""
    gap = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1)
    assert gap <= tolerance, f"{what}: {gap}"


def assert_same(ours: nn.Module, theirs: nn.Module, model: str, config: str) -> None:
    before, expected = output(ZOO[model].make()), output(ours)
    assert (expected - before).abs().max() > 1e-2
    assert_near(expected, output(theirs))
    mine, its = our_gradients(copy.deepcopy(ours)), peft_gradients(copy.deepcopy(theirs))
    assert mine
    for key, gradient in mine.items():
        # With a start from the weight one of the two has what it started from in further rows of A and columns of B.
        both = tuple(slice(min(sizes)) for sizes in zip(gradient.shape, its[key].shape, strict=True))
        assert config in FROM_WEIGHT or gradient.shape == its[key].shape
        assert its[key][both].abs().max() > 0, key
        assert_near(gradient[both], its[key][both], what=key)
    assert_merged(ours, theirs, expected, (model, config))


def assert_merged(ours: nn.Module, theirs: nn.Module, expected: Tensor, cell: tuple[str, str]) -> None:
    if cell in NOBODY_MERGES:
        with pytest.raises(AdapterError, match="has no bias that could take the adapter's"):
            ln.merge(ours)
        with pytest.raises(RuntimeError, match="the base layer has no bias"):
            theirs.merge_and_unload()
        return
    ln.merge(ours)
    assert_near(output(ours), expected, 1e-4, "merged")
    merged = output(theirs.merge_and_unload())
    if cell in PEFT_MERGES_INTO_BOTH:
        assert (merged - expected).abs().max() > 1e-2
    else:
        assert_near(merged, expected, 1e-4, "merged by PEFT")


@pytest.fixture(autouse=True)
def quiet_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def written_by_us(model: str, config: str, folder: Path) -> nn.Module:
    ours = ZOO[model].make()
    ln.attach(ours, ln.LoraConfig(**settings(model, config)))
    ln.save(trained(ours), folder)
    return ours


def written_by_peft(model: str, config: str, folder: Path) -> nn.Module:
    theirs, more = under_peft(model, config), {}
    if config in FROM_WEIGHT:  # PEFT makes plain LoRA of it, from the start that was saved beforehand
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(folder / "start")
        theirs.peft_config["default"].init_lora_weights = config
        more = {"path_initial_model_for_weight_conversion": str(folder / "start")}
    trained(theirs).save_pretrained(folder, **more)
    return theirs


@pytest.mark.parametrize(("model", "config"), cells(PEFT_CANNOT_READ))
def test_peft_reads_ours(model: str, config: str, tmp_path: Path) -> None:
    ours = written_by_us(model, config, tmp_path)
    theirs = peft.PeftModel.from_pretrained(ZOO[model].make(), tmp_path, is_trainable=True)
    assert_same(ours, theirs, model, config)


@pytest.mark.parametrize(("model", "config"), cells(PEFT_CANNOT_MAKE))
def test_we_read_pefts(model: str, config: str, tmp_path: Path) -> None:
    theirs, ours = written_by_peft(model, config, tmp_path), ZOO[model].make()
    ln.load_adapter(ours, tmp_path)
    assert_same(ours, theirs, model, config)


@pytest.mark.parametrize(("model", "config"), PEFT_CANNOT_MAKE)
def test_what_peft_cannot_make(model: str, config: str, tmp_path: Path) -> None:
    with pytest.raises((RuntimeError, ValueError), match=PEFT_CANNOT_MAKE[model, config]):
        written_by_peft(model, config, tmp_path)


@pytest.mark.parametrize(("model", "config"), PEFT_CANNOT_READ)
def test_what_peft_cannot_read(model: str, config: str, tmp_path: Path) -> None:
    """It is an adapter to us all the same."""
    ours, again = written_by_us(model, config, tmp_path), ZOO[model].make()
    with pytest.raises(ValueError, match=PEFT_CANNOT_READ[model, config]):
        peft.PeftModel.from_pretrained(ZOO[model].make(), tmp_path)
    ln.load_adapter(again, tmp_path)
    assert_near(output(again), output(ours))


@pytest.mark.parametrize(("model", "config"), MEANINGLESS)
def test_what_has_no_meaning_is_refused_by_both(model: str, config: str) -> None:
    with pytest.raises(TargetError, match="token 40, but 'stem' has 8"):
        ln.attach(ZOO[model].make(), ln.LoraConfig(**settings(model, config)))
    with pytest.raises(AttributeError):  # for want of the attributes of an embedding
        under_peft(model, config)


@pytest.mark.parametrize("refused", [PEFT_CANNOT_MAKE, PEFT_CANNOT_READ], ids=["made", "read"])
def test_each_model_is_tried_with_at_least_a_dozen_configs(refused: Mapping[tuple[str, str], str]) -> None:
    tried = Counter(cell.values[0] for cell in cells(refused))
    assert len(tried) == 12
    assert min(tried.values()) >= 12
    assert sum(tried.values()) + len(refused) + len(MEANINGLESS) == len(ZOO) * len(CONFIGS)
