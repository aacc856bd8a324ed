"""`LoraConfig` to and from the content of PEFT's `adapter_config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lora_nb.configs.lora import LoraConfig
from lora_nb.errors import ConfigError

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
