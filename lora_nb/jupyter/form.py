"""The control panel's form: one widget for each setting, read as `Settings`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as w
from torch import nn

from lora_nb.datasets import BUILT_IN
from lora_nb.jupyter.settings import LOW_RANK, METHODS, QUANTS, RANKS, Settings, linear_groups

WIDE = {"description_width": "9em"}
LAYOUT = {"width": "26em"}
ALL = "all-linear"


class Form:
    """The widgets by the name of the setting that they are for."""

    def __init__(self, start: Settings) -> None:
        self.fields: dict[str, Any] = {
            "base": _field(w.Text(value=start.base), "Base", "tiny, a folder, or a Hub id"),
            "quant": _field(w.Dropdown(options=list(QUANTS), value=start.quant), "Quantization", "of the base's linear layers"),
            "method": _field(w.Dropdown(options=METHODS, value=start.method), "Method", "full trains the whole model"),
            "r": _field(w.Dropdown(options=RANKS, value=start.r), "Rank r", "of the update BA"),
            "lora_alpha": _field(w.FloatText(value=start.lora_alpha), "Alpha α", "the update counts α / r times"),
            "lora_dropout": _field(
                w.BoundedFloatText(value=start.lora_dropout, min=0, max=0.95, step=0.05), "Dropout", "of the adapter's input"
            ),
            "reduction_factor": _field(w.BoundedIntText(value=start.reduction_factor, min=1, max=1024), "Reduction", "width / bottleneck"),
            "target_modules": _field(
                w.SelectMultiple(options=[(ALL, ALL)], value=(ALL,), rows=8), "Target modules", "Ctrl or ⌘ selects several"
            ),
            "layers": _field(w.Text(value=start.layers, placeholder="all, or such as 0-3, 5"), "Layers", "numbers of the layers to adapt"),
            "data": _field(w.Combobox(value=start.data, options=list(BUILT_IN)), "Data", "built in, a file, or a Hub data set"),
            "max_steps": _field(w.BoundedIntText(value=start.max_steps, min=1, max=10**6), "Steps", "of the optimizer"),
            "batch_size": _field(w.BoundedIntText(value=start.batch_size, min=1, max=4096), "Batch", "texts or pairs a step"),
            "seq_len": _field(w.BoundedIntText(value=start.seq_len, min=2, max=10**6), "Length", "most tokens of a text"),
            "learning_rate": _field(w.FloatText(value=start.learning_rate), "Learning rate", "at its peak"),
            "seed": _field(w.BoundedIntText(value=start.seed, min=0, max=2**31 - 1), "Seed", "order of the data, start of A"),
        }
        self.all: list[str] = [ALL]

    def read(self) -> Settings:
        """What the form says now."""
        values = {name: field.value for name, field in self.fields.items()}
        chosen = values.pop("target_modules")
        return Settings(**values, target_modules=() if ALL in chosen or not chosen else tuple(chosen))

    def offer(self, model: nn.Module) -> None:
        """Show the linear layers that this model has, and keep of the choice what it has, too."""
        groups = linear_groups(model)
        field = self.fields["target_modules"]
        options = [(f"{ALL} ({sum(n for n, _ in groups.values())})", ALL)]
        options += [(f"{name} ({count}), {shape}", name) for name, (count, shape) in groups.items()]
        kept = tuple(v for v in field.value if v in groups or v == ALL) or (ALL,)
        if list(field.options) != options:
            field.options = options  # which clears the choice
        field.value = kept

    def fit_method(self) -> None:
        """Let only what the method has be changed."""
        method = self.fields["method"].value
        for name in ("r", "lora_alpha", "lora_dropout", "target_modules", "layers"):
            self.fields[name].disabled = method not in LOW_RANK
        self.fields["reduction_factor"].disabled = method in {*LOW_RANK, "full"}

    def observe(self, heard: Callable[[Any], None]) -> None:
        """Call `heard` at each change of a value."""
        for field in self.fields.values():
            field.observe(heard, names=["value"])

    def lock(self, *, locked: bool) -> None:
        """While something trains."""
        for field in self.fields.values():
            field.disabled = locked
        if not locked:
            self.fit_method()

    def shown(self) -> w.Widget:
        """The form, in columns that wrap."""
        columns = (
            ("base", "quant", "data", "max_steps", "batch_size", "seq_len", "learning_rate", "seed"),
            ("method", "r", "lora_alpha", "lora_dropout", "reduction_factor", "target_modules", "layers"),
        )
        boxes = [w.VBox([self.fields[name] for name in names]) for names in columns]
        return w.Box(boxes, layout=w.Layout(flex_flow="row wrap"))


def _field(widget: Any, label: str, tooltip: str) -> Any:
    widget.description, widget.tooltip = label, tooltip
    widget.style, widget.layout = WIDE, LAYOUT
    if hasattr(widget, "continuous_update"):
        widget.continuous_update = True
    return widget
