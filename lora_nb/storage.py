"""What adapters take on disk, beside a model for each; and the same in half or a quarter of it.

In 16 bits an adapter stays what Hugging Face PEFT reads. In 8 bits each row of A and each column of B is a scale and whole numbers,

    A_k ≈ a_k · Q_k,    a_k = max |A_k| / 127,    Q in −127 … 127

which only lora_nb reads; so that no other reader takes the whole numbers for weights, the file has a name of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from lora_nb.adapter_files import CARD, CONFIG, SCALE, WEIGHTS, WEIGHTS_8BIT, SavedAdapter, digest, read_folder, weights_file, write_folder
from lora_nb.configs import BottleneckConfig
from lora_nb.errors import AdapterFileError, ConfigError, LoraNbError
from lora_nb.render import Cell, format_bytes, html_table, text_table

KINDS = ("fp16", "bf16", "int8")
COLUMNS = ["adapter", "method", "rank", "numbers", "stored as", "bytes"]


def store(path: str | Path, out: str | Path, kind: Literal["fp16", "bf16", "int8"] = "fp16") -> Path:
    """Save a LoRA adapter again in fewer bits; `load_adapter` and servers read it as they read the others.

    Raises:
        ConfigError: no such kind.
        AdapterFileError: no LoRA adapter, or a number that 16 bits cannot hold.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind={kind!r}: an adapter is stored as one of {', '.join(KINDS)}.")
    folder, saved = Path(path), read_folder(Path(path))
    if isinstance(saved.config, BottleneckConfig):
        raise AdapterFileError(f"{str(folder)!r} is a bottleneck adapter: these are stored in 32 bits, as AdapterHub reads them.")
    tensors = {key: t.to(torch.float16 if kind == "fp16" else torch.bfloat16) for key, t in saved.tensors.items()}
    if kind == "int8":
        tensors = {name: part for key, t in saved.tensors.items() for name, part in _quantized(key, t).items()}
    if over := next((key for key, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()), None):
        raise AdapterFileError(f"{str(folder)!r}: {over!r} has numbers beyond those of 16 bits: store it as bf16.")
    name, other = (WEIGHTS_8BIT, WEIGHTS) if kind == "int8" else (WEIGHTS, WEIGHTS_8BIT)
    if (Path(out) / other).exists():
        raise AdapterFileError(f"{str(out)!r} holds an adapter stored in another way: choose a folder of its own.")
    metadata = {**saved.metadata, "format": "pt", "weights_sha256": digest(tensors)}
    files = {name: to_safetensors(tensors, metadata), CONFIG: (folder / CONFIG).read_bytes(), CARD: _card(folder, kind)}
    write_folder(Path(out), files)
    return Path(out)


def _card(folder: Path, kind: str) -> bytes:
    return (folder / CARD).read_bytes() if (folder / CARD).is_file() else f"LoRA adapter, stored as {kind} by lora_nb.\n".encode()


def _quantized(key: str, t: Tensor) -> dict[str, Tensor]:
    """Whole numbers and their scales; vectors stay as they are."""
    if t.ndim != 2 or not t.is_floating_point():
        return {key: t}
    along = 1 if t.shape[0] <= t.shape[1] else 0  # a scale for each of the r rows of A, of the r columns of B
    scale = t.float().abs().amax(along, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return {key: (t.float() / scale).round().to(torch.int8), f"{key}{SCALE}": scale}


@dataclass(frozen=True)
class StorageTable:
    """Bytes on disk of adapters, beside those of as many whole models."""

    adapters: dict[str, tuple[SavedAdapter | None, int, str]]
    base_bytes: int

    @property
    def total(self) -> int:
        return sum(size for _, size, _ in self.adapters.values())

    @property
    def as_models(self) -> int:
        """Bytes of a copy of the base for each."""
        return self.base_bytes * len(self.adapters)

    def _title(self) -> str:
        said = f"{len(self.adapters)} adapters: {format_bytes(self.total)}"
        if not self.base_bytes or not self.adapters:
            return said
        times = self.as_models / max(1, self.total)
        one = f"one base of {format_bytes(self.base_bytes)} and its adapters: {format_bytes(self.base_bytes + self.total)}"
        return f"{said}; as many models: {format_bytes(self.as_models)}, {times:,.0f} times as much; {one}"

    def _rows(self) -> list[list[Cell]]:
        return [_line(name, saved, size, how) for name, (saved, size, how) in self.adapters.items()]

    def __repr__(self) -> str:
        return self._title() + "\n" + text_table(COLUMNS, self._rows())

    def _repr_html_(self) -> str:
        return html_table(COLUMNS, self._rows(), self._title())


def _line(name: str, saved: SavedAdapter | None, size: int, how: str) -> list[Cell]:
    if saved is None:
        return [name, how, "–", "–", "–", format_bytes(size)]
    c = saved.config
    method = "bottleneck" if isinstance(c, BottleneckConfig) else "DoRA" if c.use_dora else "LoRA"
    rank = "–" if isinstance(c, BottleneckConfig) else str(c.r)
    return [name, method, rank, f"{sum(t.numel() for t in saved.tensors.values()):,}", how, format_bytes(size)]


def storage(folders: Sequence[str | Path], base_bytes: int = 0) -> StorageTable:
    """A table of saved adapters; folders that cannot be read are in it with the reason.

    Args:
        base_bytes: of the base that they are for (`model_bytes`).
    """
    return StorageTable({str(folder): _stored(Path(folder)) for folder in folders}, base_bytes)


def _stored(folder: Path) -> tuple[SavedAdapter | None, int, str]:
    try:
        saved = read_folder(folder)
    except LoraNbError as error:
        size = sum(p.stat().st_size for p in folder.iterdir() if p.is_file()) if folder.is_dir() else 0
        return None, size, str(error)
    file = weights_file(folder, saved.content)
    kinds = sorted({str(t.dtype).removeprefix("torch.") for t in saved.tensors.values() if t.is_floating_point()})
    how = "int8" if file.name == WEIGHTS_8BIT else ", ".join(kinds)
    return saved, file.stat().st_size + (folder / CONFIG).stat().st_size, how


def model_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's own weights, each counted once."""
    from lora_nb.bases import base_parameters

    return sum(p.numel() * p.element_size() for p in base_parameters(model).values())
