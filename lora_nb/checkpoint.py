"""Adapters on disk: in Hugging Face PEFT's format, or in AdapterHub's where they are bottleneck adapters.

Written whole or not at all, read back and compared after writing; checked to the key before a model is touched. What
we add (the base's fingerprint, a hash of the config) lies in the safetensors header, where other readers ignore it.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from lora_nb.adapter_files import (
    CARD,
    CONFIG,
    FLOATS,
    HUB_WEIGHTS,
    PREFIX,
    WEIGHTS,
    SavedAdapter,
    digest,
    fault,
    read_folder,
    write_folder,
)
from lora_nb.adapterhub import fitted, hub_content, hub_metadata, hub_problems, hub_starts
from lora_nb.attach import adapters, check_name, detach, layers, only_name, parts, put_on, set_active
from lora_nb.attach_report import AttachReport
from lora_nb.bases import base_name
from lora_nb.bottleneck_targets import resolve_bottleneck
from lora_nb.configs import BottleneckConfig, LoraConfig, to_peft
from lora_nb.errors import AdapterFileError
from lora_nb.file_targets import spelled_for_peft, without_absent, without_idle
from lora_nb.layers.adapted import Part
from lora_nb.layers.matrix import is_conv1d
from lora_nb.origin import prints, same_base
from lora_nb.resolution import resolve
from lora_nb.targets import Target, short_names
from lora_nb.version import __version__


def save(model: nn.Module, path: str | Path, name: str | None = None) -> Path:
    """Write an adapter as PEFT would, or AdapterHub; what stood at `path` before stays whole unless everything is written.

    Raises:
        AdapterError: no such adapter, or several active and none named.
        AdapterFileError: the folder cannot be written, the disk is full, weights are not finite.
    """
    name = only_name(model, name)
    tensors = file_tensors(model, name)
    broken = next((f"{key!r} {wrong}" for key, t in tensors.items() if (wrong := fault(t))), None)
    if broken:
        raise AdapterFileError(
            f"Adapter {name!r} is not saved: {broken}. What stood in {str(path)!r} is untouched. Train again with a lower learning rate."
        )
    config = _config_bytes(model, name)
    metadata = {
        "format": "pt",
        "lora_nb_version": __version__,
        **prints(model),
        "base_class": type(model).__name__,
        "config_sha256": hashlib.sha256(config).hexdigest(),
        "weights_sha256": digest(tensors),
        **adapters(model).facts.get(name, {}),
    }
    settings = adapters(model).reports[name].config
    metadata |= hub_metadata(settings) if isinstance(settings, BottleneckConfig) else {}
    weights = HUB_WEIGHTS if isinstance(settings, BottleneckConfig) else WEIGHTS
    write_folder(Path(path), {weights: to_safetensors(tensors, metadata), CONFIG: config, CARD: _card(model, name)})
    return Path(path)


def load_adapter(model: nn.Module, path: str | Path, name: str = "default", *, strict: bool = True) -> AttachReport:
    """Attach a saved adapter and make it the active one.

    Args:
        strict: `False` goes on, with a warning, when the adapter was trained on another base, when keys are missing (those
            modules stay as the base) or left over, or when some of the modules or layers that it names are not there. Shapes and
            types that do not fit are refused either way.

    Raises:
        AdapterFileError: files missing, damaged, or not fitting this model; the model is then untouched.
        TargetError, AdapterError: as for `attach`.
    """
    folder = Path(path)
    saved = read_folder(folder)
    check_name(model, name)
    fit = fit_file(model, folder, saved)
    problems = fit.problems
    if problems and strict:
        raise AdapterFileError(f"{str(folder)!r}: {' '.join(problems)} With strict=False it is loaded all the same.")
    for problem in problems:
        warnings.warn(f"{str(folder)!r}: {problem}", stacklevel=2)
    active = adapters(model).active
    report = put_on(model, fit.config, name, fit.targets)
    try:
        _fill(model, name, fit)
        adapters(model).facts[name] = fit.facts
    except BaseException:
        detach(model, name)
        set_active(model, active)
        raise
    return report


@dataclass(frozen=True)
class Fit:
    """What a file puts where on a model.

    `starts` is path of a module → what its keys start with, `problems` what a lenient reader may overlook.
    """

    config: LoraConfig | BottleneckConfig
    targets: list[Target]
    starts: dict[str, str]
    tensors: dict[str, Tensor]
    facts: dict[str, str]
    problems: list[str]


def fit_file(model: nn.Module, folder: Path, saved: SavedAdapter) -> Fit:
    """A file held against a model, which is left as it is.

    Raises:
        AdapterFileError, TargetError: it does not fit.
    """
    config, targets, absent = _meant(model, saved)
    starts = _starts(model, config, [t.name for t in targets], str(saved.content.get("name")))
    expected = {f"{starts[t.name]}{end}": tuple(blank.shape) for t in targets for end, blank in t.blank().tensors().items()}
    tensors = {key: t for key, t in saved.tensors.items() if key in expected or not _said_already(model, saved.tensors, key)}
    tensors = fitted(model, tensors, expected) if isinstance(config, BottleneckConfig) else tensors
    _refuse_unfit(folder, expected, tensors)
    _refuse_claims(model, folder, expected, tensors)
    problems = absent + _problems(model, saved, expected, tensors)
    problems += hub_problems(model, folder, saved.content) if isinstance(config, BottleneckConfig) else []
    facts = {k: v for k, v in saved.metadata.items() if k.startswith("training_")}
    return Fit(config, targets, starts, tensors, facts, problems)


def _meant(model: nn.Module, saved: SavedAdapter) -> tuple[LoraConfig | BottleneckConfig, list[Target], list[str]]:
    """The config of a file, less what means nothing on this model; where it puts what; and what it names that the model lacks."""
    if isinstance(saved.config, BottleneckConfig):
        return saved.config, resolve_bottleneck(model, saved.config), []
    config, absent = without_absent(model, without_idle(model, saved.config))
    return config, resolve(model, config), absent


def file_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's tensors under a file's keys, on the CPU; what two tied layers share is there under both names, as in PEFT."""
    found = parts(model, name)
    starts = _starts(model, adapters(model).reports[name].config, found, name)
    return {
        f"{starts[path]}{end}": t.detach().to("cpu", copy=True).contiguous()
        for path, part in found.items()
        for end, t in part.saved().items()
    }


def _starts(model: nn.Module, config: LoraConfig | BottleneckConfig, paths: Iterable[str], name: str) -> dict[str, str]:
    """Path of a module → what its keys start with: PEFT's do not have the adapter's name, AdapterHub's do."""
    if isinstance(config, BottleneckConfig):
        return hub_starts(model, config, name)
    return {path: f"{PREFIX}{path}" for path in paths}


def _config_bytes(model: nn.Module, name: str) -> bytes:
    report = adapters(model).reports[name]
    if isinstance(report.config, BottleneckConfig):
        return json.dumps(hub_content(model, report.config, name), indent=2).encode()
    ranked = [path for path, m in report.matched.items() if m.by_module]
    conv1d = any(is_conv1d(model.get_submodule(path)) for path in ranked)
    config, names = spelled_for_peft(model, report.config), short_names(model, ranked) if ranked else []
    content = to_peft(config, names, base_name(model), fan_in_fan_out=conv1d)
    return json.dumps(content, indent=2).encode()  # in its own order: the first key of a rank_pattern that matches wins


def _card(model: nn.Module, name: str) -> bytes:
    base, report = base_name(model) or "unknown", adapters(model).reports[name]
    if isinstance(report.config, BottleneckConfig):
        kind, library, settings = "Bottleneck", "adapters", ""
        readers = "AdapterHub's `adapters`"
    else:
        kind, library, settings = "LoRA", "peft", f"Rank {report.config.r}, alpha {report.config.lora_alpha:g}, "
        readers = "Hugging Face PEFT, or whatever reads PEFT's files"
    lines = [
        "---",
        f"base_model: {json.dumps(base)}",
        f"library_name: {library}",
        f"tags: [{kind.lower()}, lora_nb]",
        "---",
        f"# {kind} adapter for `{base}`",
        "",
        f"{settings}{len(report.matched)} modules, {report.trainable:,} parameters.",
        f"Written by lora_nb; read it with lora_nb, {readers}.",
        "",
    ]
    return "\n".join(lines).encode()


def _said_already(model: nn.Module, tensors: Mapping[str, Tensor], key: str) -> bool:
    """A key that says nothing new.

    PEFT adds the whole embedding when it is targeted: a copy of this model's own. With bias="all" it has the biases of
    `modules_to_save` twice.
    """
    tensor, twin = tensors[key], tensors.get(key.replace(".modules_to_save.", "."))
    if twin is not None and twin is not tensor:
        return torch.equal(twin, tensor)
    if not key.startswith(PREFIX) or ".lora_" in key or tensor.dtype not in FLOATS:
        return False
    everything = dict(model.named_parameters(remove_duplicate=False))  # a tied head has a name of its own, too
    plain = key.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".").replace(".token_adapter.", ".")
    own = everything.get(plain)
    if own is None or own.shape != tensor.shape:
        return False
    halves = torch.float16 in {own.dtype, tensor.dtype}
    one, other = (t.to(torch.float16 if halves else t.dtype).to(torch.bfloat16) for t in (own.detach().cpu(), tensor))
    return torch.equal(one, other)


def _problems(model: nn.Module, saved: SavedAdapter, expected: Mapping[str, object], tensors: Mapping[str, Tensor]) -> list[str]:
    """What a lenient reader may overlook."""
    out = []
    missing, extra = [k for k in expected if k not in tensors], [k for k in tensors if k not in expected]
    if missing:
        out.append(f"It lacks {len(missing)} of {len(expected)} tensors that its config asks for on this model, such as {missing[0]!r}.")
    if extra:
        out.append(f"It has {len(extra)} tensors that its config does not place on this model, such as {extra[0]!r}.")
    if not same_base(model, saved.metadata):
        out.append(f"It was trained on another base ({saved.base!r}); on {base_name(model)!r} its output would mean little.")
    if saved.edited:
        out.append(f"{CONFIG} was edited, or a save was interrupted: it is not the one saved with these weights.")
    return out


def _refuse_unfit(folder: Path, expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
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


def _refuse_claims(model: nn.Module, folder: Path, expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    """Memory for what a file only speaks of: with strict=False it would be given."""
    claimed = sum(math.prod(shape) for key, shape in expected.items() if key not in tensors)
    if claimed > sum(p.numel() for p in model.parameters()):
        raise AdapterFileError(
            f"{str(folder)!r}: its config asks for {claimed:,} numbers that the file does not hold, more than the model has. "
            f"Load it with the {CONFIG} that was saved with it."
        )


@torch.no_grad()
def _fill(model: nn.Module, name: str, fit: Fit) -> None:
    """A part that the file does not have whole is set to a start where it changes nothing."""
    for path, layer in layers(model, name):
        part = cast("Part", layer.adapters[name])
        if not fill_part(part, fit.starts.get(path, ""), fit.tensors):
            part.reset(layer)


@torch.no_grad()
def fill_part(part: Part, start: str, tensors: Mapping[str, Tensor]) -> bool:
    """Copy a file's tensors, whose keys begin with `start`, into a part, or say that they are not all there."""
    own = {f"{start}{end}": p for end, p in part.tensors().items()}
    if not own.keys() <= tensors.keys():
        return False
    for key, p in own.items():
        p.copy_(tensors[key])
    return True
