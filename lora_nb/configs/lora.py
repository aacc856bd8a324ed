"""Settings of low-rank adaptation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lora_nb.configs.checks import checked, compiles, is_choice, is_count, is_number, require
from lora_nb.errors import ConfigError

# PEFT refuses a file with any other.
TASK_TYPES = ("CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")


@checked
@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adaptation (Hu et al., 2021, arXiv:2106.09685): W + (α/r)·BA with A (r, in) and B (out, r).

    Fields are named as in Hugging Face PEFT and mean the same; only `target_modules` defaults to `"all-linear"`.

    Args:
        r: rank of the update.
        lora_alpha: α; the update is scaled by α/r, or by α/√r with `use_rslora`.
        lora_dropout: probability with which an entry of the adapter's input is zeroed while training.
        target_modules: `"all-linear"` (every linear layer but the output head), a regular expression that must match
            a module's whole path, or names, each equal to a path or to its end.
        exclude_modules: modules left out, by the same rules.
        layers_to_transform: layer numbers to adapt; only with a list of names.
        layers_pattern: name of the list that holds the layers, when it is not the first number in the path.
        rank_pattern, alpha_pattern: ranks and α of their own for modules whose path ends in the key (a regex).
        use_rslora: rank-stabilised scale (Kalajdzievski, 2023, arXiv:2312.03732).
        init_lora_weights: `True` (A uniform, B zero) or `"gaussian"` (A normal with deviation 1/r, B zero).
        task_type: written to the file for readers that want it, such as `"CAUSAL_LM"`.

    Raises:
        ConfigError: an unknown field or a value that is not allowed.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    init_lora_weights: Literal[True, "gaussian"] = True
    task_type: str | None = "CAUSAL_LM"

    def __post_init__(self) -> None:
        require(is_count(self.r), self, "r", "a whole number of at least 1")
        require(is_number(self.lora_alpha) and self.lora_alpha > 0, self, "lora_alpha", "a number above 0")
        require(is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1, self, "lora_dropout", "in [0, 1)")
        self._check_names("target_modules", required=True)
        self._check_names("exclude_modules", required=False)
        self._check_layers()
        for name, ok, allowed in (
            ("rank_pattern", is_count, "a whole number of at least 1"),
            ("alpha_pattern", lambda v: is_number(v) and v > 0, "a number above 0"),
        ):
            require(isinstance(getattr(self, name), Mapping), self, name, "a dict of module name to value")
            for key, value in getattr(self, name).items():
                compiles(key, self, name)
                if not ok(value):
                    raise ConfigError(f"LoraConfig({name}={{{key!r}: {value!r}}}): each value must be {allowed}.")
            object.__setattr__(self, name, dict(getattr(self, name)))  # the caller's dict may change, a config may not
        require(isinstance(self.use_rslora, bool), self, "use_rslora", "True or False")
        require(self.init_lora_weights is True or self.init_lora_weights == "gaussian", self, "init_lora_weights", "True or 'gaussian'")
        if self.task_type is not None:
            is_choice(self.task_type, self, "task_type", TASK_TYPES)

    def _check_names(self, name: str, *, required: bool) -> None:
        value = getattr(self, name)
        if value is None and not required:
            return
        if isinstance(value, str) and value:
            compiles(value, self, name)
        names = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence | set | frozenset) else [None]
        require(bool(names) and all(isinstance(n, str) and n for n in names), self, name, "a string or a list of module names, not empty")
        if not isinstance(value, str):
            object.__setattr__(self, name, tuple(dict.fromkeys(sorted(value) if isinstance(value, set | frozenset) else value)))

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is None:
            require(self.layers_pattern is None, self, "layers_pattern", "left out unless layers_to_transform is given")
            return
        numbers = tuple(layers) if isinstance(layers, Iterable) else (layers,)
        require(bool(numbers) and all(is_count(i, 0) for i in numbers), self, "layers_to_transform", "layer numbers from 0")
        require(
            not isinstance(self.target_modules, str), self, "layers_to_transform", "left out when target_modules is a pattern, not a list"
        )
        object.__setattr__(self, "layers_to_transform", numbers)
        if self.layers_pattern is not None:
            patterns = tuple(self.layers_pattern) if isinstance(self.layers_pattern, list | tuple | set) else (self.layers_pattern,)
            object.__setattr__(self, "layers_pattern", patterns)
            for pattern in patterns:
                compiles(pattern, self, "layers_pattern")

    def scaling(self, r: int, alpha: float) -> float:
        """The factor before BA: α/r, or α/√r with `use_rslora`."""
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r
