"""A training step, or generation, as moments: what is there at each, part by part. The largest of them is the peak.

weights + adapters + optimizer                                       all the time
+ activations kept so far + the loss's own                           while the loss is computed
+ activations + what the last block's backward needs                 when the backward pass starts
+ gradients of the blocks behind + activations of those before       on the way
+ all gradients                                                      when the optimizer steps
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from lora_nb.configs import BottleneckConfig, LoraConfig
from lora_nb.memory.block import Walk
from lora_nb.memory.kept import Adapters, Kept
from lora_nb.memory.setting import FEW, Setting, by_size, quantized_bytes
from lora_nb.memory.shapes import Linear, Stack
from lora_nb.render import format_bytes

CPU_CHUNK, GPU_CHUNK = 2**23, 2**26  # logits at once, as in training/loss.py
CONTEXT = 512 * 2**20  # of a CUDA process; 0.4 to 0.7 GB by card and driver
PART = 256  # rows of a backward pass of our own at a time on a CPU, as in layers/lora_linear.py
LITGPT_CHUNK = 128  # tokens of each text in one of litgpt's losses

Moment = dict[str, int]


@dataclass
class Step:
    """Moments by name, in order, and the formula of each part."""

    moments: dict[str, Moment] = field(default_factory=dict)
    formula: dict[str, str] = field(default_factory=dict)

    @property
    def peak(self) -> str:
        """The moment at which most is there."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    def parts(self) -> Moment:
        return {part: count for part, count in self.moments[self.peak].items() if count}


@dataclass(frozen=True)
class Run:
    """Like blocks in a row: bytes that each keeps, and at most needs beside while its backward runs."""

    kept: int
    needs: int
    count: int
    text: str


def measure(setting: Setting) -> Step:
    """Every moment of the step, or of generation where nothing trains."""
    step = Step()
    always = _always(setting, step)
    if setting.config is None:
        _generate(setting, step, always)
    else:
        _train(setting, step, always)
    return step


# What is there all the time


def _always(s: Setting, step: Step) -> Moment:
    weights, step.formula["weights"] = weights_of(s)
    trainable = s.trainable()
    always = {"weights": weights}
    own = not (s.everything or s.config is None)
    if own:
        always["adapters"] = s.way.adapter * sum(trainable)
        step.formula["adapters"] = f"{sum(trainable):,} parameters × {s.way.adapter} B"
    if s.config is not None:
        size = s.way.adapter if own else s.element
        always["optimizer"], step.formula["optimizer"] = optimizer_of(s.optimizer, trainable, size)
    if s.device == "cuda":
        always["CUDA context"] = CONTEXT
        step.formula["CUDA context"] = f"{format_bytes(CONTEXT)}: kernels and handles, by card and driver 0.4 to 0.7 GB"
    return always


def weights_of(s: Setting) -> tuple[int, str]:
    """Bytes of the base, and how they are found."""
    quantized, shape = s.quantized(), s.shape
    plain = shape.parameters - sum(linear.parameters for linear in quantized.values())
    text = f"{plain:,} parameters × {s.element} B"
    if s.quant is None:
        return plain * s.element, text
    packed = sum(count * quantized_bytes(Linear("", *size), s.quant, s.element) for size, count in by_size(quantized).items())
    bits = 8 * packed / sum(linear.parameters for linear in quantized.values())
    more = f"{sum(linear.parameters for linear in quantized.values()):,} × {bits:.3f} bit ({s.quant.quant_type}, scales included)"
    return plain * s.element + packed, f"{more} + {text}"


def optimizer_of(name: str, tensors: list[int], size: int) -> tuple[int, str]:
    """Bytes of state for tensors of so many numbers, whose own type has `size` bytes."""
    n = sum(tensors)
    if name == "sgd":
        return 0, "none"
    if "8bit" in name:  # bitsandbytes: two bytes a parameter and a scale for 256; small tensors in 32 bits
        return sum(8 * t if t < 4096 else 2 * t + 8 * math.ceil(t / 256) for t in tensors), f"{n:,} × 2 moments × 1 B, with scales"
    each = 4 if name.startswith("paged") else size
    return 2 * each * n, f"{n:,} × 2 moments × {each} B"


# Training


def runs_of(s: Setting) -> list[Run]:
    """Runs of like blocks, from the first to the last."""
    flows = s.everything or _embedding_trains(s)
    found: list[Run] = []
    for stack, adapters, count in s.blocks():
        for times in (1, count - 1) if count > 1 and not flows else (count,):
            run, flows = _run(s, stack, adapters, times, flows=flows)
            found.append(run)
    return found


def _embedding_trains(s: Setting) -> bool:
    return any(path.rsplit(".", 1)[-1] in {"embed_tokens", "wte", "word_embeddings", "embed_in", "shared"} for path in s.ranks)


def _run(s: Setting, stack: Stack, adapters: Adapters, count: int, *, flows: bool) -> tuple[Run, bool]:
    walk = Walk(s.shape, stack, s.way, adapters, flows=flows, attention=s.attention, sizes=s.sizes, many=s.tokens >= FEW)
    out = walk.run()
    kept = round(walk.kept.per_token(s.sizes) * s.tokens) + walk.kept.fixed
    return Run(kept, _needs(s, walk, stack), count, _text(walk.kept)), out


def _text(kept: Kept) -> str:
    fixed = f" + effective weights {format_bytes(kept.fixed)}" if kept.fixed else ""
    return kept.text() + fixed


def _needs(s: Setting, walk: Walk, stack: Stack) -> int:
    """Most of what a block's backward holds beside what was kept: in the MLP, in the attention's scores, or when it is computed again."""
    e, f, h = s.element, s.shape.inner * s.shape.experts[1], s.shape.width
    last, kept = stack.linears[-1], walk.kept.per_token(s.sizes)
    adapted = walk.ranks.get(last.path, 0)
    own = s.way.summed and not walk.adapters.slow
    part = min(1.0, PART / s.tokens) if s.device == "cpu" else 1.0  # of the rows at a time
    if walk.fuses_mlp:
        mlp: float = max(e * (h + 2 * f) + 2 * e * f * part, e * 2 * (h + f))
    elif adapted and s.way.converts and not own:
        mlp = e * h + s.way.adapter * f  # under autocast, too, the input's gradient is in the adapter's type for a moment
    elif adapted or walk.adapters.everything:  # its input and its effective weight are gone by the time of the second moment
        gone = 4 * last.inputs * last.outputs / s.tokens if walk.kept.fixed else 0
        # `Update` of layers/lora_linear.py: x and g in the adapter's type, what it adds to ∂L/∂x in that and in x's.
        update = (s.way.adapter * (last.outputs + 2 * last.inputs) + e * last.inputs) * part if adapted and s.way.converts else 0
        if walk.adapters.four_bits:  # `LoraProduct16` adds in place, unless what it adds has gaps: that, and the mask
            update = 2 * e * last.inputs if walk.adapters.dropout else 0
        mlp = max(e * (h + f) + update, e * (h + 2 * f) - gone)
    else:
        mlp = e * (h + (3 if s.shape.gated else 2) * f)
    largest = max((linear.inputs * linear.outputs for linear in stack.linears), default=0) if s.quant is not None else 0
    return round(max(mlp, walk.scores_high + e * h - kept, walk.forward_high - kept) * s.tokens) + e * largest


def _train(s: Setting, step: Step, always: Moment) -> None:
    runs, tail = runs_of(s), _tail(s)
    trainable = s.trainable()
    gradients = sum(trainable) * (s.element if s.everything else s.way.adapter)
    held = gradients if s.gradient_accumulation_steps > 1 else 0
    e, width = s.element, s.shape.width
    layers = sum(run.count for run in runs)
    inputs = e * width * s.tokens if s.gradient_checkpointing else 0  # each block's input
    kept = layers * inputs if inputs else sum(run.kept * run.count for run in runs)
    loss, stays, step.formula["logits"] = loss_of(s)
    head = _head_gradient(s)

    def moment(**parts: int) -> Moment:
        return {**always, **{name.replace("_", " "): count for name, count in parts.items() if count}}

    step.moments["before the step"] = moment(gradients=held)
    step.moments["loss"] = moment(gradients=held, activations=kept + tail, logits=loss)
    left = kept
    for i, run in enumerate(reversed(runs)):  # the last block's backward first
        each = inputs or run.kept
        for at, before in (("", left), (" ending", left - (run.count - 1) * each)):
            grown = held or round(gradients * (1 - before / kept if kept else 1))
            parts = {"gradients": grown, "activations": before + (run.kept if inputs else 0), "workspace": run.needs}
            step.moments[f"backward of run {i + 1}{at}"] = moment(**parts, logits=stays if not i and not at else 0)
        left -= run.count * each
    step.moments["backward, end"] = moment(gradients=gradients, workspace=head)
    step.moments["optimizer"] = moment(gradients=gradients)
    step.formula["gradients"] = f"{sum(trainable):,} × {s.element if s.everything else s.way.adapter} B, freed after each step"
    step.formula["activations"] = _activations_text(s, runs, inputs)
    step.formula["workspace"] = "gradients of activations while one block's backward runs" + (
        ", and one layer's weight in full" if s.quant is not None else ""
    )


def _tail(s: Setting) -> int:
    """What the last norm keeps."""
    kind, e = s.shape.norm, s.element
    each = (e if kind == "layer" else 4) + (e if s.everything else 0)
    if s.shape.head.path in s.ranks and s.framework == "litgpt":
        each += e + s.way.mask
    return each * s.shape.width * s.tokens if s.shape.order != "post" else 0


def _head_gradient(s: Setting) -> int:
    """Of a tied weight two gradients exist before they are one."""
    return s.element * s.shape.vocabulary * s.shape.width if s.everything else 0


def _activations_text(s: Setting, runs: list[Run], inputs: int) -> str:
    """The run that most blocks belong to, and where blocks are computed again, what of it is there at once."""
    most = max(runs, key=lambda run: run.count)
    letters = ", ".join(f"{name} = {count:,}" for name, count in s.sizes.items() if name and name in most.text)
    one = f"{s.tokens:,} tokens × ({most.text}) bytes with {letters}"
    layers = sum(run.count for run in runs)
    if inputs:
        return f"{layers} × {s.tokens:,} tokens × {s.element}h of inputs + one block: {one}"
    first = f"; the first of {layers} keeps less, as nothing trains below it" if len(runs) > 1 else ""
    return f"{most.count} blocks × {one}{first}"


def loss_of(s: Setting) -> tuple[int, int, str]:
    """Bytes while the loss is computed, what of them is still there when the backward of the blocks starts, and the formula."""
    vocabulary = s.shape.vocabulary
    if s.loss == "full" and s.framework == "litgpt":
        return _litgpt_loss(s)
    if s.loss == "full":
        return 12 * vocabulary * s.tokens, 0, f"{s.tokens:,} tokens × {vocabulary:,} × 3 × 4 B: log-probabilities and two gradients in fp32"
    return _chunked(s)


def _litgpt_loss(s: Setting) -> tuple[int, int, str]:
    """All logits, which Fabric converts to fp32, and the logarithm of each; where the head trains, a gradient of all, too."""
    logits, pieces = 4 * s.shape.vocabulary, 3 if s.everything else 2
    capped = s.element * s.shape.vocabulary * s.tokens * s.shape.logit_cap
    chunk = 0 if s.everything else 2 * logits * min(s.seq_len, LITGPT_CHUNK) * s.batch_size
    text = f"{s.tokens:,} tokens × {s.shape.vocabulary:,} × {pieces} × 4 B: logits, their logarithms"
    text += f" and the gradient of {LITGPT_CHUNK} tokens of each text" if chunk else " and their gradient"
    return pieces * logits * s.tokens + chunk + capped, logits * s.tokens, text


def _chunked(s: Setting) -> tuple[int, int, str]:
    """training/loss.py: some logits at a time, and ∂L/∂x of all tokens."""
    vocabulary, e, width = s.shape.vocabulary, s.element, s.shape.width
    labelled = s.batch_size * max(1, s.seq_len - 1)
    chunks = max(1, math.ceil(labelled * vocabulary / (CPU_CHUNK if s.device == "cpu" else GPU_CHUNK)))
    logits = vocabulary * math.ceil(labelled / chunks)
    before = (4 if e == 4 else 2) if chunks > 1 else 0  # the gradient of the chunk before is still there
    now = 4 if e == 4 else 6
    each = max(before + now, before + 12 if s.shape.logit_cap else 0)
    if s.device == "cuda":  # one kernel, layers/cross_entropy_triton.py, which works in the logits' own memory
        each = before + e
    hidden = 2 * e * width * labelled
    weight = (4 + (e if e != 4 else 0)) * vocabulary * width if s.everything else 0
    text = f"{logits // vocabulary:,} tokens × {vocabulary:,} × {each} B, {chunks} such chunks, + hidden states and their gradient 2 × {e}h"
    if weight:
        text += " + the head's gradient in fp32"
    kept = e * (width * labelled + (2 * vocabulary * width if s.everything else 0))
    return each * logits + hidden + weight, kept, text


# Generation


def _generate(s: Setting, step: Step, always: Moment) -> None:
    shape, e = s.shape, s.element
    cache = 2 * shape.keys * shape.layers * s.tokens * e if shape.causal else 0
    inner = shape.inner * shape.experts[1]
    scores = (4 + e) * s.sizes["s·a"] if s.attention == "eager" else 0
    work = round(max(e * (2 * shape.width + (3 if shape.gated else 2) * inner), e * 3 * shape.queries + scores) * s.tokens)
    if s.quant is not None:
        work += e * max(linear.inputs * linear.outputs for linear in s.quantized().values())
    rows = s.batch_size if shape.causal else s.tokens
    step.moments["the model alone"] = always
    step.moments["prefill"] = {**always, "KV cache": cache, "workspace": work}
    step.moments["next token"] = {**always, "KV cache": cache, "logits": rows * shape.vocabulary * (e + 4)}
    step.formula["KV cache"] = f"{shape.layers} layers × {s.tokens:,} tokens × 2 × {shape.keys:,} × {e} B"
    step.formula["workspace"] = "one block's activations over the prompt, none of them kept"
    step.formula["logits"] = f"{rows:,} rows × {shape.vocabulary:,} × ({e} + 4) B"


def assumptions(s: Setting) -> Iterator[str]:
    """What the numbers rest on, said aloud."""
    names = {"lora_nb": "this package's own", "peft": "Hugging Face PEFT's", "litgpt": "litgpt's"}
    yield f"{s.shape.name}: {s.shape.parameters:,} parameters, weights and activations in {str(s.dtype).removeprefix('torch.')}"
    if s.config is not None:
        yield f"products in {s.precision} by autocast" if s.precision != "fp32" else "products in the type of the weights"
        yield f"{names[s.framework]} layers and loop; every text has {s.seq_len:,} tokens, all of them with a label"
        yield "gradients are freed after each step" if s.gradient_accumulation_steps == 1 else "gradients stay from forward to forward"
        if isinstance(s.config, LoraConfig | BottleneckConfig):
            yield f"adapters in {'the type of the weights' if s.way.adapter == s.element else 'fp32'}"
    yield {
        "flash": "attention by a fused kernel",
        "eager": "attention written out: probabilities of all pairs of tokens",
        "math": "attention by PyTorch's plain operations in fp32",
    }[s.attention]
    if s.config is not None and s.shape.dropouts[1] and s.attention == "flash" and not s.way.flash:
        yield "with dropout in the attention a CPU has no fused kernel: its probabilities are kept in fp32"
    yield from [
        "of a layer in 4 bits with LoRA, its input as it came and x Aᵀ are kept; a dropout's mask is drawn again"
    ] * s.over_four_bits
    if s.quant is not None:
        yield "embeddings, norms" + (" and the output head" if s.quant.skip_head else "") + " stay in the weights' own type"
        if s.shape.experts != (1, 1):
            yield "weights of experts lie in one parameter, which is no linear layer: they are not quantized"
    if s.config is None and s.shape.causal:
        yield "the cache holds every token of every layer, also where a layer looks at a window only"
    if s.framework == "litgpt" and s.shape.head.bias is False:
        yield "litgpt keeps an output head of its own, also where the model ties it to the embedding"
    if s.optimizer.startswith("paged"):
        yield "paged state is counted whole; when the GPU is full, it moves to the CPU's memory"
    if s.device == "cuda":
        yield "the allocator's own loss, 2 to 10 % by fragments, is not in the total; fits() leaves 5 % for it"
