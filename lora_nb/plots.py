"""Every figure of the course: each function returns a matplotlib Figure, and none of them shows it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lora_nb.latency import SAME, LatencySweep, LatencyTable
from lora_nb.memory.cards import Card, card
from lora_nb.memory.report import Estimate
from lora_nb.rank.report import RankReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart.
BLUE, ORANGE, GREEN, PURPLE, SKY, RED, GREY = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#666666"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED, "#000000", "#f0e442")


def _figure(width: float = 6.4, height: float = 3.6) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(b=False)
    return figure, axes


def latency_ratios(table: LatencyTable) -> Figure:
    """Each variant's time over the reference's: the median as a bar, the middle half as a line across its end."""
    figure, axes = _figure(height=0.9 + 0.36 * len(table.ratios))
    names = list(table.ratios)
    for i, name in enumerate(names):
        low, high = table.spread[name]
        axes.barh(i, table.ratios[name], color=GREY if name == table.reference else BLUE)
        axes.plot([low, high], [i, i], color="black", linewidth=1.5)
        axes.text(max(high, table.ratios[name]) + 0.02, i, f"{table.ratios[name]:.2f}", va="center")
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"time over {table.reference}: median, and the middle half of the rounds")
    axes.set_title(table.title, loc="left", fontsize="medium")
    return figure


def latency_by_batch(sweep: LatencySweep) -> Figure:
    """Each variant's time over the reference's against the batch size, with the middle half as a band; one panel for each length."""
    from matplotlib.figure import Figure

    lengths = sorted({t.seq_len for t in sweep.tables})
    figure = Figure(figsize=(1.2 + 4.2 * len(lengths), 3.6), layout="constrained")
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for axes, length in zip(panels, lengths, strict=True):
        tables = sorted((t for t in sweep.tables if t.seq_len == length), key=lambda t: t.batch_size)
        batches = [t.batch_size for t in tables]
        shown = (n for n in tables[0].ratios if n != tables[0].reference)
        for name, colour, style in zip(shown, COLOURS * 9, ("o-", "s--", "^:", "D-.") * 9, strict=False):
            axes.plot(batches, [t.ratios[name] for t in tables], style, markersize=4, color=colour, label=name)
            axes.fill_between(batches, [t.spread[name][0] for t in tables], [t.spread[name][1] for t in tables], color=colour, alpha=0.15)
        axes.axhspan(2 - SAME, SAME, color=GREY, alpha=0.2)
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(b) for b in batches])
        axes.spines[["top", "right"]].set_visible(b=False)
        axes.set_xlabel("rows in the batch")
        axes.set_title(f"{tables[0].phase}, {length} tokens", loc="left", fontsize="medium")
    panels[0].set_ylabel(f"time over {sweep.tables[0].reference}")
    panels[-1].legend(frameon=False, fontsize="small")
    return figure


def loss_by_rank(report: RankReport) -> Figure:
    """Held-out loss at each rank that was tried, with the standard error of its distance to the lowest; the choice and its interval."""
    figure, axes = _figure()
    ranks = list(report.scores)
    scores = list(report.scores.values())
    axes.errorbar(ranks, [s.loss for s in scores], yerr=[s.error for s in scores], color=BLUE, marker="o", markersize=4, capsize=2)
    lowest = min(s.loss for s in scores)
    axes.axhspan(lowest, lowest * (1 + report.tolerance), color=GREY, alpha=0.2, label=f"within {report.tolerance:.1%} of the lowest")
    axes.axvspan(*report.interval, color=ORANGE, alpha=0.25, label="for other held-out examples")
    axes.axvline(report.rank, color=ORANGE, label=f"chosen: {report.rank}")
    axes.set_xscale("log", base=2)
    marks = [r for r in ranks if r & (r - 1) == 0 or r == ranks[-1]]
    axes.set_xticks(marks, [str(r) for r in marks])
    axes.set_xlabel("rank of every module")
    axes.set_ylabel("held-out loss")
    axes.set_title(f"adapter {report.name!r} cut to each rank: {report.rank} is enough", loc="left", fontsize="medium")
    axes.legend(frameon=False, fontsize="small", loc="upper right")
    return figure


def ranks_by_layer(report: RankReport) -> Figure:
    """The rank of each module: layers from left to right, kinds of module from top to bottom, the number in its cell."""
    cells = {path: _place(path) for path in report.ranks}
    kinds = list(dict.fromkeys(kind for kind, _ in cells.values()))
    numbers = sorted({layer for _, layer in cells.values()})
    figure, axes = _figure(2.2 + 0.5 * len(numbers), 0.9 + 0.36 * len(kinds))
    most = max(report.ranks.values())
    for path, (kind, layer) in cells.items():
        x, y, r = numbers.index(layer), kinds.index(kind), report.ranks[path]
        axes.fill_between([x - 0.48, x + 0.48], y - 0.46, y + 0.46, color=BLUE, alpha=0.1 + 0.8 * r / most, linewidth=0)
        axes.text(x, y, str(r), ha="center", va="center", color="white" if r > 0.55 * most else "black")
    axes.set_xticks(range(len(numbers)), [str(n) if n >= 0 else "" for n in numbers])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.invert_yaxis()
    axes.set_xlabel("layer")
    axes.set_title(f"ranks by module, {report.saving:.0%} fewer parameters than rank {report.rank} for all", loc="left", fontsize="medium")
    return figure


def _place(path: str) -> tuple[str, int]:
    """Kind of module and number of its layer (−1 outside of the layers): the first number in the path is the layer's."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    if found is None:
        return path.rsplit(".", 1)[-1], -1
    return path[found.end() :].rsplit(".", 1)[-1] or path, int(found[1])


# Parts of memory: what stays below, what comes and goes above.
PARTS = {
    "weights": BLUE,
    "adapters": SKY,
    "optimizer": PURPLE,
    "gradients": "#f0e442",
    "activations": ORANGE,
    "logits": RED,
    "workspace": "#666666",
    "KV cache": GREEN,
    "CUDA context": "#bbbbbb",
}
GB = 2**30


def memory_bars(estimates: Mapping[str, Estimate], cards: Sequence[str | Card] = ()) -> Figure:
    """One stacked bar for each estimate, part by part at its peak, with a line for what each card holds."""
    figure, axes = _figure(7.2, 2.0 + 0.42 * len(estimates))
    there = [part for part in PARTS if any(part in e.parts for e in estimates.values())]
    left = [0.0] * len(estimates)
    for part in there:
        widths = [e.parts.get(part, 0) / GB for e in estimates.values()]
        axes.barh(range(len(estimates)), widths, left=left, color=PARTS[part], label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, total in enumerate(left):
        axes.text(total, i, f" {total:.3g}", va="center")
    for found in map(card, cards):
        axes.axvline(found.bytes / GB, color="black", linewidth=0.8, linestyle=":")
        axes.text(found.bytes / GB, -0.6, f"{found.name} ", rotation=90, va="bottom", ha="right", fontsize=8)
    axes.set_yticks(range(len(estimates)), list(estimates))
    axes.invert_yaxis()
    axes.set_xlabel("GiB at the peak")
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure


def memory_course(estimate: Estimate) -> Figure:
    """What is there at each moment of the step, part by part; the marks say where forward, backward and optimizer begin."""
    figure, axes = _figure(7.2, 3.6)
    moments = estimate.timeline
    there = [part for part in PARTS if any(part in parts for _, parts in moments)]
    heights = [[parts.get(part, 0) / GB for _, parts in moments] for part in there]
    axes.stackplot(range(len(moments)), heights, colors=[PARTS[part] for part in there], labels=there)
    starts = [i for i, (name, _) in enumerate(moments) if i == 0 or name != moments[i - 1][0]]
    axes.set_xticks(starts, [moments[i][0] for i in starts], rotation=30, ha="right", fontsize=8)
    axes.set_xlim(0, max(1, len(moments) - 1))
    axes.set_ylabel("GiB")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    return figure
