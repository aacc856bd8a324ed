"""What a saved adapter is, told from its files alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lora_nb.adapter_files import CONFIG, PREFIX, WEIGHTS, fault, read_folder
from lora_nb.configs import LoraConfig
from lora_nb.render import format_bytes, html_table, text_table


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
            "method": ("DoRA" if c.use_dora else "LoRA") + (", rank-stabilised" if c.use_rslora else ""),
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


def inspect(path: str | Path) -> AdapterSummary:
    """What a saved adapter is, from its files alone: no model is needed and none is loaded.

    Raises:
        AdapterFileError: files missing or damaged, or not an adapter that lora_nb reads.
    """
    folder = Path(path)
    saved = read_folder(folder)
    modules = {path: shape for path, pair in _pairs(saved.tensors).items() if (shape := _shape(pair))}
    odd = [f"key {key!r} is not one of a LoRA weight" for key in saved.tensors if not _belongs(key, saved.config)]
    odd += [f"{path} has no pair of A and B" for path in _pairs(saved.tensors) if path not in modules]
    odd += [f"{key} {wrong}" for key, t in saved.tensors.items() if (wrong := fault(t))]
    odd += ["config and weights were not saved together"] if saved.edited else []
    size = sum(p.stat().st_size for p in (folder / CONFIG, folder / WEIGHTS))
    return AdapterSummary(str(folder), saved.config, modules, size, saved.base, saved.metadata.get("base_fingerprint"), odd)


def _pairs(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Path of a module → its A and B."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        for mark in (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B"):
            if key.startswith(PREFIX) and key.endswith(mark):
                pairs.setdefault(key[len(PREFIX) : -len(mark)], {})[mark.removesuffix(".weight")[-1]] = tensor
    return pairs


def _shape(pair: dict[str, Tensor]) -> tuple[int, int, int] | None:
    """(r, in, out), unless the two do not fit together."""
    if set(pair) != {"A", "B"} or any(t.ndim < 2 for t in pair.values()):
        return None
    return pair["A"].shape[0], pair["A"].shape[1], pair["B"].shape[0]


def _belongs(key: str, config: LoraConfig) -> bool:
    """Whether a LoRA file of this config may have such a key."""
    if any(f".lora_{kind}" in key for kind in ("A.", "B.", "embedding_", "magnitude_vector")):
        return True
    saved = any(f".{name}." in key for name in config.modules_to_save) or config.ensure_weight_tying
    return saved or key.endswith(".token_adapter.trainable_tokens_delta") or (config.bias != "none" and key.endswith(".bias"))
