"""Everything that a step's memory depends on, checked and in numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

from lora_nb.configs import BottleneckConfig, LoraConfig
from lora_nb.configs.quant import QuantConfig
from lora_nb.errors import ConfigError, TargetError, nearest
from lora_nb.memory.kept import Adapters, Way
from lora_nb.memory.shapes import Linear, Shape, Stack
from lora_nb.targets import is_left_out, layer_wanted, named, parts_of, rank_and_scale

Config = LoraConfig | BottleneckConfig | Literal["full"] | None
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "sgd")
CHOICES = {
    "precision": ("fp32", "bf16", "fp16"),
    "optimizer": OPTIMIZERS,
    "framework": ("lora_nb", "peft", "litgpt"),
    "device": ("cuda", "cpu"),
}
DTYPES = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}
DTYPES |= {"float16": torch.float16, "fp16": torch.float16}
MOST = {"batch_size": 1 << 20, "seq_len": 1 << 24, "gradient_accumulation_steps": 1 << 20}
FEW = 1024  # rows from which on the effective weight is formed, as in layers/lora_linear.py
FUSED = 128  # tokens from which on blocks are fused, as in fusing.py
OWN_LAYERS = ("falcon", "gpt2")  # linear layers of a class of their own, which the adapter calls instead of computing them itself
NOT_COVERED = ("target_parameters", "modules_to_save", "trainable_token_indices")


@dataclass(frozen=True)
class Setting:
    """What is asked for, resolved.

    Raises:
        ConfigError: a value that no step can have, or one that the closed form does not cover.
        TargetError: `config` names what the architecture lacks.
    """

    shape: Shape
    config: Config
    quant: QuantConfig | None
    batch_size: int
    seq_len: int
    dtype: torch.dtype
    optimizer: str
    gradient_checkpointing: bool
    gradient_accumulation_steps: int
    attention: str
    loss: str
    framework: str
    device: str
    precision: str
    ranks: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise ConfigError(f"estimate({name}={value!r}): {name} must be a whole number from 1 to {most:,}.")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"estimate({name}={getattr(self, name)!r}) is not known." + nearest(str(getattr(self, name)), choices))
        if not (self.config is None or self.config == "full" or isinstance(self.config, LoraConfig | BottleneckConfig)):
            raise ConfigError(f"estimate(config={self.config!r}): give a LoraConfig, a BottleneckConfig, 'full', or None for generation.")
        if self.quant is not None and self.config == "full":
            raise ConfigError("estimate(config='full', quant=…): weights in 4 or 8 bits cannot be trained themselves; give a LoraConfig.")
        object.__setattr__(self, "ranks", ranks(self.shape, self.config) if isinstance(self.config, LoraConfig) else {})

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def element(self) -> int:
        """Bytes of a weight and of an activation."""
        return self.dtype.itemsize

    @property
    def everything(self) -> bool:
        return self.config == "full"

    @cached_property
    def way(self) -> Way:
        """How the framework writes its products."""
        e, cuda, casts = self.element, self.device == "cuda", self.precision != "fp32"
        product, adapter = (2 if casts else e), (e if self.framework == "litgpt" or self.everything else 4)
        return Way(
            product,
            adapter,
            2 if casts else adapter,
            e,
            summed=self.framework == "lora_nb",
            fused=self.framework == "lora_nb" and self.tokens >= FUSED and not casts,
            transformers=self.framework != "litgpt",
            mask=1 if cuda else product,
            flash=cuda,
            casts=casts,
        )

    @cached_property
    def over_four_bits(self) -> bool:
        """Whether LoRA and the weight in four bits below it are one function, that of `layers/lora_gpu.py`: in 16 bits on a GPU."""
        if self.quant is None or self.quant.bitsandbytes or not isinstance(self.config, LoraConfig):
            return False
        more = self.config.use_dora or self.config.lora_bias or not isinstance(self.config.init_lora_weights, bool)
        return not more and self.framework == "lora_nb" and self.device == "cuda" and self.precision != "fp32"

    @cached_property
    def sizes(self) -> dict[str, int]:
        """What the letters of a formula stand for."""
        s = self.shape
        return {"h": s.width, "f": s.inner, "q": s.queries, "k": s.keys, "a": s.heads, "s·a": s.heads * self.seq_len, "": 1}

    def adapters(self, stack: Stack, number: int) -> Adapters:
        """What trains in one block; `number` counts through all stacks."""
        if self.config is None:
            return Adapters()
        if isinstance(self.config, BottleneckConfig):
            return Adapters(bottlenecks=tuple(self.bottlenecks(stack, number)))
        if not isinstance(self.config, LoraConfig):
            return Adapters(everything=True)
        before = 0
        for other in self.shape.stacks:
            if other is stack:
                break
            before += other.count
        at = f"{stack.path}.{number - before}."
        found = tuple((linear.path, r) for linear in stack.linears if (r := self.ranks.get(at + linear.path)))
        slow = not self.over_four_bits and (
            self.config.lora_bias
            or self.quant is not None
            or self.shape.model_type in OWN_LAYERS
            or not isinstance(self.config.init_lora_weights, bool)
        )
        return Adapters(found, self.config.lora_dropout, self.config.use_dora, slow, self.over_four_bits)

    def bottlenecks(self, stack: Stack, number: int) -> Iterator[tuple[str, int, str]]:
        """(sublayer, width of the bottleneck, what it reads)."""
        config = self.config
        assert isinstance(config, BottleneckConfig)
        factor = config.factor(number)
        if number in config.leave_out or factor is None:
            return
        places = {"attention": config.mh_adapter, "cross-attention": config.cross_adapter and stack.cross, "mlp": config.output_adapter}
        for place in (name for name, wanted in places.items() if wanted):
            yield place, max(1, int(self.shape.width // factor)), config.reading()

    def blocks(self) -> list[tuple[Stack, Adapters, int]]:
        """Runs of like blocks in a row: (stack, what trains in each, how many)."""
        runs: list[tuple[Stack, Adapters, int]] = []
        number = 0
        for stack in self.shape.stacks:
            for _ in range(stack.count):
                adapters = self.adapters(stack, number)
                if runs and runs[-1][:2] == (stack, adapters):
                    runs[-1] = (stack, adapters, runs[-1][2] + 1)
                else:
                    runs.append((stack, adapters, 1))
                number += 1
        return runs

    def trainable(self) -> list[int]:
        """Numbers in each tensor that trains, where the optimizer looks at them one by one."""
        if isinstance(self.config, LoraConfig):
            everything = self.targets()
            tensors = [n for path, r in self.ranks.items() for n in (r * everything[path].inputs, r * everything[path].outputs)]
            more = self.config.use_dora + self.config.lora_bias
            return tensors + [everything[path].outputs for path in self.ranks] * more
        if isinstance(self.config, BottleneckConfig):
            h = self.shape.width
            kinds = [(m, count) for _, adapters, count in self.blocks() for _, m, _ in adapters.bottlenecks]
            return [n for m, count in kinds for n in [m * h, m, m * h, h] * count]
        return [self.shape.parameters] if self.everything else []

    def targets(self) -> dict[str, Linear]:
        """All that LoRA may mean, by path."""
        return targets(self.shape)

    def quantized(self) -> dict[str, Linear]:
        """The linear layers that are kept in 4 or 8 bits."""
        if self.quant is None:
            return {}
        there = self.shape.linears()
        if not self.quant.skip_head:
            there[self.shape.head.path] = self.shape.head
        return {path: linear for path, linear in there.items() if not named(path, self.quant.skip_modules)}


def targets(shape: Shape) -> dict[str, Linear]:
    """Linear layers, output head and embedding by path."""
    embeddings = {"gpt2": "transformer.wte", "falcon": "transformer.word_embeddings", "gpt_neox": "gpt_neox.embed_in", "t5": "shared"}
    embeddings |= {"bert": "bert.embeddings.word_embeddings", "roberta": "roberta.embeddings.word_embeddings"}
    path = embeddings.get(shape.model_type, "model.embed_tokens")
    return {**shape.linears(), shape.head.path: shape.head, path: Linear(path, shape.vocabulary, shape.width)}


def ranks(shape: Shape, config: LoraConfig) -> dict[str, int]:
    """Rank by path of each layer that the config means, as `targets.py` resolves it on a model.

    Raises:
        ConfigError: settings that the closed form does not cover.
        TargetError: a name, pattern, layer or rank that fits nothing.
    """
    for name in NOT_COVERED:
        if getattr(config, name):
            raise ConfigError(f"estimate does not cover LoraConfig({name}=…): trace_memory runs the model's own code and takes any config.")
    if config.bias != "none":
        raise ConfigError("estimate does not cover LoraConfig(bias=…): trace_memory runs the model's own code and takes any config.")
    there = targets(shape)
    wanted: str | Sequence[str] = config.target_modules or ()
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        found = [path for path in shape.linears() if not is_left_out(config, path)]
    else:
        found = [path for path in there if not is_left_out(config, path) and named(path, wanted) and layer_wanted(path, config)]
        for part in parts_of(wanted):
            if not any(named(path, part) for path in found):
                word = part if isinstance(part, str) else part[0]
                ends = {path.rsplit(".", 1)[-1] for path in there}
                raise TargetError(f"target_modules has {word!r}, which means no linear layer of {shape.name}." + nearest(word, ends))
    chosen = {path: rank_and_scale(config, path)[0] for path in found}
    for path, r in chosen.items():
        if r > min(there[path].inputs, there[path].outputs):
            raise TargetError(
                f"rank {r} was asked for {path!r}, which is {there[path].inputs} × {there[path].outputs}: lower r, or give this "
                f"module its own with rank_pattern={{{path.rsplit('.', 1)[-1]!r}: …}}."
            )
    return chosen


def quantized_bytes(linear: Linear, quant: QuantConfig, element: int) -> int:
    """One layer's weight with its scales; the bias stays as it is."""
    n, bias = linear.inputs * linear.outputs, linear.outputs * linear.bias * element
    if quant.quant_type == "bnb-int8":
        return n + 4 * linear.outputs + bias
    scales = math.ceil(n / quant.block_size)
    doubled = scales + 4 * math.ceil(scales / 256) + 4
    return math.ceil(n / 2) + (doubled if quant.double_quant else 4 * scales) + bias


def by_size(linears: dict[str, Linear]) -> Counter[tuple[int, int, bool]]:
    """How many there are of each size."""
    return Counter((linear.inputs, linear.outputs, linear.bias) for linear in linears.values())
