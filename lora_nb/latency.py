"""What a variant of a model costs at inference, timed fairly: variants interleaved, warmed up, synchronised, in ratios of one round.

Reading a prompt (prefill) and writing a token (decode) are different work: the first multiplies matrices and is bound by
arithmetic, the second multiplies matrices by a few vectors and is bound by memory and, in small models, by the number of
operations that have to be started. So each is measured by itself, and the operations are counted beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_nb.configs.checks import is_count
from lora_nb.errors import LatencyError, nearest
from lora_nb.operations import count_launches, count_operations
from lora_nb.render import html_table, text_table
from lora_nb.timing import Times, interleaved

__all__ = ["LatencySweep", "LatencyTable", "Times", "interleaved", "measure_latency", "sweep_latency"]

Phase = Literal["prefill", "decode"]
PHASES = ("prefill", "decode")
COLUMNS = ["variant", "milliseconds", "over {}", "middle half", "operations", "GFLOP"]
SAME = 1.03  # over the reference: less cannot be told from it on an ordinary machine


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of one forward by variant (median), their ratios to the reference, and the middle half of these ratios.

    `operations` counts what is computed in one forward, views left out; `flops` its multiplications and additions as torch counts
    them; `launches`, on a CUDA GPU only, the kernels that it starts.
    """

    phase: str
    batch_size: int
    seq_len: int
    reference: str
    seconds: dict[str, float]
    ratios: dict[str, float]
    spread: dict[str, tuple[float, float]]
    operations: dict[str, int]
    flops: dict[str, int]
    launches: dict[str, int]

    @property
    def title(self) -> str:
        """What was timed."""
        rows, tokens = f"batch of {self.batch_size}", f"{self.seq_len} token{'s' * (self.seq_len > 1)}"
        return f"prefill of {tokens}, {rows}" if self.phase == "prefill" else f"one more token after {tokens}, {rows}"

    def _header(self) -> list[str]:
        return [c.format(self.reference) for c in COLUMNS] + ["kernels"] * bool(self.launches)

    def _rows(self) -> list[tuple[str | int, ...]]:
        return [
            (
                name,
                f"{seconds * 1e3:.3g}",
                f"{self.ratios[name]:.3f}",
                "{:.3f} to {:.3f}".format(*self.spread[name]),
                self.operations[name],
                f"{self.flops[name] / 1e9:.3g}",
                *([self.launches[name]] if self.launches else []),
            )
            for name, seconds in self.seconds.items()
        ]

    def __repr__(self) -> str:
        return self.title + "\n" + text_table(self._header(), self._rows())

    def _repr_html_(self) -> str:
        return html_table(self._header(), self._rows(), self.title)


@dataclass(frozen=True)
class LatencySweep:
    """Tables over batch sizes and lengths, in the order of measuring."""

    tables: tuple[LatencyTable, ...]

    def free_from(self, variant: str, within: float = SAME) -> dict[int, int | None]:
        """Length → the batch size from which on the variant stays within `within` of the reference; None where it never does."""
        if variant not in self.tables[0].ratios:
            raise LatencyError(f"{variant!r} was not measured." + nearest(variant, self.tables[0].ratios))
        found: dict[int, int | None] = {}
        for table in sorted(self.tables, key=lambda t: -t.batch_size):
            first = found.setdefault(table.seq_len, None)
            larger = [t for t in self.tables if t.seq_len == table.seq_len and t.batch_size > table.batch_size]
            if table.ratios[variant] <= within and (not larger or first == min(t.batch_size for t in larger)):
                found[table.seq_len] = table.batch_size
        return dict(sorted(found.items()))

    def _title(self) -> str:
        return f"{self.tables[0].phase}: time over {self.tables[0].reference}, median and middle half"

    def _header(self) -> list[str]:
        return ["batch", "tokens", *self.tables[0].seconds]

    def _rows(self) -> list[tuple[str | int, ...]]:
        return [
            (t.batch_size, t.seq_len, *("{:.3f} ({:.3f} to {:.3f})".format(t.ratios[n], *t.spread[n]) for n in t.seconds))
            for t in self.tables
        ]

    def __repr__(self) -> str:
        return self._title() + "\n" + text_table(self._header(), self._rows())

    def _repr_html_(self) -> str:
        return html_table(self._header(), self._rows(), self._title())


def measure_latency(
    variants: Mapping[str, nn.Module],
    *,
    phase: Phase = "decode",
    batch_size: int = 1,
    seq_len: int = 64,
    rounds: int = 30,
    reference: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> LatencyTable:
    """Time one forward of each variant; `variants(model, …)` makes the usual ones, and any causal language model can be one.

    Args:
        variants: name → a model. One model in other states is given as several models.
        phase: `"prefill"` reads `seq_len` tokens at once; `"decode"` reads one after `seq_len` that are in the cache.
        rounds: each runs every variant, from another starting point; ratios are taken within a round.
        reference: the variant that ratios are over. Default: the first.
        clock: seconds; with one thread on a machine that is busy otherwise, `time.process_time` counts only what this process took.

    Raises:
        LatencyError: no variants, an unknown phase or reference, sizes that cannot be, or a model that does not write token by token.
    """
    chosen = _checked(variants, phase, reference, batch_size=batch_size, seq_len=seq_len, rounds=rounds)
    device = next(next(iter(variants.values())).parameters()).device
    with _evaluating(variants):
        runs = {name: _forward(name, model, phase, batch_size, seq_len) for name, model in variants.items()}
        counts = {name: count_operations(run) for name, run in runs.items()}
        launches = {name: count_launches(run) for name, run in runs.items()} if device.type == "cuda" else {}
        with torch.inference_mode():
            wait = torch.cuda.synchronize if device.type == "cuda" else None
            times = interleaved(runs, rounds=rounds, repeat=4 if phase == "decode" else 1, settle=1, synchronise=wait, clock=clock)
    return LatencyTable(
        phase,
        batch_size,
        seq_len,
        chosen,
        {name: times.median(name) for name in runs},
        {name: times.ratio(name, chosen) for name in runs},
        {name: times.spread(name, chosen) for name in runs},
        {name: operations for name, (operations, _) in counts.items()},
        {name: flops for name, (_, flops) in counts.items()},
        launches,
    )


def sweep_latency(
    variants: Mapping[str, nn.Module],
    *,
    phase: Phase = "decode",
    batch_sizes: Sequence[int] = (1, 2, 4, 8, 16),
    seq_lens: Sequence[int] = (64,),
    rounds: int = 30,
    reference: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> LatencySweep:
    """`measure_latency` for each length and batch size.

    Raises:
        LatencyError: as there, for any of the sizes, before anything is measured; or no sizes.
    """
    if not batch_sizes or not seq_lens:
        raise LatencyError("A sweep needs at least one batch size and one length.")
    sizes = [(b, n) for n in seq_lens for b in batch_sizes]
    for b, n in sizes:
        _checked(variants, phase, reference, batch_size=b, seq_len=n, rounds=rounds)
    settings: dict[str, Any] = {"phase": phase, "rounds": rounds, "reference": reference, "clock": clock}
    tables = [measure_latency(variants, batch_size=b, seq_len=n, **settings) for b, n in sizes]
    return LatencySweep(tuple(tables))


def _checked(variants: Mapping[str, nn.Module], phase: str, reference: str | None, **counts: int) -> str:
    """The reference's name; `counts` are the sizes by name."""
    if not isinstance(variants, Mapping) or not variants:
        raise LatencyError(
            f"measure_latency needs a dict of name to model, with at least one, not {type(variants).__name__} {variants!r:.60}."
        )
    if phase not in PHASES:
        raise LatencyError(f"phase={phase!r} is not known." + nearest(str(phase), PHASES))
    for name, value in counts.items():
        if not is_count(value):
            raise LatencyError(f"{name}={value!r} must be a whole number of at least 1.")
    if reference is not None and reference not in variants:
        raise LatencyError(f"reference={reference!r} is none of the variants." + nearest(str(reference), variants))
    for name, model in variants.items():
        most = getattr(_text_config(name, model), "max_position_embeddings", None)
        if most is not None and counts["seq_len"] + (phase == "decode") > most:
            raise LatencyError(f"{name!r} reads at most {most} tokens: seq_len={counts['seq_len']} is too long for {phase}.")
    if len({str(next(m.parameters()).device) for m in variants.values()}) > 1:
        raise LatencyError("The variants are on different devices, so their times say nothing of each other: bring them to one.")
    return reference if reference is not None else next(iter(variants))


def _text_config(name: str, model: nn.Module) -> Any:
    """Of a language model within a larger one, the language model's."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not isinstance(model, nn.Module) or not is_count(getattr(config, "vocab_size", None)):
        raise LatencyError(
            f"{name!r} is a {type(model).__name__}, not a language model of transformers: it has no config with a vocab_size."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise LatencyError(f"{name!r} is an encoder and a decoder; what can be timed are models that go on with the text they read.")
    return config


@contextmanager
def _evaluating(variants: Mapping[str, nn.Module]) -> Iterator[None]:
    """Without dropout; each model's mode is put back."""
    modes = {m: m.training for m in variants.values()}
    try:
        for m in modes:
            m.eval()
        yield
    finally:
        for m, training in modes.items():
            m.train(training)


def _forward(name: str, model: nn.Module, phase: str, batch_size: int, seq_len: int) -> Callable[[], object]:
    """One forward; after a decoded token the cache is as long as before."""
    call: Any = model
    ids = _ids(model, int(_text_config(name, model).vocab_size), batch_size, seq_len)
    if phase == "prefill":
        return lambda: call(input_ids=ids, use_cache=False)
    with torch.no_grad():
        cache = getattr(call(input_ids=ids, use_cache=True), "past_key_values", None)
    if cache is None:
        raise LatencyError(f"{name!r} keeps no cache, so it does not write token by token: measure it with phase='prefill'.")

    def step() -> None:
        call(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def _ids(model: nn.Module, vocabulary: int, batch_size: int, seq_len: int) -> Tensor:
    """Tokens from all over the vocabulary, (batch, seq)."""
    device = next(model.parameters()).device
    return (torch.arange(batch_size * seq_len, device=device) * 7919 % vocabulary).view(batch_size, seq_len)
