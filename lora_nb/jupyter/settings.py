"""What the control panel's form says, as configs and as the code that does the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_nb.bottleneck_targets import resolve_bottleneck
from lora_nb.configs import BottleneckConfig, LoraConfig, TrainConfig
from lora_nb.configs.quant import QuantConfig
from lora_nb.errors import ConfigError
from lora_nb.layers.adapted import AdaptedLayer
from lora_nb.resolution import resolve
from lora_nb.targets import base_modules

METHODS = {"LoRA": "lora", "DoRA": "dora", "Houlsby": "houlsby", "Pfeiffer": "pfeiffer", "parallel": "parallel", "full": "full"}
LOW_RANK = ("lora", "dora")
RANKS = tuple(2**i for i in range(9))
QUANTS: dict[str, tuple[str, bool] | None] = {
    "none": None,
    "int8, bitsandbytes": ("bnb-int8", False),
    "NF4": ("nf4", False),
    "NF4, double quantization": ("nf4", True),
    "NF4, bitsandbytes": ("bnb-nf4", False),
    "NF4, double quantization, bitsandbytes": ("bnb-nf4", True),
}


@dataclass(frozen=True)
class Settings:
    """One state of the form; `layers` is what the person wrote, such as "0-3, 5", and empty for all."""

    base: str = "tiny"
    method: str = "lora"
    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    layers: str = ""
    reduction_factor: int = 16
    quant: str = "none"
    data: str = "tone"
    max_steps: int = 300
    batch_size: int = 16
    seq_len: int = 256
    learning_rate: float = 5e-3
    seed: int = 0

    def adapter(self) -> LoraConfig | BottleneckConfig | None:
        """The config of the adapter; None where the whole model trains.

        Raises:
            ConfigError: a value that is not allowed.
        """
        if self.method == "full":
            return None
        if self.method not in LOW_RANK:
            make = {"houlsby": BottleneckConfig.houlsby, "pfeiffer": BottleneckConfig.pfeiffer, "parallel": BottleneckConfig.parallel}
            return make[self.method](reduction_factor=self.reduction_factor)
        return LoraConfig(**self._lora())

    def _lora(self) -> dict[str, Any]:
        chosen: dict[str, Any] = {"r": self.r, "lora_alpha": self.lora_alpha}
        chosen |= {"lora_dropout": self.lora_dropout} if self.lora_dropout else {}
        chosen |= {"target_modules": list(self.target_modules)} if self.target_modules else {}
        chosen |= {"layers_to_transform": numbers(self.layers)} if self.layers.strip() else {}
        if self.layers.strip() and not self.target_modules:
            raise ConfigError("Layers can be chosen only beside target modules: select these, too.")
        return chosen | ({"use_dora": True} if self.method == "dora" else {})

    def quantization(self) -> QuantConfig | None:
        """How the base is kept."""
        kind = QUANTS[self.quant]
        return None if kind is None else QuantConfig(quant_type=kind[0], double_quant=kind[1])  # type: ignore[arg-type]

    def training(self) -> TrainConfig:
        """The run's settings.

        Raises:
            ConfigError: a value that is not allowed.
        """
        return TrainConfig(**self._training())

    def _training(self) -> dict[str, Any]:
        names = ("max_steps", "batch_size", "seq_len", "learning_rate", "seed")
        return {name: getattr(self, name) for name in names}

    def trainable(self, model: nn.Module) -> int:
        """How many parameters would train, without touching the model.

        Raises:
            ConfigError, TargetError: the settings mean nothing on this model.
        """
        config = self.adapter()
        if config is None:
            own = {id(p): p for _, m in base_modules(model) for p in m._parameters.values() if p is not None}  # a tied weight once
            return sum(p.numel() for p in own.values())
        targets = resolve_bottleneck(model, config) if isinstance(config, BottleneckConfig) else resolve(model, config)
        return sum(t.parameters for t in targets)

    def code(self) -> str:
        """The cell that does exactly this."""
        quant, config = self.quantization(), self.adapter()
        kept = "" if quant is None else ", quant=" + _call("ln.QuantConfig", {n: getattr(quant, n) for n in ("quant_type", "double_quant")})
        attaching = [f"torch.manual_seed({self.seed})  # A starts at random", f"print(ln.attach(model, {self._adapter_code()}))"]
        lines = [
            "import torch\n" if config is not None else "",
            "import lora_nb as ln\n",
            f"model, tokenizer = ln.load({self.base!r}{kept})",
            f"examples, held_out = ln.dataset({self.data!r}, 'train'), ln.dataset({self.data!r}, 'test')",
            *(attaching if config is not None else []),
            f"run = ln.train(model, tokenizer, examples, {_call('ln.TrainConfig', self._training())})",
            "print(ln.evaluate(model, tokenizer, held_out))",
            "run",
        ]
        return "\n".join(line for line in lines if line) + "\n"

    def _adapter_code(self) -> str:
        if self.method in LOW_RANK:
            return _call("ln.LoraConfig", self._lora())
        return f"ln.BottleneckConfig.{self.method}(reduction_factor={self.reduction_factor!r})"


def _call(name: str, values: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in values.items())})"


def numbers(text: str) -> list[int]:
    """`"0-3, 5"` → [0, 1, 2, 3, 5].

    Raises:
        ConfigError: anything else.
    """
    found: list[int] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = re.fullmatch(r"(\d{1,4})(?:\s*-\s*(\d{1,4}))?", part)
        if not match:
            raise ConfigError(f"Layers {part!r}: write numbers and ranges, as in 0-3, 5.")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigError(f"Layers {part!r}: the range ends before it starts.")
        found += range(first, last + 1)
    return sorted(set(found))


def linear_groups(model: nn.Module) -> dict[str, tuple[int, str]]:
    """The model's linear layers as a person thinks of them: end of the name → how many, and their shape (out × in)."""
    groups: dict[str, list[nn.Module]] = {}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for path, module in base_modules(model):
        core = module.base if isinstance(module, AdaptedLayer) else module
        if core is not head and hasattr(core, "in_features"):
            groups.setdefault(path.rsplit(".", 1)[-1], []).append(core)
    return {name: (len(found), _shapes(found)) for name, found in groups.items()}


def _shapes(modules: Sequence[nn.Module]) -> str:
    shapes = sorted({(int(m.out_features), int(m.in_features)) for m in modules})  # type: ignore[arg-type]
    return ", ".join(f"{out} × {inner}" for out, inner in shapes[:2]) + (" …" if len(shapes) > 2 else "")
