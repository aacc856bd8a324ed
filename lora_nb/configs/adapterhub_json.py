"""`BottleneckConfig` to and from the content of AdapterHub's `adapter_config.json`, and `Block` from its `adapter_interface.json`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lora_nb.configs.bottleneck import Block, BottleneckConfig, Sublayer
from lora_nb.errors import ConfigError

# What AdapterHub's adapters may do beside, with the value that means "not used". A file that has another is refused
# rather than half understood.
UNUSED: dict[str, object] = {
    "adapter_residual_before_ln": False,
    "inv_adapter": None,
    "phm_layer": False,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
# What matters only beside those, or only before training, with AdapterHub's defaults.
IDLE: dict[str, object] = {
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights_seed": None,
    "inv_adapter_reduction_factor": None,
    "learn_phm": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_rank": 1,
    "shared_W_phm": False,
    "shared_phm_rule": True,
}
# AdapterHub's own defaults, where ours are others: what a file that leaves them out means.
DEFAULTS: dict[str, object] = {"original_ln_before": False, "init_weights": "bert"}
REQUIRED = ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity")
RENAMED = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # in files from before there was a version
FIELDS = [f.name for f in dataclasses.fields(BottleneckConfig) if f.name != "blocks"]


def to_adapterhub(config: BottleneckConfig) -> dict[str, Any]:
    """The settings under AdapterHub's names, all of them."""
    fields = {name: getattr(config, name) for name in FIELDS}
    fields["leave_out"] = list(config.leave_out)
    fields["scaling"] = config.scaling if isinstance(config.scaling, str) else float(config.scaling)  # they know no whole numbers
    return dict(sorted({**UNUSED, **IDLE, **fields}.items()))


def from_adapterhub(content: Mapping[str, Any]) -> BottleneckConfig:
    """A `BottleneckConfig` from the content of AdapterHub's `adapter_config.json`.

    Raises:
        ConfigError: another method than bottleneck adapters, settings missing, or one that lora_nb does not have.
    """
    settings = content.get("config")
    if not isinstance(settings, dict):
        raise ConfigError(f"adapter_config.json has config={settings!r} where AdapterHub keeps the adapter's settings.")
    if settings.get("architecture") is not None:
        raise ConfigError(f"adapter_config.json is of AdapterHub's method {settings['architecture']!r}; lora_nb reads bottleneck adapters.")
    for name, value in settings.items():
        if name in UNUSED and value != UNUSED[name]:
            raise ConfigError(f"adapter_config.json has {name}={value!r}, which lora_nb does not support.")
        if name not in (*UNUSED, *IDLE, *FIELDS, "architecture"):
            raise ConfigError(f"adapter_config.json has the setting {name}={value!r}, which lora_nb does not know.")
    if missing := [name for name in REQUIRED if name not in settings]:
        raise ConfigError(f"adapter_config.json has no {missing[0]} among its settings.")
    fields = {**DEFAULTS, **{name: settings[name] for name in FIELDS if name in settings}}
    fields["non_linearity"] = str(fields["non_linearity"]).lower()
    fields["leave_out"] = fields.get("leave_out") or ()
    if "version" not in content:
        fields["non_linearity"] = RENAMED.get(fields["non_linearity"], fields["non_linearity"])
    return BottleneckConfig(**fields)


def from_interface(content: Mapping[str, Any]) -> Block:
    """The block that `adapter_interface.json` describes: AdapterHub's way to adapt models that it does not know.

    Raises:
        ConfigError: modules missing, or norms after the sublayers.
    """
    names = content.get("interface")
    if not isinstance(names, dict) or not all(isinstance(names.get(k), str) for k in ("model_layers", "layer_self_attn", "attn_o_proj")):
        raise ConfigError("adapter_interface.json does not name the model's layers, attention and its output.")
    for name in ("layer_ln_1", "layer_ln_2"):
        if names.get(name) is not None:
            # adapters 1.3 itself calls the last layer's norm in every layer there.
            raise ConfigError(f"adapter_interface.json has {name}={names[name]!r}: norms after a sublayer are not supported there.")
    attention = f"{names['layer_self_attn']}.{names['attn_o_proj']}"
    return Block(
        layers=names["model_layers"],
        attention=Sublayer(output=attention, reads=names.get("layer_pre_self_attn")),
        mlp=Sublayer(output=names["layer_output_proj"], reads=names.get("layer_pre_ffn")) if names.get("layer_output_proj") else None,
    )


def to_blocks(blocks: Sequence[Block]) -> str:
    """Blocks as JSON, for the metadata of a file: AdapterHub's have no place for them."""
    return json.dumps([dataclasses.asdict(block) for block in blocks])


def from_blocks(text: str) -> tuple[Block, ...]:
    """Blocks from that JSON.

    Raises:
        ConfigError, ValueError, TypeError: it is damaged.
    """
    blocks = json.loads(text)
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise ConfigError("the blocks that the file's header describes are no list of blocks.")
    return tuple(_block(block) for block in blocks)


def _block(fields: dict[str, Any]) -> Block:
    named: dict[str, Any] = {name: Sublayer(**value) if isinstance(value, dict) else value for name, value in fields.items()}
    return Block(**named)
