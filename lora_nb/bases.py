"""Base models: the embedded one, a local folder, or the Hub. Only safetensors is read, and every weight must be there."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_nb.errors import BaseModelError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = {"tiny": Path(__file__).parent / "tiny"}


def load(
    name_or_path: str | Path = "tiny", *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, ready for `attach`, in evaluation mode.

    Args:
        name_or_path: `"tiny"` (embedded, no download), a folder that transformers wrote, or a model id on the Hub.
        dtype: of the weights. Default: float32 on a CPU, bfloat16 on a GPU.
        device: default: the GPU if there is one.

    Raises:
        BaseModelError: no such base, no network, no safetensors, or weights that do not fit the model's code.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if chosen.type == "cpu" else torch.bfloat16)
    source = _source(str(name_or_path))
    model, tokenizer = _from_pretrained(str(name_or_path), source, dtype)
    model.config._name_or_path = str(name_or_path)
    return model.to(chosen).eval(), tokenizer


def _source(name: str) -> str:
    """A folder that exists, or a Hub id; refuses what can be neither."""
    folder = EMBEDDED.get(name, Path(name))
    if folder.is_dir():
        _check_folder(name, folder)
        return str(folder)
    if folder.exists():
        raise BaseModelError(f"{name!r} is a file; a base is a folder with config.json and *.safetensors, a Hub id, or 'tiny'.")
    if name.count("/") > 1 or name.startswith((".", "~", "/")) or not name.strip():
        raise BaseModelError(f"There is no folder {name!r}: give an existing folder, a Hub id such as 'owner/model', or 'tiny'.")
    return name


def _check_folder(name: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise BaseModelError(f"The folder {name!r} has no config.json: it is not a model that transformers saved.")
    if not any(folder.glob("*.safetensors")):
        pickled = next((p.name for p in folder.glob("*.bin")), None)
        found = f"only {pickled!r}, a pickle, which can run code when it is opened" if pickled else "no weights"
        raise BaseModelError(
            f"The folder {name!r} has {found}. lora_nb reads safetensors: save the model again with model.save_pretrained(folder)."
        )


def _from_pretrained(name: str, source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """transformers' own loading, its failures in our words, and nothing left at random values in silence."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model, info = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise BaseModelError(_explain(name, source, error)) from error
    lost = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
    if lost:
        raise BaseModelError(
            f"{name!r} lacks {len(lost)} weights that its architecture {type(model).__name__} needs (such as {lost[0]!r}): the files are "
            "incomplete or belong to another model. Download or save them again."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _explain(name: str, source: str, error: Exception) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
    if Path(source).is_dir():
        return f"The folder {name!r} cannot be read as a model: {first}. If a file is damaged, copy or save it again."
    causes = _causes(error)
    if causes & {"OfflineModeIsEnabled", "ConnectionError", "ConnectError", "ProxyError", "LocalEntryNotFoundError", "ConnectTimeout"}:
        return (
            f"{name!r} is no embedded base and no local folder, and the Hub cannot be reached ({first}). Without network use load('tiny') "
            "or the path of a folder that holds the model." + (nearest(name, EMBEDDED) if "/" not in name else "")
        )
    return (
        f"Nothing loads under the name {name!r}: it is no embedded base, no local folder, and the Hub answered: {first}. Check the spelling; "
        "a gated model needs `hf auth login`." + (nearest(name, EMBEDDED) if "/" not in name else "")
    )


def _causes(error: BaseException | None) -> set[str]:
    """Class names along the chain of causes, their bases included: libraries wrap the network's own error several times."""
    names: set[str] = set()
    while error is not None:
        names |= {c.__name__ for c in type(error).__mro__}
        error = error.__cause__ or error.__context__
    return names


def base_name(model: nn.Module) -> str | None:
    """What the base was loaded as."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def base_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base's own parameters by name; adapters left out."""
    return {name: p for name, p in model.named_parameters() if ".adapters." not in f".{name}"}


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """A hash of what the base is: class, parameter names, shapes, and 64 values of each weight, rounded to bfloat16.

    Adapters do not change it, nor does loading in 16 instead of 32 bits (bfloat16); a base of the same shape with other
    weights has another one.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, p in sorted(base_parameters(model).items()):
        flat = p.detach().flatten()
        picks = torch.linspace(0, flat.numel() - 1, 64, dtype=torch.float64).long().to(flat.device)
        sample = flat[picks].to(torch.bfloat16).view(torch.int16).cpu() if flat.is_floating_point() else flat[picks].cpu()
        digest.update(f"{name}{tuple(p.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:32]
