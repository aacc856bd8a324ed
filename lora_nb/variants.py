"""One model in several states side by side, sharing its weights: what is to be timed against each other."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from lora_nb.attach import adapters, attach, detach, set_active
from lora_nb.configs import BottleneckConfig, LoraConfig, QuantConfig
from lora_nb.errors import AdapterError, LatencyError
from lora_nb.merge import merge
from lora_nb.quantization import quantize

Config = LoraConfig | BottleneckConfig | QuantConfig
BASE = "base"


def variants(model: nn.Module, configs: Mapping[str, Config] | None = None) -> dict[str, nn.Module]:
    """Models by name that share the weights of `model`, which stays as it is: the base, and each adapter unmerged and merged.

    Args:
        model: with adapters or without.
        configs: name → the config of a further adapter, put on the bare base (untrained, as it costs what a trained one costs), or of
            the base in few bits.

    Returns:
        `"base"`; each adapter under its name, and under `"NAME, merged"` where a weight can take it in.

    Raises:
        LatencyError: a name given twice, or what is merged cannot be told from the base.
        TargetError, QuantizationError: a config does not fit the model.
    """
    if adapters(model).merged is not None:
        raise LatencyError("An adapter is merged into this model, so the base is not in it: unmerge(model) first.")
    attached, wanted = list(adapters(model).reports), dict(configs or {})
    twice = [name for name in wanted if name in (*attached, BASE)]
    if twice:
        raise LatencyError(f"{twice[0]!r} is there already: give the config another name.")
    bare = sharing(model)
    detach(bare)
    made: dict[str, nn.Module] = {BASE: bare}
    for name in attached:
        variant = sharing(model)
        for other in attached:
            if other != name:
                detach(variant, other)
        set_active(variant, name)
        made |= {name: variant, **_merged(variant, name)}
    for name, config in wanted.items():
        variant = sharing(bare)
        if isinstance(config, QuantConfig):
            quantize(variant, config)
            made[name] = variant
            continue
        attach(variant, config)
        made |= {name: variant, **_merged(variant, name)}
    return {name: m.eval() for name, m in made.items()}


def sharing(model: nn.Module) -> nn.Module:
    """A copy of the model on the same memory: what is changed in place in one shows in the other, what is replaced does not.

    The parameters are objects of their own, so whether they train is each model's own affair.
    """
    memo: dict[int, object] = {id(b): b for b in model.buffers()}
    for p in model.parameters():  # a quantized one is of a class of its own, with more than its numbers
        memo[id(p)] = nn.Parameter(p.detach(), requires_grad=p.requires_grad) if type(p) is nn.Parameter else copy.copy(p)
    return copy.deepcopy(model, memo)


def _merged(variant: nn.Module, name: str) -> dict[str, nn.Module]:
    """The same with its active adapter in the weights; none if they cannot take it in, as a bottleneck."""
    twin = sharing(variant)
    try:
        merge(twin, keep=False)
    except AdapterError:
        return {}
    return {f"{name}, merged": twin}
