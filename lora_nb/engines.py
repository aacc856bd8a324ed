"""What vLLM, LoRAX and SGLang take of a saved adapter, and a way to save one so that they take it.

Each serves PEFT's files, but less than PEFT reads; some of what they lack is refused, some passed over in silence, with another
output. From vLLM's `peft_helper.py` and `lora_model.py`, LoRAX's `adapters/lora.py`, SGLang's `lora/lora_manager.py` (2025).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import save as to_safetensors
from torch import Tensor

from lora_nb.adapter_files import CARD, CONFIG, PREFIX, WEIGHTS, SavedAdapter, digest, read_folder, write_folder
from lora_nb.configs import BottleneckConfig, LoraConfig, to_peft
from lora_nb.errors import AdapterFileError
from lora_nb.targets import rank_and_scale

ENGINES = ("vLLM", "LoRAX", "SGLang")
RANKS = (8, 16, 32, 64, 128)  # what their slots and kernels are made for; a rank between is filled up
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")  # SGLang's
A, B = ".lora_A.weight", ".lora_B.weight"


def refusals(saved: SavedAdapter) -> dict[str, tuple[str, ...]]:
    """Engine → why it would not serve the adapter, or would serve another than was trained; an empty tuple: it takes it."""
    config = saved.config
    if isinstance(config, BottleneckConfig):
        return dict.fromkeys(ENGINES, ("it is no LoRA adapter",))
    every = [*_refused_by_all(config, saved.tensors)]
    ranks = _ranks(saved.tensors)
    uneven = len({*ranks.values()}) > 1
    names = {path.rsplit(".", 1)[-1] for path in ranks}
    odd = sorted(names - set(PROJECTIONS))
    own = {
        "vLLM": ["modules of several ranks are all scaled as if of rank r"] if uneven and not config.rank_pattern else [],
        "LoRAX": [
            *(["layers of one kind must have one rank"] if uneven else []),
            *(["a kind of layer must be adapted in all layers of the model"] if config.layers_to_transform is not None else []),
        ],
        "SGLang": [f"it adapts {', '.join(odd)}, and not only attention and MLP projections"] if odd else [],
    }
    return {engine: (*every, *own[engine]) for engine in ENGINES}


def _refused_by_all(config: LoraConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    found = {
        "DoRA's magnitudes are not read": config.use_dora,
        "modules_to_save must be none": bool(config.modules_to_save),
        f"bias={config.bias!r} is not read": config.bias != "none",
        "lora_bias is not read": config.lora_bias,
        "rank_pattern and alpha_pattern are not read, so the scale would be another": bool(config.rank_pattern or config.alpha_pattern),
        "single tokens of an embedding are not read": config.trainable_token_indices is not None,
        "adapters on parameters (target_parameters) are not read": bool(config.target_parameters),
    }
    top = max(_ranks(tensors).values(), default=0)
    found[f"rank {top} is above {RANKS[-1]}"] = top > RANKS[-1]
    others = sorted({key.rsplit(".", 2)[-2] for key in tensors if not key.endswith((A, B))})
    found[f"it has tensors that are no pair of A and B, such as of {others[0] if others else ''}"] = bool(others)
    return [why for why, so in found.items() if so]


def _ranks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Path of each adapted module → its rank."""
    return {key[len(PREFIX) : -len(A)]: len(t) for key, t in tensors.items() if key.startswith(PREFIX) and key.endswith(A)}


def save_for_engines(path: str | Path, out: str | Path) -> Path:
    """Save an adapter again as plain LoRA of one rank, with its scale in B, which says the same and which all of them take.

    Ranks are filled up with zeros to the next that their kernels are made for; patterns and rank-stabilised scales become numbers.

    Raises:
        AdapterFileError: what cannot be said so, such as DoRA, biases or whole modules.
    """
    folder, saved = Path(path), read_folder(Path(path))
    config = saved.config
    if isinstance(config, BottleneckConfig):
        raise AdapterFileError(f"{str(folder)!r} is a bottleneck adapter, which none of them serves: serve it here.")
    ranks = _ranks(saved.tensors)
    rank = next((r for r in RANKS if r >= max(ranks.values(), default=0)), 0)
    plain = replace(config, rank_pattern={}, alpha_pattern={}, use_rslora=False, r=rank or 1, lora_alpha=rank or 1)
    left = _refused_by_all(plain, saved.tensors)
    if left or not rank:
        raise AdapterFileError(
            f"{str(folder)!r} cannot be saved for them: {'; '.join(left) or 'it has no pair of A and B'}. Serve it here."
        )
    tensors: dict[str, Tensor] = {}
    for name, r in ranks.items():
        _, scale = rank_and_scale(config, name)
        a, b = saved.tensors[f"{PREFIX}{name}{A}"], saved.tensors[f"{PREFIX}{name}{B}"]
        tensors[f"{PREFIX}{name}{A}"] = F.pad(a, (0, 0, 0, rank - r)).contiguous()
        tensors[f"{PREFIX}{name}{B}"] = F.pad(b * scale, (0, rank - r)).contiguous()
    names = saved.content.get("target_modules")
    wanted = names if isinstance(names, list) and config.layers_to_transform is None else sorted(ranks)
    content = to_peft(plain, wanted, saved.base, fan_in_fan_out=bool(saved.content.get("fan_in_fan_out")))
    written = json.dumps(content, indent=2).encode()
    kept = {key: value for key, value in saved.metadata.items() if key.startswith("base_")}
    sums = {"config_sha256": hashlib.sha256(written).hexdigest(), "weights_sha256": digest(tensors)}
    card = f"LoRA adapter of rank {rank}, its scale in B, made from {folder.name!r} for vLLM, LoRAX and SGLang.\n".encode()
    write_folder(Path(out), {WEIGHTS: to_safetensors(tensors, {"format": "pt", **kept, **sums}), CONFIG: written, CARD: card})
    return Path(out)
