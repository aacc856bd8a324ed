"""Settings of low-rank adaptation."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from lora_nb.configs.checks import checked, compiles, is_choice, is_count, is_number, require
from lora_nb.errors import ConfigError

# PEFT refuses a file with any other.
TASK_TYPES = ("CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")
BIASES = ("none", "all", "lora_only")
INITS = ("gaussian", "orthogonal", "pissa", "olora")
MOST_RANK = 1 << 20  # more than the width of any layer: a file may say anything


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
        use_dora: learn the length of each row of the weight apart from its direction (Liu et al., 2024, arXiv:2402.09353).
        lora_bias: give B a bias.
        bias: train biases of the base, too: `"none"`, `"all"`, or `"lora_only"` (of the adapted layers).
        init_lora_weights: `True` (A uniform, B zero), `"gaussian"`, `"orthogonal"`, `"pissa"`, `"pissa_niter_4"` (a faster, randomised
            one), or `"olora"`: see `layers/lora_init.py`.
        target_parameters: parameters that are adapted themselves, as names or ends of names such as `"experts.gate_up_proj"`: weights of
            experts that lie in one parameter. With these `target_modules` is empty unless it is given.
        modules_to_save: modules that are trained whole, as copies, and saved with the adapter, such as a classifier.
        trainable_token_indices: tokens whose embeddings are trained: their numbers, or a dict of module name to numbers.
        ensure_weight_tying: train layers that share a weight (embedding and output head) as one where one of them is named.
        task_type: written to the file for readers that want it, such as `"CAUSAL_LM"`.

    Raises:
        ConfigError: an unknown field or a value that is not allowed.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: bool | str = True
    target_parameters: Sequence[str] = ()
    modules_to_save: Sequence[str] = ()
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    ensure_weight_tying: bool = False
    task_type: str | None = "CAUSAL_LM"

    def __post_init__(self) -> None:
        require(_is_rank(self.r), self, "r", f"a whole number of at least 1 and at most {MOST_RANK}")
        require(is_number(self.lora_alpha) and self.lora_alpha > 0, self, "lora_alpha", "a number above 0")
        require(is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1, self, "lora_dropout", "in [0, 1)")
        self._check_targets()
        self._check_layers()
        self._check_pattern("rank_pattern", _is_rank, f"a whole number of at least 1 and at most {MOST_RANK}")
        self._check_pattern("alpha_pattern", lambda v: is_number(v) and v > 0, "a number above 0")
        for name in ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"):
            require(isinstance(getattr(self, name), bool), self, name, "True or False")
        is_choice(self.bias, self, "bias", BIASES)
        self._check_init()
        self._check_tokens()
        if self.task_type is not None:
            is_choice(self.task_type, self, "task_type", TASK_TYPES)

    def _check_targets(self) -> None:
        """Names as tuples; `target_modules` left out means every linear layer, or nothing beside `target_parameters`."""
        for name in ("target_parameters", "modules_to_save"):
            value = () if getattr(self, name) is None else getattr(self, name)
            require(not isinstance(value, str) and all(isinstance(n, str) and n for n in value), self, name, "a list of names")
            object.__setattr__(self, name, tuple(dict.fromkeys(value)))
        if self.target_modules is None:
            object.__setattr__(self, "target_modules", () if self.target_parameters else "all-linear")
        if self.target_modules != () or not self.target_parameters:
            self._check_names("target_modules", required=True)
        self._check_names("exclude_modules", required=False)
        beside = {"lora_dropout": self.lora_dropout, "use_dora": self.use_dora, "lora_bias": self.lora_bias}
        for name, value in beside.items() if self.target_parameters else ():
            # The update is added to the weight itself, where there is no input to drop and no output to shift.
            require(not value, self, name, "left out with target_parameters")

    def _check_init(self) -> None:
        init = self.init_lora_weights
        known = init is True or init in INITS or (isinstance(init, str) and re.fullmatch(r"pissa_niter_\d{1,3}", init) is not None)
        require(known, self, "init_lora_weights", f"True or one of {', '.join(map(repr, INITS))}, 'pissa_niter_4'")
        from_weight = init not in (True, "gaussian", "orthogonal")
        require(not (from_weight and self.target_parameters), self, "init_lora_weights", "True or 'gaussian' with target_parameters")
        odd = [r for r in (self.r, *self.rank_pattern.values()) if r % 2]
        require(not (init == "orthogonal" and odd), self, "init_lora_weights", f"another than 'orthogonal' with an odd rank ({odd[:1]})")

    def _check_tokens(self) -> None:
        tokens = self.trainable_token_indices
        if tokens is None:
            return
        lists = tokens if isinstance(tokens, Mapping) else {"": tokens}
        for numbers in lists.values():
            ok = isinstance(numbers, Sequence) and not isinstance(numbers, str) and bool(numbers) and all(is_count(i, 0) for i in numbers)
            require(ok and len(set(numbers)) == len(numbers), self, "trainable_token_indices", "token numbers from 0, each once")
        frozen = {str(name): tuple(numbers) for name, numbers in lists.items()}
        object.__setattr__(self, "trainable_token_indices", frozen if isinstance(tokens, Mapping) else frozen[""])

    def _check_pattern(self, name: str, ok: Callable[[Any], bool], allowed: str) -> None:
        require(isinstance(getattr(self, name), Mapping), self, name, "a dict of module name to value")
        for key, value in getattr(self, name).items():
            compiles(key, self, name)
            if not ok(value):
                raise ConfigError(f"LoraConfig({name}={{{key!r}: {value!r}}}): each value must be {allowed}.")
        object.__setattr__(self, name, dict(getattr(self, name)))  # the caller's dict may change, a config may not

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


def _is_rank(value: object) -> bool:
    return is_count(value) and cast("int", value) <= MOST_RANK
