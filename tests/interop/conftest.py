"""Adapters that lora_nb, PEFT and transformers must mean the same by: a base, and settings in the names that all three share."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_nb as ln
from tests.models import tiny_falcon, tiny_gpt2, tiny_llama, token_ids

BASES: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny_llama,  # grouped-query attention
    "tied": lambda: tiny_llama(tied=True),
    "gpt2": tiny_gpt2,  # Conv1D
    "falcon": tiny_falcon,
    "embedded": lambda: ln.load("tiny")[0],
}
SOME = r".*layers\.[12]\.(self_attn\.[qk]_proj|mlp\.down_proj)"
# Each key that comes later would fit too, but the first wins. (In the order in which PEFT sorts them when it saves.)
PATTERNS = {
    "rank_pattern": {r"0\.mlp\..*": 5, r"layers\.\d\.mlp.*": 2, "q_proj": 3},
    "alpha_pattern": {"down_proj": 30, r"layers\.\d\.mlp.*": 3, "v_proj": 7},
}
SETTINGS: dict[str, tuple[str, dict]] = {
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "list": ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 3}),
    "paths": ("llama", {"target_modules": ["model.layers.1.mlp.up_proj", "layers.2.self_attn.o_proj"]}),
    "regex": ("llama", {"target_modules": SOME}),
    "rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "patterns": ("llama", {"target_modules": "all-linear", **PATTERNS}),
    "patterns-rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True, **PATTERNS}),
    "layers": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]}),
    "layer-pattern": ("llama", {"target_modules": ["k_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}),
    "exclude": ("llama", {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.1.self_attn.q_proj"]}),
    "exclude-regex": ("llama", {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*\.0\..*"}),
    "dropout": ("llama", {"target_modules": "all-linear", "lora_dropout": 0.5}),
    "gaussian": ("llama", {"target_modules": ["gate_proj"], "init_lora_weights": "gaussian"}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "embedding-regex": ("llama", {"target_modules": r"model\.(embed_tokens|.*\.v_proj)"}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "tied": ("tied", {"target_modules": "all-linear"}),
    "tied-embedding": ("tied", {"target_modules": ["embed_tokens", "v_proj"], "use_rslora": True}),
    "tied-head": ("tied", {"target_modules": ["lm_head", "down_proj"]}),
    "gpt2": ("gpt2", {"target_modules": "all-linear", "rank_pattern": {"c_attn": 6}}),
    "gpt2-embedding": ("gpt2", {"target_modules": ["wte", "wpe", "c_attn"]}),
    "falcon": ("falcon", {"target_modules": "all-linear", "use_rslora": True}),
    "falcon-embedding": ("falcon", {"target_modules": ["word_embeddings", "query_key_value"], "alpha_pattern": {"word_embeddings": 3}}),
    "embedded": ("embedded", {"target_modules": "all-linear", "exclude_modules": ["layers.3.mlp.up_proj"]}),  # 41 whole paths
    "embedded-embedding": ("embedded", {"target_modules": ["embed_tokens", "q_proj"], "rank_pattern": {"embed_tokens": 8}}),
}


@dataclass(frozen=True)
class Case:
    """One base, and settings for an adapter of it; alpha is never r."""

    name: str
    settings: dict
    original: nn.Module

    def base(self) -> nn.Module:
        """A copy of its own."""
        return copy.deepcopy(self.original)

    def lora_nb(self) -> ln.LoraConfig:
        return ln.LoraConfig(**self.settings)

    def peft(self, **more: object) -> peft.LoraConfig:
        return peft.LoraConfig(**self.settings, **more, task_type="CAUSAL_LM", fan_in_fan_out=self.name.startswith("gpt2"))


@pytest.fixture(scope="session")
def originals() -> dict[str, nn.Module]:
    return {name: make() for name, make in BASES.items()}


@pytest.fixture(params=SETTINGS)
def case(request: pytest.FixtureRequest, originals: dict[str, nn.Module]) -> Case:
    base, settings = SETTINGS[request.param]
    return Case(request.param, {"r": 4, "lora_alpha": 10} | settings, originals[base])


@pytest.fixture
def llama(originals: dict[str, nn.Module]) -> Case:
    """The plainest case, for what does not depend on it."""
    return Case("list", {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj"]}, originals["llama"])


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=token_ids()).logits


def gap(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of logits, of those beyond 1 in proportion: the embedded base gives logits of 20 and more."""
    a, b = logits(one), logits(other)
    return float(((a - b).abs() / b.abs().clamp_min(1)).max())


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """PEFT's: `lora_A`, `lora_B`, `lora_embedding_A` and `lora_embedding_B`."""
    return (p for name, p in model.named_parameters() if "lora_" in name)


@torch.no_grad()
def train(parameters: Iterator[nn.Parameter]) -> None:
    """Random values, as if they were trained: smaller where more of them are added up."""
    for p in parameters:
        p.copy_(torch.randn(p.shape) * (1 / max(p.shape)) ** 0.5)


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    """As if it were: all that trains is moved, a magnitude or a whole module by some of its own size."""
    for p in {id(p): p for p in model.parameters() if p.requires_grad}.values():
        size = p.std() if p.numel() > 1 and p.std() > 0 else (1 / max(p.shape)) ** 0.5
        p.add_(torch.randn_like(p) * size * 0.5)
    return model
