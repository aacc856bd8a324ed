"""`LoraConfig` to and from the content of PEFT's `adapter_config.json`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_nb.configs.lora import LoraConfig
from lora_nb.errors import ConfigError

# What PEFT writes beside the fields above, with the value that means "not used". Anything else would change the
# adapter's meaning, so a file that has it is refused rather than half understood.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # where A and B start
PEFT_UNUSED: dict[str, tuple[object, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "corda_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
    "layer_replication": (None,),
    "loftq_config": ({}, None),
    "lora_ga_config": (None,),
    "kasa_config": (None,),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (False, None),
    "velora_config": (None,),
}


def to_peft(config: LoraConfig, target_modules: Sequence[str], base: str | None, *, fan_in_fan_out: bool) -> dict[str, Any]:
    """The content of `adapter_config.json`; `target_modules` is what the config resolved to on the model."""
    config = as_plain(config)
    tokens = config.trainable_token_indices
    return {
        "alpha_pattern": dict(config.alpha_pattern),
        "base_model_name_or_path": base,
        "bias": config.bias,
        "ensure_weight_tying": config.ensure_weight_tying,
        # Resolved names already leave the excluded modules out; a reader needs no second rule.
        "exclude_modules": None,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        # How A and B started is over, and PEFT would refuse to read some starts beside lora_bias.
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": config.lora_alpha,
        "lora_bias": config.lora_bias,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": list(config.modules_to_save) or None,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": dict(config.rank_pattern),
        "target_modules": sorted(target_modules),  # an empty list: for null PEFT would put in modules of its own choice
        "target_parameters": list(config.target_parameters) or None,
        "task_type": config.task_type,
        "trainable_token_indices": {k: list(v) for k, v in tokens.items()} if isinstance(tokens, Mapping) else tokens and list(tokens),
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }


def as_plain(config: LoraConfig) -> LoraConfig:
    """The config under which PiSSA's and OLoRA's update, s·(B A − B₀ A₀), is one product of twice the rank with the same s.

    A reader then needs no base that was changed.
    """
    if not from_weight(config):
        return config
    wider = math.sqrt(2) if config.use_rslora else 2
    return replace(
        config,
        r=2 * config.r,
        lora_alpha=wider * config.lora_alpha,
        rank_pattern={k: 2 * r for k, r in config.rank_pattern.items()},
        alpha_pattern={k: wider * alpha for k, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
    )


def from_weight(config: LoraConfig) -> bool:
    """Whether A and B start from the base's weight, so that constants have to be subtracted."""
    return config.init_lora_weights not in {True, "gaussian", "orthogonal"}


def from_peft(content: Mapping[str, Any]) -> LoraConfig:
    """A `LoraConfig` from the content of PEFT's `adapter_config.json`.

    Raises:
        ConfigError: another method than LoRA, a missing `target_modules`, or an option that lora_nb does not have.
    """
    kind = content.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"adapter_config.json says peft_type {kind!r}; lora_nb reads 'LORA'.")
    _refuse_unknown(content)
    names = {f.name for f in dataclasses.fields(LoraConfig)}
    fields = {k: v for k, v in content.items() if k in names and v is not None}
    # Initialisation is over when a file is read; PEFT has kinds of it that leave the base alone and that LoraConfig need not know.
    fields.pop("init_lora_weights", None)
    fields["task_type"] = content.get("task_type")
    if not content.get("target_modules"):
        fields.pop("target_modules", None)
    if fields.get("layers_to_transform") in ([], None):
        fields.pop("layers_to_transform", None)
        fields.pop("layers_pattern", None)
    for name in ("exclude_modules", "layers_pattern", "trainable_token_indices"):
        if not fields.get(name):
            fields.pop(name, None)
    targets, excluded = fields.get("target_modules"), fields.get("exclude_modules")
    if isinstance(targets, list) and isinstance(excluded, list):
        # PEFT writes "all-linear" as names, the excluded ones among them.
        fields["target_modules"] = [name for name in targets if name not in excluded]
    return LoraConfig(**fields)


def _refuse_unknown(content: Mapping[str, Any]) -> None:
    init = str(content.get("init_lora_weights"))
    if init.startswith(CHANGES_BASE):
        raise ConfigError(
            f"adapter_config.json has init_lora_weights={init!r}: its A and B belong to a base that PEFT changed, which the file does not "
            "hold. Save it as plain LoRA: save_pretrained(path, path_initial_model_for_weight_conversion=…)."
        )
    for key, unused in PEFT_UNUSED.items():
        if key in content and content[key] not in unused:
            raise ConfigError(f"adapter_config.json has {key}={content[key]!r}, which this version of lora_nb does not support.")
    if not content.get("target_modules") and not content.get("target_parameters"):
        raise ConfigError("adapter_config.json has no target_modules, so nothing says where the adapter belongs.")
