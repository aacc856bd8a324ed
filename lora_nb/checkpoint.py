"""Adapters on disk in Hugging Face PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Written whole or not at all, read back and compared after writing; checked to the key before a model is touched. What
we add (the base's fingerprint, a hash of the config) lies in the safetensors header, where other readers ignore it.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from lora_nb.adapter_files import CARD, CONFIG, FLOATS, WEIGHTS, SavedAdapter, fault, read_folder, write_folder
from lora_nb.attach import AttachReport, adapters, attach, detach, only_name, set_active, weights
from lora_nb.bases import base_name, fingerprint
from lora_nb.configs import LoraConfig, to_peft
from lora_nb.errors import AdapterFileError
from lora_nb.layers.lora import LoraEmbeddingWeights, LoraWeights, is_conv1d
from lora_nb.render import format_bytes, html_table, text_table
from lora_nb.targets import resolve, short_names, without_excluded
from lora_nb.version import __version__

PREFIX = "base_model.model."


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
    broken = next((f"{key!r} {wrong}" for key, t in tensors.items() if (wrong := fault(t))), None)
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
    write_folder(Path(path), {WEIGHTS: to_safetensors(tensors, metadata), CONFIG: config, CARD: _card(model, name)})
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
    saved = read_folder(folder)
    config = without_excluded(model, saved.config)
    expected = _expected(model, config)
    tensors = {key: t for key, t in saved.tensors.items() if not _copy_of_base(model, key, t)}
    _refuse_unfit(folder, expected, tensors)
    problems = _problems(model, saved, expected, tensors)
    if problems and strict:
        raise AdapterFileError(f"{str(folder)!r}: {' '.join(problems)} With strict=False it is loaded all the same.")
    for problem in problems:
        warnings.warn(f"{str(folder)!r}: {problem}", stacklevel=2)
    active = adapters(model).active
    report = attach(model, config, name)
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
    saved = read_folder(folder)
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
    odd += [f"{key} {wrong}" for key, t in saved.tensors.items() if (wrong := fault(t))]
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


def _problems(model: nn.Module, saved: SavedAdapter, expected: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
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
        if wrong := fault(tensor):
            raise AdapterFileError(f"{str(folder)!r}: {key!r} {wrong}. Save the adapter again.")


@torch.no_grad()
def _fill(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    for path, w in weights(model, name).items():
        for key, p in zip(_keys(path, w), (w.lora_A, w.lora_B), strict=True):
            p.copy_(tensors[key]) if key in tensors else p.zero_()
