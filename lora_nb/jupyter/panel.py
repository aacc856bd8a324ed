"""The control panel: a form, what its settings cost, and the training that they mean, with the code for it.

Everything runs where the kernel hears of clicks (its main thread, or a subshell of ipykernel 7) but the training itself, which has
a thread of its own (`worker.py`).
"""

from __future__ import annotations

import gc
import html
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets as w
import torch
from torch import nn

from lora_nb.attach import adapters, attach, detach, disabled
from lora_nb.bases import load
from lora_nb.checkpoint import load_adapter, save
from lora_nb.datasets import Dataset, dataset
from lora_nb.errors import LoraNbError
from lora_nb.generation import generate
from lora_nb.jupyter.charts import LossChart, MemoryChart
from lora_nb.jupyter.code_cell import CodeCell
from lora_nb.jupyter.figures import Speed, lines, probe, run_folder, scale_said, step_seconds
from lora_nb.jupyter.form import Form
from lora_nb.jupyter.settings import Settings
from lora_nb.jupyter.watched import beside
from lora_nb.jupyter.worker import Job, Worker
from lora_nb.memory.estimate import estimate
from lora_nb.memory.report import Estimate
from lora_nb.render import format_bytes, html_table, text_table
from lora_nb.training.run import Run, Step

SAMPLES = 3
HELD_OUT = 200
BUTTON = {"width": "auto", "min_width": "6em"}


class Panel(w.VBox):  # type: ignore[misc]
    """The control panel; `settings` is what its form says, `model`, `tokenizer` and `run` what it works with.

    Args:
        settings: to start with.
        model, tokenizer: your own, in place of the base that the form names.
    """

    def __init__(self, settings: Settings | None = None, model: nn.Module | None = None, tokenizer: Any = None) -> None:
        self.form, self.worker = Form(settings or Settings()), Worker()
        self.model, self.tokenizer = model, tokenizer
        self.own = model is not None
        self.loaded: tuple[str, str] | None = None  # base and quantization of the model, as long as it is as it was loaded
        self.run: Run | None = None
        self.speed: Speed | None = None
        self.last: tuple[Settings, Path] | None = None
        self.estimate: Estimate | None = None
        self.known: list[tuple[str, str, str]] = []
        self.samples: dict[str, list[str]] = {}
        self._make_widgets()
        super().__init__(self._arranged())
        self.add_class("lora-panel")  # by which the front end knows whose keys are pressed
        self._open()
        self.form.observe(self._changed)
        self.form.fit_method()
        self.refresh()

    # What is shown

    def _make_widgets(self) -> None:
        self.numbers, self.said = w.HTML(), w.HTML()
        self.memory, self.curve = MemoryChart({}, lines()), LossChart()
        self.answers, self.code = w.HTML(), CodeCell(layout={"display": "none"})
        self.path = w.Text(value="adapters/panel", description="Folder", layout={"width": "20em"}, tooltip="of an adapter")
        self.buttons = {
            "train": self._button("Train", "a new adapter with these settings", self.train),
            "stop": self._button("Stop", "after the step at hand; what was learnt is kept", self.stop),
            "resume": self._button("Resume", "go on where the last run stopped", self.resume),
            "save": self._button("Save", "the adapter, in the folder named here", self.save),
            "load": self._button("Load adapter", "from the folder named here", self.load_adapter),
            "code": self._button("Show the code", "the cell that does exactly this", self.toggle_code),
        }
        self._lock(locked=False)

    def _button(self, label: str, tooltip: str, action: Callable[[], object]) -> w.Button:
        button = w.Button(description=label, tooltip=tooltip, layout=BUTTON)
        button.on_click(lambda _: self._told(action))
        return button

    def _arranged(self) -> list[w.Widget]:
        first = w.HBox([self.buttons[n] for n in ("train", "stop", "resume", "code")], layout={"flex_flow": "row wrap"})
        second = w.HBox([self.path, self.buttons["save"], self.buttons["load"]], layout={"flex_flow": "row wrap"})
        return [self.form.shown(), self.numbers, self.memory, first, self.said, self.curve, self.answers, second, self.code]

    def refresh(self) -> None:
        """Say anew what the settings cost; what is wrong with them instead, where something is."""
        settings = self.settings
        try:
            there = self.model is not None and (self.own or settings.base == self._base)
            trainable = settings.trainable(self.model) if there else None  # type: ignore[arg-type]
            self.estimate = self._estimated(settings)
        except LoraNbError as error:
            self.numbers.value = f'<p role="alert"><b>{html.escape(str(error))}</b></p>'
            return
        self.known = self._rows(settings, trainable)
        self.numbers.value = html_table(["what", "", "how it is known"], self.known)
        self.memory.update(self.estimate.parts)
        self.code.value = settings.code()

    def _rows(self, settings: Settings, trainable: int | None) -> list[tuple[str, str, str]]:
        total = sum(p.numel() for p in self.model.parameters()) if self.model is not None else 0
        extra = sum(p.numel() for n, p in self.model.named_parameters() if ".adapters." in n) if self.model is not None else 0
        whole = total - extra + (trainable or 0) * (settings.method != "full")
        rows = []
        if trainable is not None:
            rows.append(
                ("trainable parameters", f"{trainable:,} of {whole:,} ({trainable / whole:.2%})", scale_said(settings) or "counted")
            )
        if self.estimate is not None:
            rows.append(("memory of training", format_bytes(self.estimate.total), "computed from the shapes"))
        if self.speed is not None and trainable is not None:
            rows.append(("a step", f"about {step_seconds(self.speed, settings):.2g} s if all rows are full", self.speed.source))
        return rows

    def _estimated(self, settings: Settings) -> Estimate:
        return estimate(
            self.model if self.own else settings.base,
            settings.adapter() or "full",
            quant=settings.quantization(),
            batch_size=settings.batch_size,
            seq_len=settings.seq_len,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )

    @property
    def settings(self) -> Settings:
        """What the form says."""
        return self.form.read()

    def _changed(self, _change: Any) -> None:
        self.form.fit_method()
        self._told(self.refresh)

    def _told(self, action: Callable[[], object]) -> None:
        """Do something, and say what goes wrong: nobody sees what a widget's callback raises."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 - said to the person, whatever it is
            self._say(f"{error}" if isinstance(error, LoraNbError) else f"{type(error).__name__}: {error}", alert=True)

    def _say(self, text: str, *, alert: bool = False) -> None:
        self.said.value = f'<p role="{"alert" if alert else "status"}">{html.escape(text)}</p>'

    # The model

    def _open(self) -> None:
        """Have the base that the form names, as it was before any training."""
        wanted = (self.settings.base, self.settings.quant)
        if self.model is not None and (self.own or self.loaded == wanted):
            for name in list(adapters(self.model).reports):
                detach(self.model, name)
        else:
            self.model = self.tokenizer = None
            gc.collect()  # two bases at once may be more than there is room for
            self.model, self.tokenizer = load(wanted[0], quant=self.settings.quantization())
        self.loaded, self._base = wanted, wanted[0]
        self.form.offer(self.model)
        if self.speed is None or "forward" in self.speed.source:
            self.speed = probe(self.model)

    # What the buttons do

    def train(self) -> None:
        """Start a new adapter."""
        self._start(fresh=True)

    def resume(self) -> None:
        """Go on with the last run."""
        self._start(fresh=False)

    def stop(self) -> None:
        """End the training after the step at hand."""
        self.worker.stop()
        self._say("Stopping after this step …")

    def _start(self, *, fresh: bool) -> None:
        if self.worker.busy:
            raise LoraNbError("A training is running: stop it first.")
        last = None if fresh else self.last
        if last is None and not fresh:
            raise LoraNbError("There is no run to resume: train first.")
        settings = last[0] if last else self.settings
        adapter = settings.adapter()
        examples, held = dataset(settings.data, "train"), dataset(settings.data, "test")[:HELD_OUT]
        if fresh:
            self._open()
            self._prepare(settings, adapter)
            self.curve.held_out = []
            self.run = None
        folder = last[1] if last else run_folder(settings.data)  # last of all: what cannot start leaves none behind
        config = replace(settings.training(), checkpoint_dir=folder, resume=not fresh)
        self.last = (settings, folder)
        self._lock(locked=True)
        self._say("Training …")
        model, tokenizer = self.model, self.tokenizer
        assert model is not None
        prompts = held.prompts[:SAMPLES] if held.kind == "pairs" else []
        job = Job(
            model,
            tokenizer,
            examples,
            held,
            config,
            before=lambda: self._sample("before", prompts, held) if fresh else None,
            seen=self._seen,
            after=lambda: self._sample("after", prompts, held),
            ended=self._ended,
        )
        self.worker.start(job)

    def _prepare(self, settings: Settings, adapter: Any) -> None:
        assert self.model is not None
        torch.manual_seed(settings.seed)  # A starts at random, as in the code that is shown
        if adapter is None:
            self.loaded = None  # it will not be the base any more
            self.model.requires_grad_(requires_grad=True)
        else:
            attach(self.model, adapter)

    def _sample(self, when: str, prompts: list[str], held: Dataset) -> None:
        """Answers to held-out prompts, before and after."""
        if not prompts:
            return
        assert self.model is not None
        base = disabled(self.model) if when == "before" and adapters(self.model).reports else nullcontext()
        with base:
            texts = generate(self.model, self.tokenizer, prompts, max_new_tokens=24)
        self.samples = {**({} if when == "before" else self.samples), when: [" ".join(t.split()) for t in texts]}
        columns = ["prompt", *self.samples, "expected"]
        pairs = held.examples[:SAMPLES]
        asked, goals = [p.prompt for p in pairs], [p.completion for p in pairs]  # type: ignore[union-attr]
        self.answers.value = html_table(columns, list(zip(asked, *self.samples.values(), goals, strict=True)))

    # What the training says, from its thread

    def _seen(self, steps: list[Step]) -> None:
        if not steps:
            return
        for step in steps:
            self.curve.add(step.step, step.loss)
        last = steps[-1]
        speed = sum(s.tokens for s in steps) / max(1e-9, sum(s.seconds for s in steps))
        self._say(f"Step {last.step} of {last.total}: loss {last.loss:.3f}, {speed:,.0f} tokens/s")

    def _ended(self, run: Run | None, error: BaseException | None) -> None:
        self._lock(locked=False)
        if run is None:
            self._say(f"{error}", alert=True)
            return
        self.run = run
        for point in run.eval_losses:
            self.curve.add_held_out(*point)
        self.curve.flush()
        if run.tokens:
            self.speed = Speed(run.seconds / run.tokens, "measured in the last run")
        done = {"max_steps": "Done", "num_train_epochs": "Done"}.get(run.stopped_by, "Stopped")
        what = f"{done} after {run.steps} steps: loss {run.losses[-1]:.3f}, {run.tokens_per_second:,.0f} tokens/s" if run.steps else done
        rest = [run.notice] if run.notice else []
        if self.last and self.last[1].is_absolute():
            rest.append(f"This folder cannot be written, so the log is in {self.last[1]}.")
        self._say(" ".join([f"{what}.", *rest]) if rest else what)
        self.buttons["resume"].disabled = done == "Done"
        self.refresh()

    def _lock(self, *, locked: bool) -> None:
        self.form.lock(locked=locked)
        for name, button in self.buttons.items():
            button.disabled = locked if name in {"train", "save", "load", "resume"} else not locked if name == "stop" else False
        if not locked and self.run is None:
            self.buttons["resume"].disabled = self.last is None

    def save(self) -> None:
        """Save the adapter."""
        if self.model is None or not adapters(self.model).reports:
            raise LoraNbError("There is no adapter to save: train or load one first.")
        self._say(f"Saved in {save(self.model, self.path.value)}")

    def load_adapter(self) -> None:
        """Put a saved adapter on the base."""
        self._open()
        assert self.model is not None
        report = load_adapter(self.model, self.path.value)
        self._say(f"Loaded {self.path.value}: {report.trainable:,} parameters in {len(report.matched)} modules")

    def toggle_code(self) -> None:
        """Show the cell that does the same, or hide it."""
        hidden = self.code.layout.display == "none"
        self.code.layout.display = "" if hidden else "none"
        self.buttons["code"].description = "Hide the code" if hidden else "Show the code"

    # Where there is no front end

    def _static(self) -> list[tuple[str, str]]:
        settings = self.settings
        rows = [(label, str(getattr(settings, name) or "all")) for name, label in SHOWN.items()]
        return rows + [(what, value) for what, value, _ in self.known]

    def __repr__(self) -> str:
        return text_table(["control panel", ""], self._static())

    def _repr_html_(self) -> str:
        run = self.curve._repr_html_() + self.answers.value if self.run is not None else ""
        return html_table(["control panel", ""], self._static()) + self.memory._repr_html_() + run

    def _repr_mimebundle_(self, **settings: Any) -> Any:
        """The live widget, and beside it what a saved notebook or a page without widgets shows."""
        return beside(super()._repr_mimebundle_(**settings), self._repr_html_(), repr(self))


SHOWN = {
    "base": "base",
    "quant": "quantization",
    "method": "method",
    "r": "rank",
    "lora_alpha": "alpha",
    "target_modules": "target modules",
    "layers": "layers",
    "data": "data",
    "max_steps": "steps",
    "batch_size": "batch",
    "seq_len": "length",
    "learning_rate": "learning rate",
}
