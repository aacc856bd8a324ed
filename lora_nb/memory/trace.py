"""Memory from a run of the real model code without weights: tensors have shapes and storages of no content (PyTorch's fake tensors).

Only weights are fake, and what is computed from them. Token ids, positions and labels are real, so code that looks at
them takes the path that it takes in earnest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_nb.attach import attach
from lora_nb.blocks import IGNORE
from lora_nb.configs import BottleneckConfig, LoraConfig
from lora_nb.errors import BaseModelError, ConfigError, TraceError, nearest
from lora_nb.fusing import fused
from lora_nb.memory.estimate import known_shapes
from lora_nb.memory.ledger import Blank, Ledger, on_meta, without_values
from lora_nb.memory.report import Estimate
from lora_nb.memory.setting import DTYPES, MOST
from lora_nb.training.loss import PROBED, loss_sum
from lora_nb.training.modes import checkpointing

Config = LoraConfig | BottleneckConfig | Literal["full", "attached"] | None
CHOICES = {"optimizer": ("adamw", "sgd"), "loss": ("chunked", "full"), "precision": ("fp32", "bf16", "fp16")}
POINTS = 240  # of the course over the step


@dataclass(frozen=True)
class Plan:
    """What to run: `forward` gives the loss; a step is `accumulate` of them, backward, and the optimizer's."""

    model: nn.Module
    forward: Callable[[], Tensor]
    optimizer: str
    accumulate: int
    checkpoint: bool
    fuse: bool


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
    model = _skeleton(model_or_id, dtype)
    if isinstance(config, LoraConfig | BottleneckConfig):
        with Blank():
            attach(model, config)
    elif config in {"full", None}:
        model.requires_grad_(requires_grad=config == "full")
    elif config != "attached":
        raise ConfigError(f"trace_memory(config={config!r}): give a LoraConfig, a BottleneckConfig, 'full', 'attached' or None.")
    model = _fake(model)
    given = dict(inputs) if inputs is not None else _tokens(model, batch_size, seq_len)
    forward = _forward(model, given, precision, chunked=loss == "chunked" and inputs is None)
    plan = Plan(model, forward, optimizer, gradient_accumulation_steps, gradient_checkpointing, loss == "chunked")
    with torch.random.fork_rng(), _explained(model):  # dropout on real tensors draws
        ledger, start = _generate(model, given) if config is None else _train(plan)
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


# The model without its weights


def _skeleton(model_or_id: object, dtype: torch.dtype | str | None) -> nn.Module:
    """A copy on the meta device."""
    kind = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if isinstance(dtype, str) and kind is None:
        raise ConfigError(f"trace_memory(dtype={dtype!r}) is not known." + nearest(dtype, DTYPES))
    if isinstance(model_or_id, nn.Module):
        copied = without_values(model_or_id, on_meta)
        return copied if kind is None else copied.to(kind)
    from transformers import AutoConfig, PretrainedConfig

    config: Any = model_or_id
    if isinstance(model_or_id, str | Path):
        name = str(model_or_id)
        known = {n.rsplit("/", 1)[-1].lower(): n for n in known_shapes()}
        numbers = known_shapes().get(name) or known_shapes().get(known.get(name.lower(), ""))
        try:
            config = _made(numbers) if numbers else AutoConfig.from_pretrained(_folder(name))
        except (OSError, ValueError) as error:
            raise BaseModelError(
                f"trace_memory knows no model {name!r}: {type(error).__name__}." + nearest(name, known_shapes())
            ) from error
    elif isinstance(model_or_id, Mapping):
        config = _made(model_or_id)
    if not isinstance(config, PretrainedConfig):
        raise ConfigError(
            f"trace_memory cannot read a {type(model_or_id).__name__}: give a model, a config of transformers, a folder or an id."
        )
    return _from_config(config, kind or torch.float32)


def _folder(name: str) -> str:
    from lora_nb.bases import EMBEDDED

    return str(EMBEDDED.get(name, name))


def _made(numbers: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    kind = numbers.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ConfigError(f"transformers has no architecture {kind!r}." + nearest(str(kind), CONFIG_MAPPING))
    return CONFIG_MAPPING[kind](**{"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, **numbers})


def _from_config(config: Any, dtype: torch.dtype) -> nn.Module:
    """The class that the config names, else the first of some heads that transformers has for such a config."""
    import transformers

    named = next(iter(config.architectures or ()), "")
    with torch.device("meta"):
        if hasattr(transformers, named):
            return getattr(transformers, named)._from_config(config, dtype=dtype)  # type: ignore[no-any-return]  # noqa: SLF001
        for kind in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel"):
            auto = getattr(transformers, kind)
            encoder = config.model_type in {"bert", "roberta", "electra", "distilbert"}
            if type(config) in auto._model_mapping and not (encoder and kind == "AutoModelForCausalLM"):  # noqa: SLF001
                return auto.from_config(config, dtype=dtype)  # type: ignore[no-any-return]
    raise ConfigError(f"transformers has no model for a {type(config).__name__}.")


def _fake(model: nn.Module) -> nn.Module:
    """The same with fake tensors on the CPU, as its code is to believe."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def make(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    return without_values(model, make)


def _tokens(model: Any, batch_size: int, seq_len: int) -> dict[str, Tensor]:
    """Ids and labels, all of which count."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise ConfigError(
            f"{type(model).__name__} has no vocabulary: say what it is called with, trace_memory(…, inputs={{name: tensor}})."
        )
    ids = (torch.arange(batch_size * seq_len) % max(1, vocabulary - 3) + 2).clamp_max(vocabulary - 1).view(batch_size, seq_len)
    return {"input_ids": ids, "labels": ids}


# The step


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


def _train(plan: Plan) -> tuple[Ledger, int]:
    """Two steps, since the first has no optimizer state yet; the ledger, and where in it the second starts."""
    model, ledger = plan.model.train(), Ledger(plan.model)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ConfigError("Nothing in the model trains: give trace_memory a config, or a model with adapters and config='attached'.")
    start = 0
    blocks = fused(model) if plan.fuse else nullcontext()
    with checkpointing(model, wanted=plan.checkpoint), blocks, ledger.following(), ledger:
        _note_weights(ledger, model)
        made = torch.optim.AdamW(trained, lr=1e-3, fused=True) if plan.optimizer == "adamw" else torch.optim.SGD(trained, lr=1e-3)
        for turn in range(2):
            start = len(ledger.events) if turn else 0
            for _ in range(plan.accumulate):
                _pass(ledger, model, plan.forward)
            for p in trained:
                if p.grad is not None:
                    ledger.call(p.grad, "gradients")
            ledger.phase = "optimizer"
            nn.utils.clip_grad_norm_(trained, 1.0)
            made.step()
            for state in made.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        ledger.call(value, "optimizer")
            made.zero_grad(set_to_none=True)
    return ledger, start


def _pass(ledger: Ledger, model: nn.Module, forward: Callable[[], Tensor]) -> None:
    """Forward and backward, and what they made by what it was for."""
    first = len(ledger.entries)
    ledger.phase = "forward"
    value = forward()
    kept = {id(entry) for entry in ledger.alive()}
    ledger.phase = "backward"
    value.backward()  # type: ignore[no-untyped-call]
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    for entry in ledger.entries[first:]:
        again = entry.phase == "backward" and entry.forward
        held = again or (entry.phase == "forward" and id(entry) in kept)
        entry.part = "logits" if entry.width == vocabulary else "activations" if held else "workspace"


def _note_weights(ledger: Ledger, model: nn.Module) -> None:
    adapted = {id(p) for n, p in model.named_parameters() if ".adapters." in n or ".lora_" in n or "lora_A" in n or "lora_B" in n}
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.note(tensor, "adapters" if id(tensor) in adapted else "weights")


@torch.no_grad()
def _generate(model: Any, given: dict[str, Tensor]) -> tuple[Ledger, int]:
    """The prompt, then one token."""
    model.eval()
    ledger = Ledger(model)
    given = {name: value for name, value in given.items() if name != "labels"}
    with ledger.following(), ledger:
        _note_weights(ledger, model)
        start = len(ledger.events)
        ledger.phase = "prefill"
        more = {"use_cache": True, "logits_to_keep": 1} if type(model).__name__.endswith("ForCausalLM") else {}
        out = model(**given, **more)
        cache = getattr(out, "past_key_values", None)
        _note_cache(ledger, cache)
        if more and cache is not None:
            del out
            ledger.phase = "next token"
            out = model(given["input_ids"][:, :1], past_key_values=cache, use_cache=True)
            _note_cache(ledger, cache)
        for entry in ledger.entries:
            entry.part = entry.part or "workspace"
    return ledger, start


def _note_cache(ledger: Ledger, cache: Any) -> None:
    for layer in getattr(cache, "layers", ()):
        for tensor in (layer.keys, layer.values):
            if isinstance(tensor, Tensor):
                ledger.call(tensor, "KV cache")


# What comes of it


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
    if isinstance(config, LoraConfig):
        return f"{'DoRA' if config.use_dora else 'LoRA'} r={config.r}"
    names = {"full": "full fine-tuning", "attached": "as it is", None: "generation"}
    return "bottleneck adapters" if isinstance(config, BottleneckConfig) else names[config]


def _sizes(given: Mapping[str, Tensor]) -> str:
    if "input_ids" in given:
        rows, length = given["input_ids"].shape
        return f"{rows} × {length:,} tokens"
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in given.items())
