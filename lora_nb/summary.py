"""What a saved adapter is, told from its files alone."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from lora_nb.adapter_files import CONFIG, PREFIX, SavedAdapter, fault, read_folder, weights_file
from lora_nb.configs import BottleneckConfig, LoraConfig
from lora_nb.engines import refusals
from lora_nb.render import format_bytes, html_table, text_table

Modules = dict[str, tuple[int, int, int]]
WHERE = {
    "output": "sublayers' outputs",
    "sum": "residual stream behind the sublayers",
    "residual": "residual stream, beside the sublayers",
    "normed": "norms' outputs",
}


@dataclass(frozen=True)
class AdapterSummary:
    """What a saved adapter is: its config, modules (path → rank, in, out), parameters, size, base, fingerprint, and what looks odd.

    Of a bottleneck adapter the rank is the size of the bottleneck. `engines`: what vLLM, LoRAX and SGLang would refuse it for.
    """

    path: str
    config: LoraConfig | BottleneckConfig
    modules: dict[str, tuple[int, int, int]]
    parameters: int
    bytes: int
    base: str | None
    fingerprint: str | None
    warnings: list[str]
    engines: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def _rows(self) -> list[tuple[str, str]]:
        ranks = ", ".join(str(r) for r in sorted({r for r, _, _ in self.modules.values()}))
        facts = {
            "method": self._method(),
            "base": self.base or "not said",
            "base fingerprint": self.fingerprint or "none: not written by lora_nb",
            **self._sizes(ranks),
            "modules": f"{len(self.modules)}: " + ", ".join(sorted({m.rsplit(".", 1)[-1] for m in self.modules})),
            "size": format_bytes(self.bytes),
        }
        served = [(engine, "; ".join(whys) or "takes it") for engine, whys in self.engines.items()]
        return [*facts.items(), *served, *(("warning", w) for w in self.warnings)]

    def _method(self) -> str:
        c = self.config
        if isinstance(c, BottleneckConfig):
            return f"bottleneck adapter on the {WHERE[c.reading()]}"
        return ("DoRA" if c.use_dora else "LoRA") + (", rank-stabilised" if c.use_rslora else "")

    def _sizes(self, ranks: str) -> dict[str, str]:
        if isinstance(self.config, BottleneckConfig):
            return {"bottleneck": ranks, "scaling": str(self.config.scaling)}
        return {"rank": ranks, "alpha": f"{self.config.lora_alpha:g}", "parameters": f"{self.parameters:,}"}

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
    modules, odd = _bottlenecks(saved) if isinstance(saved.config, BottleneckConfig) else _low_rank(saved.tensors, saved.config)
    odd += [f"{key} {wrong}" for key, t in saved.tensors.items() if (wrong := fault(t))]
    odd += ["config and weights were not saved together"] if saved.edited else []
    size = sum(p.stat().st_size for p in (folder / CONFIG, weights_file(folder, saved.content)))
    count = sum(t.numel() for key, t in saved.tensors.items() if isinstance(saved.config, BottleneckConfig) or _belongs(key, saved.config))
    return AdapterSummary(
        str(folder), saved.config, modules, count, size, saved.base, saved.metadata.get("base_fingerprint"), odd, refusals(saved)
    )


def _low_rank(tensors: dict[str, Tensor], config: LoraConfig) -> tuple[Modules, list[str]]:
    """The modules of a LoRA file, and what looks odd in it."""
    pairs = _pairs(tensors)
    modules = {path: shape for path, pair in pairs.items() if (shape := _shape(pair))}
    odd = [f"key {key!r} is not one of a LoRA weight" for key in tensors if not _belongs(key, config)]
    return modules, odd + [f"{path} has no pair of A and B" for path in pairs if path not in modules]


def _bottlenecks(saved: SavedAdapter) -> tuple[Modules, list[str]]:
    """The same of a file in AdapterHub's format."""
    modules: Modules = {}
    middle = f".adapters.{saved.content.get('name')}."
    for key, t in saved.tensors.items():
        path, found, end = key.partition(middle)
        if found and t.ndim == 2 and re.fullmatch(r"adapter_down\.\d\.weight", end):
            modules[path] = (t.shape[0], t.shape[1], t.shape[1])
    return modules, [f"key {key!r} is not one of the adapter's" for key in saved.tensors if middle not in key]


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
    return pair["A"].shape[0], pair["A"].flatten(1).shape[1], pair["B"].shape[0]


def _belongs(key: str, config: LoraConfig) -> bool:
    """Whether a LoRA file of this config may have such a key."""
    if any(f".lora_{kind}" in key for kind in ("A.", "B.", "embedding_", "magnitude_vector")):
        return True
    saved = any(f".{name}." in key for name in config.modules_to_save) or config.ensure_weight_tying
    return saved or key.endswith(".token_adapter.trainable_tokens_delta") or (config.bias != "none" and key.endswith(".bias"))
