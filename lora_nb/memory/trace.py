"""Memory from a run of the real model code without weights: tensors have shapes and storages of no content (PyTorch's fake tensors).

Only weights are fake, and what is computed from them. Token ids, positions and labels are real, so code that looks at
them takes the path that it takes in earnest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_nb.attach import attach
from lora_nb.blocks import IGNORE
from lora_nb.configs import BottleneckConfig, LoraConfig
from lora_nb.errors import ConfigError, TraceError, nearest
from lora_nb.memory.dry_run import Plan, generation, training_steps
from lora_nb.memory.estimate import method_name
from lora_nb.memory.ledger import Blank, Ledger
from lora_nb.memory.report import Estimate
from lora_nb.memory.setting import MOST
from lora_nb.memory.skeleton import fake, skeleton
from lora_nb.training.loss import PROBED, loss_sum

Config = LoraConfig | BottleneckConfig | Literal["full", "attached"] | None
CHOICES = {"optimizer": ("adamw", "sgd"), "loss": ("chunked", "full"), "precision": ("fp32", "bf16", "fp16")}
POINTS = 240  # of the course over the step


def trace_memory(
    model_or_id: object,
    config: Config = None,
    *,
    batch_size: int = 1,
    seq_len: int = 512,
    dtype: torch.dtype | str | None = None,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    gradient_checkpointing: bool = False,
    gradient_accumulation_steps: int = 1,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    loss: Literal["chunked", "full"] = "chunked",
    inputs: Mapping[str, Tensor] | None = None,
) -> Estimate:
    """Bytes at the peak of a training step, or of generation, found by running the model's code on tensors without content.

    It takes seconds, whatever the size, and any architecture. The model is not changed.

    Args:
        model_or_id: a model, on any device, also meta; a config of transformers; a folder; or the id of a shape that is built in.
        config: a `LoraConfig` or a `BottleneckConfig` to attach; `"full"`; `"attached"` for what asks for a gradient in the
            model that was given, whoever's adapters that are; or None for generation.
        batch_size, seq_len: texts in one forward, and tokens of each.
        dtype: of the weights. Default: the model's own, else float32.
        precision: autocast of the forward, as in `TrainConfig`.
        loss: `"chunked"`, the package's own loop (also its fused blocks), for models that have an output head on a backbone; or
            `"full"`, the model's own code and no other.
        inputs: what the model is called with, by name, instead of token ids: for models that are no language models. The
            loss is then the model's own, or the sum of what it gives.

    Raises:
        ConfigError, TargetError: as for `estimate` and `attach`.
        BaseModelError: nothing is known under that name.
        TraceError: the model's code cannot be run without values.
    """
    _check(batch_size, seq_len, gradient_accumulation_steps, optimizer, loss, precision)
    model = skeleton(model_or_id, dtype)
    if isinstance(config, LoraConfig | BottleneckConfig):
        with Blank():
            attach(model, config)
    elif config in {"full", None}:
        model.requires_grad_(requires_grad=config == "full")
    elif config != "attached":
        raise ConfigError(f"trace_memory(config={config!r}): give a LoraConfig, a BottleneckConfig, 'full', 'attached' or None.")
    model = fake(model)
    given = dict(inputs) if inputs is not None else _tokens(model, batch_size, seq_len)
    forward = _forward(model, given, precision, chunked=loss == "chunked" and inputs is None)
    plan = Plan(model, forward, optimizer, gradient_accumulation_steps, gradient_checkpointing, loss == "chunked")
    with torch.random.fork_rng(), _explained(model):  # dropout on real tensors draws
        ledger, start = generation(model, given) if config is None else training_steps(plan)
    what = f"{_name(model_or_id, model)}, {_method(config)}, {_sizes(given)}"
    return _report(what, ledger, start, _assumptions(precision, config))


def _check(batch_size: int, seq_len: int, accumulate: int, optimizer: str, loss: str, precision: str) -> None:  # noqa: PLR0917 - as they came
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len), ("gradient_accumulation_steps", accumulate)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST[name]:
            raise ConfigError(f"trace_memory({name}={value!r}): {name} must be a whole number from 1 to {MOST[name]:,}.")
    given = {"optimizer": optimizer, "loss": loss, "precision": precision}
    for name, known in CHOICES.items():
        if given[name] not in known:
            raise ConfigError(f"trace_memory({name}={given[name]!r}) is not known." + nearest(str(given[name]), known))


@contextmanager
def _explained(model: nn.Module) -> Iterator[None]:
    """What PyTorch cannot do without values, in our words; and not once more in its log."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.disabled
    log.disabled = True
    try:
        yield
    except (RuntimeError, NotImplementedError, TypeError) as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise TraceError(
            f"{type(model).__name__} cannot be run on tensors without content: {said}. It may look at values on its way, or need another "
            "dtype (mixtures of experts need dtype='bfloat16') or other inputs=…; estimate needs its config alone."
        ) from error
    finally:
        log.disabled = before


def _tokens(model: Any, batch_size: int, seq_len: int) -> dict[str, Tensor]:
    """Ids and labels, all of which count."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise ConfigError(
            f"{type(model).__name__} has no vocabulary: say what it is called with, trace_memory(…, inputs={{name: tensor}})."
        )
    ids = (torch.arange(batch_size * seq_len) % max(1, vocabulary - 3) + 2).clamp_max(vocabulary - 1).view(batch_size, seq_len)
    return {"input_ids": ids, "labels": ids}


def _forward(model: Any, given: dict[str, Tensor], precision: str, *, chunked: bool) -> Callable[[], Tensor]:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    cast = (lambda: torch.autocast("cpu", dtype)) if dtype else nullcontext
    if chunked and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) and hasattr(model, "get_output_embeddings"):
        vars(model).setdefault(PROBED, True)  # there are no values to probe with
    else:
        chunked = False

    def forward() -> Tensor:
        with cast():
            if chunked:
                return loss_sum(model, given["input_ids"], given["labels"]) / max(1, int((given["labels"] != IGNORE).sum()))
            out = model(**given)
            own = getattr(out, "loss", None)
            first = (
                out if isinstance(out, Tensor) else own if own is not None else next(iter(out.values() if hasattr(out, "values") else out))
            )
            return first if own is not None else first.float().sum()

    return forward


def _report(what: str, ledger: Ledger, start: int, assumptions: tuple[str, ...]) -> Estimate:
    course = ledger.course(start)
    best = max(range(len(course)), key=lambda i: sum(course[i][1].values()))
    parts = course[best][1]
    order = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "workspace", "KV cache")
    formula = dict.fromkeys(order, "counted from the run") | {"workspace": "made and gone within the step: counted from the run"}
    points = tuple(_thinned(course))
    return Estimate(
        what,
        {name: parts[name] for name in order if parts.get(name)},
        {name: formula[name] for name in order if parts.get(name)},
        assumptions,
        points,
        ledger.modules_at(start + best),
    )


def _thinned(course: list[tuple[str, dict[str, int]]]) -> Iterator[tuple[str, dict[str, int]]]:
    """The highest of each stretch, so that no peak is lost."""
    stretch = max(1, -(-len(course) // POINTS))
    for at in range(0, len(course), stretch):
        yield max(course[at : at + stretch], key=lambda point: sum(point[1].values()))


def _assumptions(precision: str, config: Config) -> tuple[str, ...]:
    said = [
        "the model's own code, run on tensors without content, as on a CPU: a GPU's kernels may keep less for dropout and attention",
        "code that asks for a value of a tensor hears 0, or False",
        "the memory inside of a kernel is not seen, nor what the allocator loses by fragments, nor a CUDA context",
    ]
    if config is not None:
        said += [f"the second of two steps; products in {precision}; every token has a label"]
    return tuple(said)


def _name(model_or_id: object, model: nn.Module) -> str:
    own = getattr(getattr(model, "config", None), "_name_or_path", "")
    return str(model_or_id) if isinstance(model_or_id, str | Path) else own or type(model).__name__


def _method(config: Config) -> str:
    if isinstance(config, LoraConfig | BottleneckConfig):
        return method_name(config)
    return {"full": "full fine-tuning", "attached": "as it is", None: "generation"}[config]


def _sizes(given: Mapping[str, Tensor]) -> str:
    if "input_ids" in given:
        rows, length = given["input_ids"].shape
        return f"{rows} × {length:,} tokens"
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in given.items())
