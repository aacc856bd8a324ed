"""A model without its weights: from a model, a config of transformers, a folder, or the id of a shape that is built in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_nb.errors import BaseModelError, ConfigError, nearest
from lora_nb.memory.estimate import known_shapes
from lora_nb.memory.ledger import on_meta, without_values
from lora_nb.memory.setting import DTYPES


def skeleton(model_or_id: object, dtype: torch.dtype | str | None) -> nn.Module:
    """A copy on the meta device.

    Raises:
        ConfigError: no such type or architecture, or nothing that a model could be made of.
        BaseModelError: nothing is known under that name.
    """
    kind = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if isinstance(dtype, str) and kind is None:
        raise ConfigError(f"trace_memory(dtype={dtype!r}) is not known." + nearest(dtype, DTYPES))
    if isinstance(model_or_id, nn.Module):
        copied = without_values(model_or_id, on_meta)
        return copied if kind is None else copied.to(kind)
    from transformers import AutoConfig, PretrainedConfig

    config: Any = model_or_id
    if isinstance(model_or_id, str | Path):
        name = str(model_or_id)
        known = {n.rsplit("/", 1)[-1].lower(): n for n in known_shapes()}
        numbers = known_shapes().get(name) or known_shapes().get(known.get(name.lower(), ""))
        try:
            config = _made(numbers) if numbers else AutoConfig.from_pretrained(_folder(name))
        except (OSError, ValueError) as error:
            raise BaseModelError(
                f"trace_memory knows no model {name!r}: {type(error).__name__}." + nearest(name, known_shapes())
            ) from error
    elif isinstance(model_or_id, Mapping):
        config = _made(model_or_id)
    if not isinstance(config, PretrainedConfig):
        raise ConfigError(
            f"trace_memory cannot read a {type(model_or_id).__name__}: give a model, a config of transformers, a folder or an id."
        )
    return _from_config(config, kind or torch.float32)


def _folder(name: str) -> str:
    from lora_nb.bases import EMBEDDED

    return str(EMBEDDED.get(name, name))


def _made(numbers: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    kind = numbers.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ConfigError(f"transformers has no architecture {kind!r}." + nearest(str(kind), CONFIG_MAPPING))
    return CONFIG_MAPPING[kind](**{"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, **numbers})


def _from_config(config: Any, dtype: torch.dtype) -> nn.Module:
    """The class that the config names, else the first of some heads that transformers has for such a config."""
    import transformers

    named = next(iter(config.architectures or ()), "")
    with torch.device("meta"):
        if hasattr(transformers, named):
            return getattr(transformers, named)._from_config(config, dtype=dtype)  # type: ignore[no-any-return]  # noqa: SLF001
        for kind in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel"):
            auto = getattr(transformers, kind)
            encoder = config.model_type in {"bert", "roberta", "electra", "distilbert"}
            if type(config) in auto._model_mapping and not (encoder and kind == "AutoModelForCausalLM"):  # noqa: SLF001
                return auto.from_config(config, dtype=dtype)  # type: ignore[no-any-return]
    raise ConfigError(f"transformers has no model for a {type(config).__name__}.")


def fake(model: nn.Module) -> nn.Module:
    """The same with fake tensors on the CPU, as its code is to believe."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def make(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    return without_values(model, make)
