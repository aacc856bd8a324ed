"""Settings as frozen dataclasses, checked when made, and their translation to and from PEFT's `adapter_config.json`."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from lora_nb.errors import ConfigError, nearest

T = TypeVar("T")

# PEFT refuses a file with any other.
TASK_TYPES = ("CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")


def _checked(cls: type[T]) -> type[T]:
    """Let an unknown field raise `ConfigError` with the nearest field, not dataclass' `TypeError`."""
    original, names = cls.__init__, [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]

    @functools.wraps(original)
    def init(self: T, *args: Any, **fields: Any) -> None:
        if args:
            raise ConfigError(f"{cls.__name__} takes its settings by name, as in {cls.__name__}({names[0]}=…).")
        for name in fields:
            if name not in names:
                raise ConfigError(f"{cls.__name__} has no field {name!r}." + nearest(name, names))
        original(self, **fields)

    cls.__init__ = init  # type: ignore[assignment,method-assign]
    return cls


def _require(ok: bool, owner: object, name: str, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{type(owner).__name__}({name}={getattr(owner, name)!r}): {name} must be {allowed}.")


def _is_count(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_choice(value: str, owner: object, name: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{type(owner).__name__}({name}={value!r}) is not known." + nearest(str(value), choices))


def _compiles(pattern: object, owner: object, name: str) -> None:
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"{type(owner).__name__}({name}): {pattern!r} must be a module's name or a regular expression for it.")
    try:
        re.compile(rf"(?:.*\.)?(?:{pattern})$" if name.endswith("_pattern") else pattern)  # as targets.py will use it
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{type(owner).__name__}({name}): {pattern[:80]!r} is not usable as a regular expression: {error}.") from error


@_checked
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
        _require(_is_count(self.r), self, "r", "a whole number of at least 1")
        _require(_is_number(self.lora_alpha) and self.lora_alpha > 0, self, "lora_alpha", "a number above 0")
        _require(_is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1, self, "lora_dropout", "in [0, 1)")
        self._check_names("target_modules", required=True)
        self._check_names("exclude_modules", required=False)
        self._check_layers()
        for name, ok, allowed in (
            ("rank_pattern", _is_count, "a whole number of at least 1"),
            ("alpha_pattern", lambda v: _is_number(v) and v > 0, "a number above 0"),
        ):
            _require(isinstance(getattr(self, name), Mapping), self, name, "a dict of module name to value")
            for key, value in getattr(self, name).items():
                _compiles(key, self, name)
                if not ok(value):
                    raise ConfigError(f"LoraConfig({name}={{{key!r}: {value!r}}}): each value must be {allowed}.")
            object.__setattr__(self, name, dict(getattr(self, name)))  # the caller's dict may change, a config may not
        _require(isinstance(self.use_rslora, bool), self, "use_rslora", "True or False")
        _require(self.init_lora_weights is True or self.init_lora_weights == "gaussian", self, "init_lora_weights", "True or 'gaussian'")
        if self.task_type is not None:
            _is_choice(self.task_type, self, "task_type", TASK_TYPES)

    def _check_names(self, name: str, *, required: bool) -> None:
        value = getattr(self, name)
        if value is None and not required:
            return
        if isinstance(value, str) and value:
            _compiles(value, self, name)
        names = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence | set | frozenset) else [None]
        _require(bool(names) and all(isinstance(n, str) and n for n in names), self, name, "a string or a list of module names, not empty")
        if not isinstance(value, str):
            object.__setattr__(self, name, tuple(dict.fromkeys(sorted(value) if isinstance(value, set | frozenset) else value)))

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is None:
            _require(self.layers_pattern is None, self, "layers_pattern", "left out unless layers_to_transform is given")
            return
        numbers = tuple(layers) if isinstance(layers, Iterable) else (layers,)
        _require(bool(numbers) and all(_is_count(i, 0) for i in numbers), self, "layers_to_transform", "layer numbers from 0")
        _require(
            not isinstance(self.target_modules, str), self, "layers_to_transform", "left out when target_modules is a pattern, not a list"
        )
        object.__setattr__(self, "layers_to_transform", numbers)
        if self.layers_pattern is not None:
            patterns = tuple(self.layers_pattern) if isinstance(self.layers_pattern, list | tuple | set) else (self.layers_pattern,)
            object.__setattr__(self, "layers_pattern", patterns)
            for pattern in patterns:
                _compiles(pattern, self, "layers_pattern")

    def scaling(self, r: int, alpha: float) -> float:
        """The factor before BA: α/r, or α/√r with `use_rslora`."""
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r


# What PEFT writes beside the fields above, with the value that means "not used". Anything else would change the
# adapter's meaning, so a file that has it is refused rather than half understood.
PEFT_UNUSED: dict[str, tuple[object, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none",),
    "corda_config": (None,),
    "ensure_weight_tying": (False, None),
    # The other kinds (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base too, so their A and B mean little without that.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
    "layer_replication": (None,),
    "loftq_config": ({}, None),
    "lora_bias": (False, None),
    "lora_ga_config": (None,),
    "kasa_config": (None,),
    "megatron_config": (None,),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "velora_config": (None,),
}


def to_peft(config: LoraConfig, target_modules: Sequence[str], base: str | None, *, fan_in_fan_out: bool) -> dict[str, Any]:
    """The content of `adapter_config.json`; `target_modules` is what the config resolved to on the model."""
    return {
        "alpha_pattern": dict(config.alpha_pattern),
        "base_model_name_or_path": base,
        "bias": "none",
        # Resolved names already leave the excluded modules out; a reader needs no second rule.
        "exclude_modules": None,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": config.init_lora_weights,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": dict(config.rank_pattern),
        "target_modules": sorted(target_modules),
        "task_type": config.task_type,
        "use_dora": False,
        "use_rslora": config.use_rslora,
    }


def from_peft(content: Mapping[str, Any]) -> LoraConfig:
    """A `LoraConfig` from the content of PEFT's `adapter_config.json`.

    Raises:
        ConfigError: another method than LoRA, a missing `target_modules`, or an option that lora_nb does not have.
    """
    kind = content.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"adapter_config.json says peft_type {kind!r}; lora_nb reads 'LORA'.")
    for key, unused in PEFT_UNUSED.items():
        if key in content and content[key] not in unused:
            raise ConfigError(f"adapter_config.json has {key}={content[key]!r}, which this version of lora_nb does not support.")
    if content.get("target_modules") is None:
        raise ConfigError("adapter_config.json has no target_modules, so nothing says where the adapter belongs.")
    names = {f.name for f in dataclasses.fields(LoraConfig)}
    fields = {k: v for k, v in content.items() if k in names and v is not None}
    # Initialisation is over when a file is read; PEFT has kinds of it that leave the base alone and that LoraConfig need not know.
    fields.pop("init_lora_weights", None)
    fields["task_type"] = content.get("task_type")
    if fields.get("layers_to_transform") in ([], None):
        fields.pop("layers_to_transform", None)
        fields.pop("layers_pattern", None)
    if fields.get("exclude_modules") == []:
        fields.pop("exclude_modules")
    targets, excluded = fields["target_modules"], fields.get("exclude_modules")
    if isinstance(targets, list) and isinstance(excluded, list):
        # PEFT writes "all-linear" as names, the excluded ones among them.
        fields["target_modules"] = [name for name in targets if name not in excluded]
    if not fields.get("layers_pattern"):
        fields.pop("layers_pattern", None)
    return LoraConfig(**fields)


@_checked
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; names as in transformers' `TrainingArguments` where the meaning is the same.

    Args:
        max_steps: optimizer steps; None for as many as `num_train_epochs` asks, or 200 where that is None too.
        num_train_epochs: passes over the data; with `max_steps` given as well, whichever ends first.
        batch_size: blocks (texts) or pairs in one forward.
        seq_len: tokens in a block; longer pairs are cut there, and the run says how many.
        gradient_accumulation_steps: forwards in one optimizer step; the loss is the mean over all their tokens.
        learning_rate: peak rate of AdamW. LoRA wants about ten times that of full fine-tuning.
        lr_scheduler_type: `"linear"` or `"cosine"` (to zero after the warm-up) or `"constant"`.
        warmup_steps: steps over which the rate rises from zero.
        weight_decay: AdamW's decoupled decay.
        max_grad_norm: gradients are scaled down to this L2 norm; None leaves them alone.
        eval_every: steps between evaluations on `eval_dataset`; None for one at the end.
        seed: order of the data and dropout.

    Raises:
        ConfigError: an unknown field or a value that is not allowed.
    """

    max_steps: int | None = None
    num_train_epochs: float | None = None
    batch_size: int = 8
    seq_len: int = 256
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-3
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 10
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    eval_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_steps is None and self.num_train_epochs is None:
            object.__setattr__(self, "max_steps", 200)
        _require(self.max_steps is None or _is_count(self.max_steps), self, "max_steps", "None or a whole number of at least 1")
        for name in ("batch_size", "gradient_accumulation_steps"):
            _require(_is_count(getattr(self, name)), self, name, "a whole number of at least 1")
        _require(_is_count(self.seq_len, 2), self, "seq_len", "a whole number of at least 2")
        _require(_is_count(self.warmup_steps, 0), self, "warmup_steps", "a whole number of at least 0")
        _require(_is_count(self.seed, 0), self, "seed", "a whole number of at least 0")
        _require(self.eval_every is None or _is_count(self.eval_every), self, "eval_every", "None or a whole number of at least 1")
        _require(_is_number(self.learning_rate) and self.learning_rate > 0, self, "learning_rate", "a number above 0")
        _require(_is_number(self.weight_decay) and self.weight_decay >= 0, self, "weight_decay", "a number of at least 0")
        for name in ("num_train_epochs", "max_grad_norm"):
            value = getattr(self, name)
            _require(value is None or (_is_number(value) and value > 0), self, name, "None or a number above 0")
        _is_choice(self.lr_scheduler_type, self, "lr_scheduler_type", ("linear", "cosine", "constant"))
