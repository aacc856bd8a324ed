"""Base models: the embedded one, a local folder, or the Hub. Only safetensors is read, and every weight must be there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_nb.configs import QuantConfig
from lora_nb.errors import BaseModelError, QuantizationError, nearest
from lora_nb.origin import base_parameters, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["base_name", "base_parameters", "fingerprint", "load"]

EMBEDDED = {"tiny": Path(__file__).parent / "tiny"}


def load(
    name_or_path: str | Path = "tiny",
    *,
    quant: str | QuantConfig | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, ready for `attach`, in evaluation mode.

    Args:
        name_or_path: `"tiny"` (embedded, no download), a folder that transformers wrote, or a model id on the Hub.
        quant: put the linear layers into few bits while they are read, one at a time: `"nf4"` or `"fp4"` in this package's layers,
            `"bnb-nf4"`, `"bnb-fp4"` or `"bnb-int8"` in bitsandbytes', or a `QuantConfig`. A checkpoint that bitsandbytes' rules
            have put into four bits is read as it is, into this package's layers unless `quant` asks for bitsandbytes'.
        dtype: of the weights, and of the other ones where these are quantized. Default: float32 on a CPU, bfloat16 on a GPU.
        device: default: the GPU if there is one.

    Raises:
        BaseModelError: no such base, no network, no safetensors, weights that do not fit the model's code, or no such device.
        ConfigError: `quant` is not known.
        QuantizationError: nothing to quantize, or weights that are damaged.
    """
    config = QuantConfig(quant_type=quant) if isinstance(quant, str) else quant  # type: ignore[arg-type]
    chosen = _device(device)
    dtype = dtype or (torch.float32 if chosen.type == "cpu" else torch.bfloat16)
    source = _source(str(name_or_path))
    with _no_bar() if str(name_or_path) in EMBEDDED else nullcontext():
        model, tokenizer = _from_pretrained(str(name_or_path), source, dtype, config, chosen)
    model.config._name_or_path = str(name_or_path)
    return model.to(chosen).eval(), tokenizer


@contextmanager
def _no_bar() -> Iterator[None]:
    """The embedded base loads in a blink; transformers' bar would only leave a line behind."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _device(device: str | torch.device | None) -> torch.device:
    """The device asked for, tried before minutes go into loading for it."""
    try:
        return torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise BaseModelError(
            f"device={device!r} cannot be used here: {_said(error)}. Leave it out to get the device that is there."
        ) from error


def _source(name: str) -> str:
    """A folder that exists, or a Hub id; refuses what can be neither."""
    folder = EMBEDDED.get(name, Path(name))
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
    except OSError as error:  # a name too long for a path, a folder that may not be looked into
        raise BaseModelError(f"{name[:80]!r} cannot be looked up: {error.strerror}. Give a folder, a Hub id, or 'tiny'.") from error
    if is_folder:
        _check_folder(name, folder)
        return str(folder)
    if exists:
        raise BaseModelError(f"{name!r} is a file; a base is a folder with config.json and *.safetensors, a Hub id, or 'tiny'.")
    if name.count("/") > 1 or name.startswith((".", "~", "/")) or not name.strip():
        raise BaseModelError(f"There is no folder {name!r}: give an existing folder, a Hub id such as 'owner/model', or 'tiny'.")
    return name


def _check_folder(name: str, folder: Path) -> None:
    if (folder / "adapter_config.json").exists():  # transformers would put it on the base in silence, where peft is installed
        raise BaseModelError(
            f"The folder {name!r} holds an adapter: load its base, then the adapter with load_adapter(model, {name!r}). If the base is "
            "in the same folder, move adapter_config.json and adapter_model.safetensors to a folder of their own."
        )
    if not (folder / "config.json").is_file():
        raise BaseModelError(f"The folder {name!r} has no config.json: it is not a model that transformers saved.")
    if not any(folder.glob("*.safetensors")):
        pickled = next((p.name for p in folder.glob("*.bin")), None)
        found = f"only {pickled!r}, a pickle, which can run code when it is opened" if pickled else "no weights"
        raise BaseModelError(
            f"The folder {name!r} has {found}. lora_nb reads safetensors: save the model again with model.save_pretrained(folder)."
        )


def _from_pretrained(name: str, source: str, dtype: torch.dtype, quant: QuantConfig | None, device: torch.device) -> tuple[Any, Any]:
    """transformers' own loading, its failures in our words, and nothing left at random values in silence."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    reading = None
    try:
        base_config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        reading = _reading(name, base_config, quant, device)
        with nullcontext() if reading is None else reading.piecewise():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                config=base_config,
                dtype=dtype,
                **({} if reading is None else {"quantization_config": reading}),
                use_safetensors=True,
                trust_remote_code=False,  # None would ask the person at the keyboard whether to run the model's own code
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
            )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (BaseModelError, QuantizationError):
        raise
    except Exception as error:  # a damaged config or a network down raises whatever transformers stumbles over
        raise BaseModelError(_explain(name, source, error)) from error
    if reading is not None and reading.refusal is not None:
        raise reading.refusal
    model, info = loaded
    lost = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
    if lost:
        raise BaseModelError(
            f"{name!r} lacks {len(lost)} weights that its architecture {type(model).__name__} needs (such as {lost[0]!r}): the files are "
            "incomplete or belong to another model. Download or save them again."
        )
    if reading is not None:
        reading.finish(model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _reading(name: str, base_config: Any, quant: QuantConfig | None, device: torch.device) -> Any:
    """How to read a checkpoint of few bits, or into few bits; None where transformers does all of it."""
    stored = getattr(base_config, "quantization_config", None)
    stored = stored if isinstance(stored, dict) or stored is None else stored.to_dict()
    four = stored is not None and stored.get("quant_method", "bitsandbytes") == "bitsandbytes" and bool(stored.get("load_in_4bit"))
    if stored is not None and quant is not None and not four:
        method = stored.get("quant_method", "another method")
        raise BaseModelError(f"{name!r} is quantized already, by {method}: leave quant out, or give the base that it was made from.")
    if stored is not None and four:
        del base_config.quantization_config
        quant = quant or QuantConfig(quant_type=stored.get("bnb_4bit_quant_type", "fp4"))
    if quant is None:
        return None
    from lora_nb.quantized_reading import Reading

    return Reading(quant, device, stored=stored is not None)


def _explain(name: str, source: str, error: Exception) -> str:
    said = _said(error)
    if "trust_remote_code" in str(error):
        return f"{name!r} brings its own code, which lora_nb does not run: choose a model whose architecture transformers has itself."
    if Path(source).is_dir():
        return f"The folder {name!r} cannot be read as a model: {said}. If a file is damaged or missing, save model and tokenizer again."
    causes = _causes(error)
    if causes & {"OfflineModeIsEnabled", "ConnectionError", "ConnectError", "ProxyError", "LocalEntryNotFoundError", "ConnectTimeout"}:
        return (
            f"{name!r} is no embedded base and no local folder, and the Hub cannot be reached ({said}). Without network use load('tiny') "
            "or the path of a folder that holds the model." + (nearest(name, EMBEDDED) if "/" not in name else "")
        )
    return (
        f"Nothing loads under the name {name!r}: it is no embedded base, no local folder, and the Hub answered: {said}. Check the "
        "spelling; a gated model needs `hf auth login`." + (nearest(name, EMBEDDED) if "/" not in name else "")
    )


def _said(error: Exception) -> str:
    """An error's own words on one line; its class where the words alone, such as a missing key, say little."""
    lines = str(error).strip().splitlines() or [""]
    words = " ".join(" ".join(lines[:1] if isinstance(error, OSError) else lines).split())[:300].rstrip(".")
    return words if words and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {words}"


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
