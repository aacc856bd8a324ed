"""Adapters on disk in Hugging Face PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Written whole or not at all, read back and compared after writing; checked to the key before a model is touched. What
we add (the base's fingerprint, a hash of the config) lies in the safetensors header, where other readers ignore it.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from lora_nb.attach import AttachReport, adapters, attach, detach, only_name, set_active, weights
from lora_nb.bases import base_name, fingerprint
from lora_nb.configs import LoraConfig, from_peft, to_peft
from lora_nb.errors import AdapterFileError
from lora_nb.layers.lora import LoraEmbeddingWeights, LoraWeights, is_conv1d
from lora_nb.render import format_bytes, html_table, text_table
from lora_nb.targets import resolve, short_names
from lora_nb.version import __version__

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
PREFIX = "base_model.model."
MOST_CONFIG_BYTES = 4_000_000
MOST_HEADER_BYTES = 100_000_000
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AdapterSummary:
    """What a saved adapter is: its config, modules (path → rank, in, out), size, base, fingerprint, and what looks odd."""

    path: str
    config: LoraConfig
    modules: dict[str, tuple[int, int, int]]
    bytes: int
    base: str | None
    fingerprint: str | None
    warnings: list[str]

    def _rows(self) -> list[tuple[str, str]]:
        c, ranks = self.config, sorted({r for r, _, _ in self.modules.values()})
        facts = {
            "method": "LoRA" + (", rank-stabilised" if c.use_rslora else ""),
            "base": self.base or "not said",
            "base fingerprint": self.fingerprint or "none: not written by lora_nb",
            "rank": ", ".join(map(str, ranks)),
            "alpha": f"{c.lora_alpha:g}",
            "modules": f"{len(self.modules)}: " + ", ".join(sorted({m.rsplit(".", 1)[-1] for m in self.modules})),
            "parameters": f"{sum(r * (i + o) for r, i, o in self.modules.values()):,}",
            "size": format_bytes(self.bytes),
        }
        return [*facts.items(), *(("warning", w) for w in self.warnings)]

    def __repr__(self) -> str:
        return text_table([self.path, ""], self._rows())

    def _repr_html_(self) -> str:
        return html_table(["adapter", Path(self.path).name], self._rows())


def save(model: nn.Module, path: str | Path, name: str | None = None) -> Path:
    """Write an adapter as PEFT would; what stood at `path` before stays whole unless everything is written.

    Raises:
        AdapterError: no such adapter, or several active and none named.
        AdapterFileError: the folder cannot be written, the disk is full, weights are not finite.
    """
    name = only_name(model, name)
    tensors = peft_tensors(model, name)
    broken = next((f"{key!r} {fault}" for key, t in tensors.items() if (fault := _fault(t))), None)
    if broken:
        raise AdapterFileError(
            f"Adapter {name!r} is not saved: {broken}. What stood in {str(path)!r} is untouched. Train again with a lower learning rate."
        )
    config = _config_bytes(model, name)
    metadata = {
        "format": "pt",
        "lora_nb_version": __version__,
        "base_fingerprint": fingerprint(model),
        "config_sha256": hashlib.sha256(config).hexdigest(),
    }
    _write(Path(path), {WEIGHTS: to_safetensors(tensors, metadata), CONFIG: config, CARD: _card(model, name)})
    return Path(path)


def load_adapter(model: nn.Module, path: str | Path, name: str = "default", *, strict: bool = True) -> AttachReport:
    """Attach a saved adapter and make it the active one.

    Args:
        strict: `False` goes on, with a warning, when the adapter was trained on another base, when keys are missing (those
            modules stay as the base) or left over. Shapes and types that do not fit are refused either way.

    Raises:
        AdapterFileError: files missing, damaged, or not fitting this model; the model is then untouched.
        TargetError, AdapterError: as for `attach`.
    """
    folder = Path(path)
    saved = _read(folder)
    expected = _expected(model, saved.config)
    tensors = {key: t for key, t in saved.tensors.items() if not _copy_of_base(model, key, t)}
    _refuse_unfit(folder, expected, tensors)
    problems = _problems(model, saved, expected, tensors)
    if problems and strict:
        raise AdapterFileError(f"{str(folder)!r}: {' '.join(problems)} With strict=False it is loaded all the same.")
    for problem in problems:
        warnings.warn(f"{str(folder)!r}: {problem}", stacklevel=2)
    active = adapters(model).active
    report = attach(model, saved.config, name)
    try:
        _fill(model, name, tensors)
    except BaseException:
        detach(model, name)
        set_active(model, active)
        raise
    return report


def inspect(path: str | Path) -> AdapterSummary:
    """What a saved adapter is, from its files alone: no model is needed and none is loaded.

    Raises:
        AdapterFileError: files missing or damaged, or not an adapter that lora_nb reads.
    """
    folder = Path(path)
    saved = _read(folder)
    modules: dict[str, tuple[int, int, int]] = {}
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in saved.tensors.items():
        for mark in (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B"):
            if key.startswith(PREFIX) and key.endswith(mark):
                pairs.setdefault(key[len(PREFIX) : -len(mark)], {})[mark.removesuffix(".weight")[-1]] = tensor
    for module, pair in pairs.items():
        if set(pair) == {"A", "B"} and all(t.ndim == 2 for t in pair.values()):
            modules[module] = (pair["A"].shape[0], pair["A"].shape[1], pair["B"].shape[0])
    odd = [
        f"key {key!r} is not one of a LoRA weight"
        for key in saved.tensors
        if not any(f".lora_{k}" in key for k in ("A.", "B.", "embedding_"))
    ]
    odd += [f"{module} has no pair of A and B" for module in pairs if module not in modules]
    odd += [f"{key} {fault}" for key, t in saved.tensors.items() if (fault := _fault(t))]
    odd += ["config and weights were not saved together"] if saved.edited else []
    size = sum(p.stat().st_size for p in (folder / CONFIG, folder / WEIGHTS))
    return AdapterSummary(str(folder), saved.config, modules, size, saved.base, saved.metadata.get("base_fingerprint"), odd)


def peft_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's keys, on the CPU."""
    return {
        key: p.detach().to("cpu").contiguous()
        for path, w in weights(model, name).items()
        for key, p in zip(_keys(path, w), (w.lora_A, w.lora_B), strict=True)
    }


def _keys(path: str, w: LoraWeights | type[LoraWeights]) -> tuple[str, str]:
    """PEFT's two keys for one module: an embedding's are bare parameters, without `.weight`."""
    kind = w if isinstance(w, type) else type(w)
    if issubclass(kind, LoraEmbeddingWeights):
        return f"{PREFIX}{path}.lora_embedding_A", f"{PREFIX}{path}.lora_embedding_B"
    return f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"


def _config_bytes(model: nn.Module, name: str) -> bytes:
    report = adapters(model).reports[name]
    conv1d = [is_conv1d(model.get_submodule(path).base) for path in report.matched]  # type: ignore[arg-type]
    content = to_peft(report.config, short_names(model, list(report.matched)), base_name(model), fan_in_fan_out=any(conv1d))
    return json.dumps(content, indent=2).encode()  # in its own order: the first key of a rank_pattern that matches wins


def _card(model: nn.Module, name: str) -> bytes:
    base, report = base_name(model) or "unknown", adapters(model).reports[name]
    lines = [
        "---",
        f"base_model: {json.dumps(base)}",
        "library_name: peft",
        "tags: [lora, lora_nb]",
        "---",
        f"# LoRA adapter for `{base}`",
        "",
        f"Rank {report.config.r}, alpha {report.config.lora_alpha:g}, {len(report.matched)} modules, {report.trainable:,} parameters.",
        "Written by lora_nb; read it with lora_nb, Hugging Face PEFT, or whatever reads PEFT's files.",
        "",
    ]
    return "\n".join(lines).encode()


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
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
        _sync_folder(folder)
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


def _sync_folder(folder: Path) -> None:
    """Let the renaming survive a power cut; all is written by now, so a file system that cannot do this is no error."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@dataclass(frozen=True)
class _Saved:
    """A folder's content, checked as far as that goes without a model; `edited`: config and weights were not saved together."""

    config: LoraConfig
    base: str | None
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    edited: bool


def _read(folder: Path) -> _Saved:
    try:
        written = _config_file(folder)
        config, base = _parse(folder, written)
        tensors, metadata = _read_weights(folder)
    except OSError as error:
        raise AdapterFileError(f"{str(folder)!r} cannot be read: {error.strerror or error}. Check the path and who may read it.") from error
    said = metadata.get("config_sha256")
    return _Saved(config, base, tensors, metadata, said is not None and said != hashlib.sha256(written).hexdigest())


def _config_file(folder: Path) -> bytes:
    file = folder / CONFIG
    if not file.is_file():
        there = "is a file" if folder.is_file() else "does not exist" if not folder.exists() else f"has no {CONFIG}"
        raise AdapterFileError(f"{str(folder)!r} {there}: an adapter is a folder with {CONFIG} and {WEIGHTS}.")
    if file.stat().st_size > MOST_CONFIG_BYTES:
        raise AdapterFileError(f"{str(file)!r} has {format_bytes(file.stat().st_size)}: no adapter config is that large.")
    return file.read_bytes()


def _parse(folder: Path, written: bytes) -> tuple[LoraConfig, str | None]:
    """The settings, and what the file calls its base."""
    try:
        content = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(
            f"{str(folder / CONFIG)!r} is not valid JSON ({error}): the file is damaged. Copy or save it again."
        ) from error
    if not isinstance(content, dict):
        raise AdapterFileError(
            f"{str(folder / CONFIG)!r} holds a {type(content).__name__}, not an object of settings: save the adapter again."
        )
    try:
        config = from_peft(content)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:  # ConfigError, and numbers beyond a float
        raise AdapterFileError(f"{str(folder)!r} cannot be used: {error}") from error
    base = content.get("base_model_name_or_path")
    return config, base if isinstance(base, str) else None


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        why = "only adapter_model.bin, a pickle, which can run code when it is opened" if pickled else f"no {WEIGHTS}"
        raise AdapterFileError(f"{str(folder)!r} has {why}: save the adapter again as safetensors.")
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


def _fault(tensor: Tensor) -> str | None:
    """What no adapter's tensor may hold."""
    if tensor.dtype not in FLOATS:
        return f"holds {tensor.dtype}, not floating-point numbers of 16 bits or more"
    return None if torch.isfinite(tensor.float()).all() else "holds NaN or infinity"


def _expected(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, int]]:
    """Key → shape of every tensor that the config asks for on this model."""
    out: dict[str, tuple[int, int]] = {}
    for t in resolve(model, config):
        kind: type[LoraWeights] = LoraEmbeddingWeights if isinstance(t.module, nn.Embedding) else LoraWeights
        a, b = _keys(t.name, kind)
        out[a], out[b] = (t.r, t.in_features), (t.out_features, t.r)
    return out


def _copy_of_base(model: nn.Module, key: str, tensor: Tensor) -> bool:
    """PEFT adds the whole embedding when it is targeted; a copy that equals this model's own says nothing new."""
    if not key.startswith(PREFIX) or ".lora_" in key or tensor.dtype not in FLOATS:
        return False
    everything = dict(model.named_parameters(remove_duplicate=False))  # a tied head has a name of its own, too
    own = everything.get(key.removeprefix(PREFIX).replace(".base_layer.", "."))
    return own is not None and own.shape == tensor.shape and torch.equal(own.detach().cpu().to(torch.bfloat16), tensor.to(torch.bfloat16))


def _problems(model: nn.Module, saved: _Saved, expected: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """What a lenient reader may overlook."""
    out = []
    missing, extra = [k for k in expected if k not in tensors], [k for k in tensors if k not in expected]
    if missing:
        out.append(f"It lacks {len(missing)} of {len(expected)} tensors that its config asks for on this model, such as {missing[0]!r}.")
    if extra:
        out.append(f"It has {len(extra)} tensors that its config does not place on this model, such as {extra[0]!r}.")
    if saved.metadata.get("base_fingerprint", fingerprint(model)) != fingerprint(model):
        out.append(f"It was trained on another base ({saved.base!r}); on {base_name(model)!r} its output would mean little.")
    if saved.edited:
        out.append(f"{CONFIG} was edited, or a save was interrupted: it is not the one saved with these weights.")
    return out


def _refuse_unfit(folder: Path, expected: Mapping[str, tuple[int, int]], tensors: Mapping[str, Tensor]) -> None:
    """What no reader may overlook: shapes, types, values."""
    if not any(key in tensors for key in expected):
        raise AdapterFileError(
            f"{str(folder)!r} has none of the {len(expected)} tensors that its config asks for, such as {next(iter(expected))!r}; it has "
            f"{next(iter(tensors), 'none at all')!r}. Load the base that it was trained on, or save it again with lora_nb or PEFT."
        )
    for key, shape in expected.items():
        tensor = tensors.get(key)
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise AdapterFileError(
                f"{str(folder)!r}: {key!r} is {tuple(tensor.shape)}, but this model and the config ask for {shape}. "
                "Load the base that it was trained on, with the config that was saved with it."
            )
        if fault := _fault(tensor):
            raise AdapterFileError(f"{str(folder)!r}: {key!r} {fault}. Save the adapter again.")


@torch.no_grad()
def _fill(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    for path, w in weights(model, name).items():
        for key, p in zip(_keys(path, w), (w.lora_A, w.lora_B), strict=True):
            p.copy_(tensors[key]) if key in tensors else p.zero_()
