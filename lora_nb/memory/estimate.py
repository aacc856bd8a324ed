"""Memory from a config alone: the closed form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lora_nb.bases import EMBEDDED
from lora_nb.configs import BottleneckConfig, LoraConfig
from lora_nb.configs.quant import QuantConfig
from lora_nb.errors import BaseModelError, ConfigError, nearest
from lora_nb.memory.families import read
from lora_nb.memory.report import Change, Estimate
from lora_nb.memory.setting import DTYPES, Config, Setting
from lora_nb.memory.shapes import Shape
from lora_nb.memory.step import assumptions, measure

SHAPES = Path(__file__).parents[1] / "data" / "shapes.json"


def estimate(
    model_or_id: object,
    config: Config = None,
    *,
    quant: str | QuantConfig | None = None,
    batch_size: int = 1,
    seq_len: int = 512,
    dtype: torch.dtype | str | None = None,
    optimizer: str = "adamw",
    gradient_checkpointing: bool = False,
    gradient_accumulation_steps: int = 1,
    attention: Literal["flash", "eager", "math"] | None = None,
    loss: Literal["chunked", "full"] | None = None,
    framework: Literal["lora_nb", "peft", "litgpt"] = "lora_nb",
    device: Literal["cuda", "cpu"] | None = None,
    precision: Literal["fp32", "bf16", "fp16"] | None = None,
) -> Estimate:
    """Bytes that a training step, or generation, takes at its peak; no weights are needed, and no network for the shapes built in.

    Args:
        model_or_id: a model; a config of transformers, also as a dict; a folder with `config.json`; the id of a shape
            built in (`known_shapes()`), or of any model on the Hub, whose config is then fetched.
        config: a `LoraConfig` or a `BottleneckConfig`; `"full"` for training every weight; None for generation, where
            `seq_len` counts prompt and answer together.
        quant: the base in 4 or 8 bits, as for `load`.
        batch_size, seq_len: texts in one forward, and tokens of each.
        dtype: of weights and activations. Default: the model's own, float32 on a CPU, bfloat16 on a GPU.
        optimizer: as in `TrainConfig`, or `"sgd"`.
        gradient_accumulation_steps: with more than one the gradients stay from forward to forward.
        attention: `"flash"` (any fused kernel), `"eager"` (written out by the model) or `"math"` (by PyTorch). Default: what
            transformers takes.
        loss: `"chunked"` (ours) or `"full"` (all logits at once); default: the framework's.
        framework: whose layers and loop: this package's, Hugging Face PEFT with transformers, or litgpt.
        device: `"cuda"` unless a model on a CPU is given.
        precision: autocast of the forward, as in `TrainConfig`. Default: as there bf16 on a GPU and fp32 (none) on a CPU; none with
            litgpt, which trains in the type of the weights.

    Raises:
        ConfigError: an unknown architecture, or a value that no step can have.
        TargetError: `config` names what the architecture lacks.
        BaseModelError: nothing is known under that name, with the nearest that is.
    """
    on = device or _device(model_or_id) or "cuda"
    shape = shape_of(model_or_id)
    if framework == "litgpt":
        shape = replace(shape, tied=False)
    setting = Setting(
        shape,
        config,
        _quant(quant),
        batch_size,
        seq_len,
        _dtype(dtype, model_or_id, on),
        optimizer,
        bool(gradient_checkpointing),
        gradient_accumulation_steps,
        _choice(
            "attention",
            attention,
            ("flash", "eager", "math"),
            shape.attention if framework != "litgpt" or shape.attention == "eager" else "flash",
        ),
        _choice("loss", loss, ("chunked", "full"), "chunked" if framework == "lora_nb" else "full"),
        framework,
        on,
        precision or ("bf16" if on == "cuda" and framework != "litgpt" and config is not None else "fp32"),
    )
    return report(setting)


def report(setting: Setting) -> Estimate:
    """The estimate for a setting."""
    step = measure(setting)
    return Estimate(
        _title(setting),
        step.parts(),
        step.formula,
        tuple(assumptions(setting)),
        tuple(step.moments.items()),
        changes=lambda: list(_changes(setting)),
    )


def known_shapes() -> dict[str, Mapping[str, Any]]:
    """The shapes that are built in: Hub id → the numbers of its config."""
    return dict(_shapes())


@cache
def _shapes() -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = json.loads(SHAPES.read_text())
    return found


def shape_of(model_or_id: object) -> Shape:
    """The shape of a model, a config, a folder or an id.

    Raises:
        ConfigError: no architecture that is known here.
        BaseModelError: nothing is known under that name.
    """
    if isinstance(model_or_id, str | Path):
        return _by_name(str(model_or_id))
    config = getattr(model_or_id, "config", model_or_id) if isinstance(model_or_id, nn.Module) else model_or_id
    if isinstance(config, Mapping):
        return read(config)
    if hasattr(config, "to_dict"):
        return read(config.to_dict(), getattr(config, "_name_or_path", "") or "")
    raise ConfigError(
        f"estimate cannot read a {type(model_or_id).__name__}: give a model of transformers, its config, a folder, or an id such as "
        "'meta-llama/Llama-3.2-1B'. For any other module there is trace_memory."
    )


@cache
def _built_in(name: str) -> Shape:
    return read(_shapes()[name], name)


def _by_name(name: str) -> Shape:
    if name in _shapes():
        return _built_in(name)
    short = [known for known in _shapes() if known.rsplit("/", 1)[-1].lower() == name.lower()]
    if len(short) == 1:
        return _built_in(short[0])
    folder = EMBEDDED.get(name, Path(name))
    if (folder / "config.json").is_file():
        return _from_file(folder / "config.json", name)
    return _from_hub(name)


def _from_file(path: Path, name: str) -> Shape:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{str(path)!r} cannot be read as JSON ({error}): save the model again.") from error
    if not isinstance(config, dict):
        raise BaseModelError(f"{str(path)!r} holds no config: save the model again.")
    return read(config, name)


def _from_hub(name: str) -> Shape:
    """The config of a model on the Hub, if that can be reached."""
    known = nearest(name, _shapes()) if "/" in name else nearest(name, {known.rsplit("/", 1)[-1] for known in _shapes()})
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise BaseModelError(f"There is no folder {name!r} with a config.json, and no shape of that name is built in." + known)
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(name, "config.json")
    except Exception as error:  # no network, no such model, no leave: whatever the Hub's client stumbles over
        raise BaseModelError(
            f"No shape {name!r} is built in, and its config cannot be fetched from the Hub ({type(error).__name__}). Give a folder with "
            "its config.json, or the numbers as a dict." + known
        ) from error
    return _from_file(Path(path), name)


def _quant(quant: str | QuantConfig | None) -> QuantConfig | None:
    return QuantConfig(quant_type=quant) if isinstance(quant, str) else quant  # type: ignore[arg-type] # checked there


def _dtype(dtype: torch.dtype | str | None, model: object, device: str) -> torch.dtype:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"estimate(dtype={dtype!r}) is not known." + nearest(dtype, DTYPES))
        return DTYPES[dtype]
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), None) if isinstance(model, nn.Module) else None
    found = dtype or own or (torch.float32 if device == "cpu" else torch.bfloat16)
    if found not in DTYPES.values():
        raise ConfigError(f"estimate(dtype={found}): give torch.float32, torch.bfloat16 or torch.float16.")
    return found


def _device(model: object) -> Literal["cuda", "cpu"] | None:
    if not isinstance(model, nn.Module):
        return None
    return "cuda" if next((p.device.type for p in model.parameters()), "cpu") == "cuda" else "cpu"


def _attention(shape: Shape, framework: str) -> str:
    """litgpt repeats keys and values, so that a fused kernel takes all but capped scores."""
    return "flash" if framework == "litgpt" and shape.attention == "math" else shape.attention


def _choice(name: str, value: str | None, choices: tuple[str, ...], default: str) -> str:
    if value is not None and value not in choices:
        raise ConfigError(f"estimate({name}={value!r}) is not known." + nearest(str(value), choices))
    return value or default


def _title(s: Setting) -> str:
    base = s.shape.name + (f" in {s.quant.quant_type}" if s.quant else "")
    if s.config is None:
        return f"{base}, generation, {s.batch_size} × {s.seq_len:,} tokens"
    method = {"full": "full fine-tuning"}.get(s.config) if isinstance(s.config, str) else method_name(s.config)
    return f"{base}, {method}, {s.batch_size} × {s.seq_len:,} tokens"


def method_name(config: LoraConfig | BottleneckConfig) -> str:
    """As the title of an estimate has it."""
    if isinstance(config, BottleneckConfig):
        return f"bottleneck adapters 1/{config.reduction_factor}"
    return f"{'DoRA' if config.use_dora else 'LoRA'} r={config.r}"


def _changes(s: Setting) -> Iterator[Change]:
    """Single changes, those that touch least first, then the same one upon the other (named `and …`)."""
    steps = list(_ways(s))
    for what, price, changed in steps:
        yield Change(what, report(changed).total, price)
    now = s
    for what, price, _ in steps:
        again = next((changed for name, _, changed in _ways(now) if name == what), None)
        if again is not None and again != now:
            now = again
            yield Change(f"and {what}", report(now).total, price)


def _ways(s: Setting) -> Iterator[tuple[str, str, Setting]]:
    """(what to do, what it costs, the setting then)."""
    trains = s.config is not None
    if trains and s.loss == "full":
        yield "compute the loss in chunks (loss='chunked')", "nothing: the same loss", replace(s, loss="chunked", framework="lora_nb")
    if trains and s.batch_size > 1:
        more = s.gradient_accumulation_steps * s.batch_size
        yield (
            f"batch_size=1 with gradient_accumulation_steps={more}",
            "some speed: the same gradients",
            replace(s, batch_size=1, gradient_accumulation_steps=more),
        )
    if trains and not s.gradient_checkpointing:
        yield "gradient_checkpointing=True", "a third more time: the same gradients", replace(s, gradient_checkpointing=True)
    if s.dtype == torch.float32:
        yield "dtype='bfloat16'", "rounding of weights and activations", replace(s, dtype=torch.bfloat16)
    if trains and s.optimizer == "adamw":
        yield "optimizer='paged_adamw_8bit'", "coarser moments", replace(s, optimizer="paged_adamw_8bit")
    if s.everything:
        yield "LoRA instead of full fine-tuning (config=LoraConfig())", "an update of low rank", replace(s, config=LoraConfig())
    if s.quant is None and not s.everything:
        yield "quant='nf4'", "weights rounded to 4 bits; steps some 1.5 times as long", replace(s, quant=QuantConfig())
    if s.seq_len > 256:
        yield f"seq_len={s.seq_len // 2}", "shorter texts", replace(s, seq_len=s.seq_len // 2)
    smaller = [
        n for n, c in _shapes().items() if c["model_type"] == s.shape.model_type and _built_in(n).parameters < 0.7 * s.shape.parameters
    ]
    if smaller:
        name = max(smaller, key=lambda n: _built_in(n).parameters)
        yield f"a smaller model, {name}", "what the larger one knows", replace(s, shape=_built_in(name))
