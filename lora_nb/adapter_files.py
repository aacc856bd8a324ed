"""The bytes of an adapter folder: written whole or not at all, read back and compared; read without trust.

Nothing here knows a model. Only safetensors is opened, never a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_nb.configs import Block, BottleneckConfig, LoraConfig, from_adapterhub, from_blocks, from_interface, from_peft
from lora_nb.errors import AdapterFileError
from lora_nb.render import format_bytes

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
WEIGHTS_8BIT, SCALE = "adapter_model.int8.safetensors", ".scale"  # ours alone (`storage.py`)
HUB_WEIGHTS, HUB_INTERFACE = "adapter.safetensors", "adapter_interface.json"  # AdapterHub's, whose config is called as PEFT's
PICKLES = {WEIGHTS: "adapter_model.bin", HUB_WEIGHTS: "pytorch_adapter.bin"}
PREFIX = "base_model.model."  # before each module's path in a key, in PEFT's format
T = TypeVar("T")
MOST_CONFIG_BYTES = 4_000_000
MOST_HEADER_BYTES = 100_000_000
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """All files beside their goal first (a full disk shows here), synced and compared; then renamed, which needs no space."""
    staged = {name: folder / f".{name}.{os.getpid()}.tmp" for name in files}
    renamed = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CARD).exists():  # a person may have written it
            del staged[CARD]
        for name, tmp in staged.items():
            _stage(tmp, files[name])
        for name, tmp in staged.items():
            tmp.replace(folder / name)
            renamed += 1
        sync_folder(folder)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        before = "Some of the files there are new and some old: save again" if renamed else "What stood there before is untouched"
        raise AdapterFileError(
            f"The adapter cannot be saved in {str(folder)!r}: {getattr(error, 'strerror', None) or error}. {before}. "
            "Choose a folder that you may write to, on a disk with room."
        ) from error
    finally:
        for tmp in staged.values():
            with suppress(OSError, ValueError):
                tmp.unlink()


def _stage(tmp: Path, data: bytes) -> None:
    with tmp.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    if tmp.read_bytes() != data:
        raise OSError("a file read back is not what was written")


def sync_folder(folder: Path) -> None:
    """Let the renaming survive a power cut; all is written by now, so a file system that cannot do this is no error."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@dataclass(frozen=True)
class SavedAdapter:
    """A folder's content, checked as far as that goes without a model.

    `content` is the whole of its config file; `edited`: config and weights were not saved together.
    """

    config: LoraConfig | BottleneckConfig
    base: str | None
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    edited: bool
    content: dict[str, Any]


def read_folder(folder: Path) -> SavedAdapter:
    """The config and the tensors of a folder.

    Raises:
        AdapterFileError: files missing, damaged, of another kind, or not to be trusted.
    """
    try:
        written = _config_file(folder)
        content = _json(folder / CONFIG, written)
        config = _meant(folder, _config, content)
        file = weights_file(folder, content)
        tensors, metadata = tensors_of(file)
        if isinstance(config, BottleneckConfig):
            config = replace(config, blocks=_blocks(folder, metadata))
    except OSError as error:
        raise AdapterFileError(f"{str(folder)!r} cannot be read: {error.strerror or error}. Check the path and who may read it.") from error
    if metadata.get("weights_sha256", "") not in {"", digest(tensors)}:
        raise AdapterFileError(f"{str(file)!r} holds other values than were saved: it is damaged. Copy or save it again.")
    tensors = _widened(file, tensors) if file.name == WEIGHTS_8BIT else tensors
    said = metadata.get("config_sha256")
    base = content.get("model_name" if of_adapterhub(content) else "base_model_name_or_path")
    named = base if isinstance(base, str) and base else None
    return SavedAdapter(config, named, tensors, metadata, said is not None and said != hashlib.sha256(written).hexdigest(), content)


def weights_file(folder: Path, content: Mapping[str, Any]) -> Path:
    """The file that has an adapter's weights, by what its config says."""
    if of_adapterhub(content):
        return folder / HUB_WEIGHTS
    return folder / (WEIGHTS_8BIT if (folder / WEIGHTS_8BIT).is_file() and not (folder / WEIGHTS).exists() else WEIGHTS)


def _widened(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole numbers times their scales, fp32; the rest as it is."""
    wide: dict[str, Tensor] = {}
    for key, t in tensors.items():
        if key.endswith(SCALE) and key.removesuffix(SCALE) in tensors:
            continue
        scale = tensors.get(f"{key}{SCALE}")
        if t.dtype == torch.int8 and (
            scale is None or scale.ndim != 2 or any(s not in {1, n} for s, n in zip(scale.shape, t.shape, strict=False))
        ):
            raise AdapterFileError(f"{str(file)!r}: {key!r} has no scale that fits it. Store the adapter again.")
        wide[key] = t if scale is None else t.float() * scale.float()
    return wide


def of_adapterhub(content: Mapping[str, Any]) -> bool:
    """Whose config it is: PEFT's says its method, AdapterHub's has its settings one level down."""
    return "peft_type" not in content and "config" in content


def _config(content: dict[str, Any]) -> LoraConfig | BottleneckConfig:
    return from_adapterhub(content) if of_adapterhub(content) else from_peft(content)


def _config_file(folder: Path) -> bytes:
    file = folder / CONFIG
    if not file.is_file():
        there = "is a file" if folder.is_file() else "does not exist" if not folder.exists() else f"has no {CONFIG}"
        raise AdapterFileError(f"{str(folder)!r} {there}: an adapter is a folder with {CONFIG} and {WEIGHTS}.")
    return _small(file)


def _small(file: Path) -> bytes:
    if file.stat().st_size > MOST_CONFIG_BYTES:
        raise AdapterFileError(f"{str(file)!r} has {format_bytes(file.stat().st_size)}: no adapter config is that large.")
    return file.read_bytes()


def _json(file: Path, written: bytes) -> dict[str, Any]:
    """The settings in a file."""
    try:
        content = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{str(file)!r} is not valid JSON ({error}): the file is damaged. Copy or save it again.") from error
    if not isinstance(content, dict):
        raise AdapterFileError(f"{str(file)!r} holds a {type(content).__name__}, not an object of settings: save the adapter again.")
    return content


def _meant(folder: Path, reader: Callable[[Any], T], content: object) -> T:
    """What `reader` makes of the content of a file."""
    try:
        return reader(content)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:  # ConfigError, and numbers beyond a float
        raise AdapterFileError(f"{str(folder)!r} cannot be used: {error}") from error


def _blocks(folder: Path, metadata: Mapping[str, str]) -> tuple[Block, ...]:
    """How the blocks of a model that is not known are described, by us or by AdapterHub."""
    if "blocks" in metadata:
        return _meant(folder, from_blocks, metadata["blocks"])
    file = folder / HUB_INTERFACE
    return (_meant(folder, from_interface, _json(file, _small(file))),) if file.is_file() else ()


def tensors_of(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata.

    Raises:
        AdapterFileError: there is none, or it is damaged.
    """
    if not file.is_file():
        pickle = PICKLES.get(file.name, "")
        pickled = bool(pickle) and (file.parent / pickle).exists()
        why = f"only {pickle}, a pickle, which can run code when it is opened" if pickled else f"no {file.name}"
        how = ", in AdapterHub with use_safetensors=True" if file.name == HUB_WEIGHTS else ""
        raise AdapterFileError(f"{str(file.parent)!r} has {why}: save the adapter again as safetensors{how}.")
    damaged = "it is damaged, cut short or no safetensors file. Copy or save it again."
    with file.open("rb") as f:
        header = int.from_bytes(f.read(8), "little")
    if header > min(MOST_HEADER_BYTES, file.stat().st_size):
        raise AdapterFileError(f"{str(file)!r} claims a header of {format_bytes(header)}: {damaged}")
    try:
        with safe_open(file, framework="pt") as f:
            return {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}  # noqa: SIM118 - not a dict
    except (SafetensorError, ValueError) as error:
        raise AdapterFileError(f"{str(file)!r} cannot be read ({error}): {damaged}") from error


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, types, shapes and values: of what was meant to be written."""
    out = hashlib.sha256()
    for key, t in sorted(tensors.items()):
        out.update(f"{key}{t.dtype}{tuple(t.shape)}".encode())
        out.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return out.hexdigest()


def fault(tensor: Tensor) -> str | None:
    """What no adapter's tensor may hold; a single whole number is the count of a BatchNorm in `modules_to_save`."""
    if tensor.ndim == 0 and tensor.dtype == torch.int64:
        return None
    if tensor.dtype not in FLOATS:
        return f"holds {tensor.dtype}, not floating-point numbers of 16 bits or more"
    return None if torch.isfinite(tensor.float()).all() else "holds NaN or infinity"
