"""Verbs that answer before anything is spent: memory, latency, rank, check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from lora_nb.attach import adapters
from lora_nb.checks import check as check_answer
from lora_nb.commands.making import BOTTLENECKS, METHODS, config_of, data_names, module_names, train
from lora_nb.commands.session import Session
from lora_nb.commands.using import adapter_names, put_on
from lora_nb.configs.quant import QUANT_TYPES
from lora_nb.errors import ConfigError
from lora_nb.latency import LatencyTable, measure_latency
from lora_nb.memory.estimate import estimate, known_shapes
from lora_nb.memory.report import Estimate
from lora_nb.memory.trace import trace_memory
from lora_nb.rank.find import find_rank
from lora_nb.rank.report import RankReport
from lora_nb.variants import variants

USES = (*METHODS, "full", "generation")
DTYPES = ("float32", "bfloat16", "float16")


def shape_names(session: Session) -> Iterator[str]:
    """Models whose shapes are built in."""
    yield "tiny"
    yield from known_shapes()


def memory(
    session: Session,
    base: Annotated[str, "tiny, a folder, or a Hub id; no weights are needed", shape_names] = "",
    *,
    method: Annotated[str, "what is trained, or generation; default: lora", USES] = "",
    r: Annotated[int | None, "rank; default: 16"] = None,
    target_modules: Annotated[str, "names divided by commas; default: all-linear", module_names] = "",
    reduction_factor: Annotated[float | None, "width / bottleneck, for houlsby, pfeiffer and parallel"] = None,
    quant: Annotated[str, "keep the base's linear layers in 4 or 8 bits", QUANT_TYPES] = "",
    batch_size: Annotated[int, "texts in one forward"] = 1,
    seq_len: Annotated[int, "tokens of each"] = 512,
    dtype: Annotated[str, "of weights and activations", DTYPES] = "",
    gradient_checkpointing: Annotated[bool, "keep only each layer's input"] = False,
    trace: Annotated[bool, "run the model's real code without weights, instead of the formulas"] = False,
) -> Estimate:
    """Say what a training step or generation takes, part by part, and on which cards it fits."""
    named = base or session.base or "tiny"
    model = session.model if not base and session.model is not None else named
    wanted: object = {"full": "full", "generation": None}.get(method, "")
    config = wanted if wanted != "" else config_of(method=method, r=r, target_modules=target_modules, reduction_factor=reduction_factor)
    if wanted != "" and (r or target_modules or reduction_factor):
        raise ConfigError(f"--r, --target-modules and --reduction-factor say what an adapter is; {method} has none.")
    if trace:
        if quant:
            raise ConfigError("--trace runs the model's own code in 16 or 32 bits: leave --quant out, or --trace.")
        found = trace_memory(
            model,
            config,  # type: ignore[arg-type]
            batch_size=batch_size,
            seq_len=seq_len,
            dtype=dtype or None,
            gradient_checkpointing=gradient_checkpointing,
        )
    else:
        found = estimate(
            model,
            config,  # type: ignore[arg-type]
            quant=quant or None,
            batch_size=batch_size,
            seq_len=seq_len,
            dtype=dtype or None,
            gradient_checkpointing=gradient_checkpointing,
        )
    session.leave(estimate=found)
    return found


def latency(
    session: Session,
    adapter: Annotated[
        list[str], "adapters on the model or folders; default: those on the model, else one of each kind", adapter_names
    ] = (),  # type: ignore[assignment]
    *,
    base: Annotated[str, "tiny, a folder, or a Hub id; default: what is loaded, else tiny"] = "",
    phase: Annotated[str, "reading a prompt, or writing one more token", ("decode", "prefill")] = "decode",
    batch_size: Annotated[int, "rows"] = 1,
    seq_len: Annotated[int, "tokens of the prompt"] = 64,
    rounds: Annotated[int, "each runs every variant once"] = 30,
) -> LatencyTable:
    """Time the base against the same with adapters, unmerged and merged."""
    model, _ = session.open(base)
    for wanted in adapter:
        put_on(session, model, wanted)
    kinds = {name: config_of(method=name) for name in ("lora", "dora", *BOTTLENECKS)} if not adapters(model).reports else None
    table = measure_latency(variants(model, kinds), phase=phase, batch_size=batch_size, seq_len=seq_len, rounds=rounds)  # type: ignore[arg-type]
    session.leave(latency=table)
    return table


def rank(
    session: Session,
    data: Annotated[str, "train on this first; none: take the last run of this notebook", data_names] = "",
    *,
    base: Annotated[str, "tiny, a folder, or a Hub id; default: what is loaded, else tiny"] = "",
    r: Annotated[int, "the rank to train at, surely enough"] = 32,
    max_steps: Annotated[int, "optimizer steps of that run"] = 300,
    batch_size: Annotated[int, "texts or pairs in a step"] = 16,
    learning_rate: Annotated[float, "peak learning rate"] = 5e-3,
    tolerance: Annotated[float, "a loss above the lowest by no more than this share of it is as good"] = 0.005,
    polish: Annotated[int, "steps to train the adapter on that is cut to the rank found"] = 0,
) -> RankReport:
    """Find the smallest rank that is as good, from one run at a high one."""
    if data:
        train(session, data, base=base, r=r, max_steps=max_steps, batch_size=batch_size, learning_rate=learning_rate)
    if session.run is None:
        raise ConfigError("There is no run to find the rank from: name the data to train on, as in `rank tone`.")
    found = find_rank(session.run, tolerance=tolerance, polish=polish)
    session.leave(ranks=found)
    return found


def check(
    session: Session,
    exercise: Annotated[str, "number of an exercise, such as 02.1; none: is this machine ready?"] = "",
    answer: Annotated[str, "what you found: a number, or $variable"] = "",
) -> object:
    """Check the answer to an exercise, or whether this machine is ready for the course."""
    if not exercise:
        return check_answer()
    if answer == "":
        return check_answer(exercise, ...)
    return check_answer(exercise, _number(answer) if isinstance(answer, str) else answer)


def _number(text: str) -> object:
    """A number where the text is one."""
    for kind in (int, float):
        try:
            return kind(text.replace(",", ""))
        except ValueError:
            continue
    return text
