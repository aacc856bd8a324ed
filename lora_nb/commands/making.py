"""Verbs that make an adapter: load, attach, train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from lora_nb.attach import adapters
from lora_nb.attach import attach as attach_adapter
from lora_nb.attach_report import AttachReport
from lora_nb.checkpoint import save as save_adapter
from lora_nb.commands.session import Session
from lora_nb.configs import BottleneckConfig, LoraConfig, TrainConfig
from lora_nb.configs.quant import QUANT_TYPES
from lora_nb.datasets import BUILT_IN, Dataset, dataset
from lora_nb.errors import AdapterError, ConfigError
from lora_nb.targets import base_modules
from lora_nb.training.evaluation import evaluate
from lora_nb.training.loop import Run
from lora_nb.training.loop import train as train_model

BOTTLENECKS = {"houlsby": BottleneckConfig.houlsby, "pfeiffer": BottleneckConfig.pfeiffer, "parallel": BottleneckConfig.parallel}
METHODS = ("lora", "rslora", "dora", *BOTTLENECKS)
RANK = 16
HELD_OUT = 200  # examples that tell what was gained


def module_names(session: Session) -> Iterator[str]:
    """Ends of the names of the loaded model's linear layers."""
    yield "all-linear"
    if session.model is not None:
        yield from sorted({p.rsplit(".", 1)[-1] for p, m in base_modules(session.model) if p and hasattr(m, "in_features")})


def data_names(session: Session) -> Iterator[str]:
    """Built-in data, the notebook's own, and files in this folder."""
    yield from BUILT_IN
    yield from (n for n, v in session.variables.items() if isinstance(v, Dataset) and not n.startswith("_"))
    yield from sorted(p.name for p in Path().glob("*") if p.suffix in {".txt", ".csv", ".tsv", ".jsonl", ".md"})


def load(
    session: Session,
    base: Annotated[str, "tiny, a folder, or a Hub id"] = "tiny",
    *,
    quant: Annotated[str, "keep the linear layers in 4 or 8 bits", QUANT_TYPES] = "",
) -> object:
    """Load a base model and its tokenizer."""
    session.model = session.tokenizer = None
    model, tokenizer = session.open(base, quant)
    count = sum(p.numel() for p in model.parameters())
    session.say(f"{base}: {type(model).__name__}, {count:,} parameters, {len(tokenizer):,} tokens")
    return None


def config_of(
    *,
    method: str = "",
    r: int | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    target_modules: str = "",
    reduction_factor: float | None = None,
) -> LoraConfig | BottleneckConfig:
    """The config that these words mean.

    Raises:
        ConfigError: one that the method has no use for, or a value that is not allowed.
    """
    if method in BOTTLENECKS:
        for name, given in (("r", r), ("lora-alpha", lora_alpha), ("lora-dropout", lora_dropout), ("target-modules", target_modules)):
            if given:
                raise ConfigError(f"--{name} is LoRA's; {method} has --reduction-factor. Leave it out.")
        return BOTTLENECKS[method](reduction_factor=reduction_factor) if reduction_factor else BOTTLENECKS[method]()
    if reduction_factor:
        raise ConfigError("--reduction-factor is for houlsby, pfeiffer and parallel; LoRA has --r.")
    rank = RANK if r is None else r
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if lora_alpha is None else lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=_names(target_modules or "all-linear"),
        use_rslora=method == "rslora",
        use_dora=method == "dora",
    )


def attach(
    session: Session,
    name: Annotated[str, "what to call the adapter"] = "default",
    *,
    method: Annotated[str, "kind of adapter; default: lora", METHODS] = "",
    r: Annotated[int | None, "rank; default: 16"] = None,
    lora_alpha: Annotated[float | None, "scale is alpha / r; default: twice the rank"] = None,
    lora_dropout: Annotated[float, "share of the input that is dropped in training"] = 0.0,
    target_modules: Annotated[str, "names divided by commas; default: all-linear", module_names] = "",
    reduction_factor: Annotated[float | None, "width / bottleneck, for houlsby, pfeiffer and parallel"] = None,
    base: Annotated[str, "tiny, a folder, or a Hub id; default: what is loaded"] = "",
) -> AttachReport:
    """Put an adapter on the model, and say where it went."""
    model, _ = session.open(base)
    config = config_of(
        method=method,
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=target_modules,
        reduction_factor=reduction_factor,
    )
    report = attach_adapter(model, config, name)
    session.leave(report=report)
    return report


def train(
    session: Session,
    data: Annotated[str, "tone, topics, stdlib, planted, a .txt .csv .tsv or .jsonl file, a Hub data set, or $variable", data_names],
    *,
    base: Annotated[str, "tiny, a folder, or a Hub id; default: what is loaded, else tiny"] = "",
    quant: Annotated[str, "keep the base's linear layers in 4 or 8 bits", QUANT_TYPES] = "",
    out: Annotated[str, "folder to save the adapter in; default on the command line: adapters/NAME-OF-THE-DATA"] = "",
    method: Annotated[str, "kind of adapter, where none is on the model yet; default: lora", METHODS] = "",
    r: Annotated[int | None, "its rank; default: 16"] = None,
    lora_alpha: Annotated[float | None, "its scale is alpha / r; default: twice the rank"] = None,
    target_modules: Annotated[str, "names divided by commas; default: all-linear", module_names] = "",
    max_steps: Annotated[int, "optimizer steps"] = 300,
    batch_size: Annotated[int, "texts or pairs in a step"] = 16,
    seq_len: Annotated[int, "tokens in a block"] = 256,
    learning_rate: Annotated[float, "peak learning rate; the embedded base takes this one, large models a tenth and less"] = 5e-3,
    seed: Annotated[int, "order of the data, start of A"] = 0,
) -> Run:
    """Train the adapter that is on the model, or a new one, and say what it gained on held-out data."""
    import torch

    config = TrainConfig(max_steps=max_steps, batch_size=batch_size, seq_len=seq_len, learning_rate=learning_rate, seed=seed)
    asked = {"method": method, "r": r, "lora_alpha": lora_alpha, "target_modules": target_modules}
    adapter = config_of(method=method, r=r, lora_alpha=lora_alpha, target_modules=target_modules)
    examples, held = split(session, data)
    model, tokenizer = session.open(base, quant)
    if session.adapted():
        _refuse_settings(asked, adapters(model).active)
        session.say(f"training {', '.join(adapters(model).active) or 'nothing: no adapter is active'}")
    else:
        torch.manual_seed(seed)
        session.leave(report=attach_adapter(model, adapter))
        session.say(session.named["report"])
    run = train_model(model, tokenizer, examples, config, eval_dataset=held)
    session.run = run
    session.leave(run=run)
    if held is not None and run.steps:
        session.say(evaluate(model, tokenizer, held, seq_len=seq_len))
    folder = out or ("" if session.lasting else f"adapters/{examples.name.rsplit('.', 1)[0]}")
    if folder:
        session.say(f"saved in {save_adapter(model, folder)}")
    return run


def _refuse_settings(asked: Mapping[str, object], there: Sequence[str]) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in asked.items() if value]
    if given:
        raise ConfigError(
            f"{', '.join(given)} would make a new adapter, but {', '.join(there)} is on the model: train it without, or detach it."
        )


def split(session: Session, data: object) -> tuple[Dataset, Dataset | None]:
    """What to train on and what is held out of it: for the notebook's own `Dataset` nothing is, and nothing of a few lines."""
    if isinstance(data, str) and isinstance(session.variables.get(data), Dataset):
        data = session.variables[data]
    if isinstance(data, Dataset):
        return data, None
    if not isinstance(data, str) and isinstance(data, list | tuple) and len(data) < 20:
        return dataset(data), None
    return dataset(data, "train"), dataset(data, "test")[:HELD_OUT]  # type: ignore[arg-type]


def save(
    session: Session,
    path: Annotated[str, "folder to write"],
    *,
    name: Annotated[str, "which adapter; default: the active one"] = "",
) -> Path:
    """Save an adapter in Hugging Face PEFT's format, or AdapterHub's for bottleneck adapters."""
    model, _ = session.opened()
    if not session.adapted():
        raise AdapterError("There is no adapter on the model to save: `attach` or `train` first.")
    return save_adapter(model, path, name or None)


def _names(text: str) -> str | list[str]:
    return text if text == "all-linear" else [name.strip() for name in text.split(",") if name.strip()]
