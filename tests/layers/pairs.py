"""One layer twice: with an adapter of ours, and with PEFT's, which then have the same weights."""

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from lora_nb.attach import attach
from lora_nb.configs import LoraConfig
from lora_nb.layers.adapted import AdaptedLayer
from lora_nb.layers.lora import LoraWeights
from tests.models import peft_layers, peft_parameters, under_peft

IN, OUT, VOCABULARY = 12, 20, 30
BASES = {
    "linear": lambda: nn.Linear(IN, OUT),
    "linear without bias": lambda: nn.Linear(IN, OUT, bias=False),
    "Conv1D": lambda: Conv1D(OUT, IN),
    "embedding": lambda: nn.Embedding(VOCABULARY, OUT),
    "embedding with padding": lambda: nn.Embedding(VOCABULARY, OUT, padding_idx=3),
    "scaled embedding": lambda: Gemma3TextScaledWordEmbedding(VOCABULARY, OUT, padding_idx=0, embed_scale=5.0),
    "conv1d": lambda: nn.Conv1d(IN, OUT, 3, stride=2, padding=1),
    "conv2d": lambda: nn.Conv2d(IN, OUT, (3, 5), stride=(2, 1), padding=(1, 2)),
    "conv2d without bias": lambda: nn.Conv2d(IN, OUT, 3, padding="same", bias=False),
    "conv3d": lambda: nn.Conv3d(IN, OUT, (1, 3, 2), padding=1),
}
SIZES = {nn.Conv1d: (9,), nn.Conv2d: (8, 7), nn.Conv3d: (4, 5, 3)}


def made(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    base = BASES[kind]().to(dtype)
    if getattr(base, "bias", None) is not None:
        nn.init.normal_(base.bias)
    return base.requires_grad_(requires_grad=False)


def an_input(base: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    if isinstance(base, nn.Embedding):
        return torch.randint(VOCABULARY, (4, 15))
    sizes = next((sizes for kind, sizes in SIZES.items() if isinstance(base, kind)), None)
    return torch.randn(4, 15, IN, dtype=dtype) if sizes is None else torch.randn(4, base.in_channels, *sizes, dtype=dtype)


@dataclass
class Pair:
    """`ours` and `theirs` compute the same; `part` is our adapter in it, `base` the layer as it was."""

    ours: AdaptedLayer
    theirs: Any
    part: LoraWeights
    base: nn.Module

    def parameters(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """What the adapter trains, ours and theirs."""
        found = {"A": self.part.lora_A, "B": self.part.lora_B}
        theirs = dict(zip(found, peft_parameters(self.theirs), strict=True))
        if hasattr(self.part, "magnitude"):
            found["magnitude"], theirs["magnitude"] = self.part.magnitude, self.theirs.lora_magnitude_vector["default"].weight
        if self.part.lora_bias is not None:
            found["c"], theirs["c"] = self.part.lora_bias, self.theirs.lora_B["default"].bias
        if "bias" in self.part.whole:
            found["bias"], theirs["bias"] = self.part.whole["bias"], self.theirs.base_layer.bias
        return {name: (p, theirs[name]) for name, p in found.items()}


def on(base: nn.Module, **settings: object) -> AdaptedLayer:
    """`base` with an adapter of rank 4 and α 12, attached as a person would."""
    model = nn.ModuleDict({"m": base})
    attach(model, LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["m"]} | settings))
    return model["m"]


@torch.no_grad()
def pair(kind: str | nn.Module, **settings: object) -> Pair:
    """Both as if they were trained: with the same random weights in the adapter."""
    base = made(kind) if isinstance(kind, str) else kind.requires_grad_(requires_grad=False)
    untouched, other = copy.deepcopy(base), copy.deepcopy(base)
    config = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["m"]} | settings)
    theirs = peft_layers(under_peft(nn.ModuleDict({"m": other}), config))["m"]
    ours = on(base, **settings)
    found = Pair(ours, theirs, ours.adapters["default"], untouched)
    for name, (p, q) in found.parameters().items():
        assert p.shape == q.shape, name
        p.copy_(p * (1 + 0.3 * torch.rand_like(p)) if name == "magnitude" else torch.randn_like(p) * 0.3)
        q.copy_(p)
    return found


def run(layer: nn.Module, x: Tensor, weight: Tensor) -> SimpleNamespace:
    """Output, and the gradient of the input, of ⟨y, weight⟩; random numbers as with any other run."""
    inputs = x.clone().requires_grad_(x.is_floating_point())
    torch.manual_seed(1)
    y = layer(inputs)
    (y * weight).sum().backward()
    return SimpleNamespace(y=y.detach(), x=inputs.grad)


def assert_same(pair: Pair, *, training: bool = True, tolerance: float = 1e-5) -> None:
    """Output and all gradients, to `tolerance` of the largest entry; and the adapter does something."""
    x = an_input(pair.base)
    weight = torch.randn(pair.base(x).shape)
    ours, theirs = run(pair.ours.train(training), x, weight), run(pair.theirs.train(training), x, weight)
    assert (ours.y - pair.base(x)).abs().max() > 0.1
    assert_near(ours.y, theirs.y, tolerance)
    if x.is_floating_point():
        assert_near(ours.x, theirs.x, tolerance)
    for p, q in pair.parameters().values():
        assert q.grad.any()
        assert_near(p.grad, q.grad, tolerance)


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance * max(1.0, theirs.abs().max().item()), rtol=tolerance)
