"""What one optimizer step did, and what a whole run did."""

from __future__ import annotations

import weakref
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_nb.configs import TrainConfig
from lora_nb.datasets import Dataset
from lora_nb.render import format_bytes, html_table, svg_curve, text_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Step:
    """One optimizer step: mean loss over its labelled tokens (nats), rate, gradient norm before clipping, tokens in, seconds."""

    step: int
    total: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float

    def _repr_html_(self) -> str:
        row = (f"{self.step} of {self.total}", self.loss, self.learning_rate, self.grad_norm, self.tokens, self.seconds)
        return html_table(["step", "loss", "learning rate", "gradient norm", "tokens", "seconds"], [row])

    def as_json(self) -> dict[str, int | float | None]:
        """One line of the log; JSON has no infinity, which a gradient's norm may be in fp16."""
        return {key: value if isfinite(value) else None for key, value in asdict(self).items()}


class Origin:
    """What a run was made from, for what is asked of it afterwards; the model only as long as somebody else has it, too."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, eval_dataset: Dataset | None) -> None:
        self._model = weakref.ref(model)
        self.tokenizer, self.dataset, self.eval_dataset = tokenizer, dataset, eval_dataset

    @property
    def model(self) -> nn.Module | None:
        return self._model()


@dataclass
class Run:
    """What a training run did: losses by step, evaluations as (step, loss), and what it took.

    `tokens_per_second` counts every token that went through the model. `stopped_by` is `"max_steps"`, `"num_train_epochs"`,
    `"early_stopping"`, `"callback"`, `"interrupt"`, `"sigterm"` or `"out_of_memory"`; `notice` says what else there is to know.
    `peak_memory` is bytes: on a GPU the most that tensors held there during the run, on a CPU the most that the process ever
    held. `memory` divides it by part; "activations and the rest" is what remains. `origin` has what `find_rank(run)` needs.
    """

    adapter: str | None
    config: TrainConfig
    losses: list[float] = field(default_factory=list)
    eval_losses: list[tuple[int, float]] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    stopped_by: str = "max_steps"
    notice: str = ""
    origin: Origin | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a file has the figures alone."""
        return {**self.__dict__, "origin": None}

    @property
    def steps(self) -> int:
        return len(self.losses)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def note(self, step: Step) -> None:
        """Add a step."""
        self.losses.append(step.loss)
        self.learning_rates.append(step.learning_rate)
        self.tokens += step.tokens
        self.seconds += step.seconds

    def history(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {name: getattr(self, name) for name in ("losses", "eval_losses", "learning_rates", "tokens", "seconds")}

    def continue_from(self, history: dict[str, Any]) -> None:
        """Take over what `history` gave before."""
        for name, value in history.items():
            setattr(self, name, [(int(n), float(loss)) for n, loss in value] if name == "eval_losses" else value)

    def stale(self) -> int:
        """Evaluations since the lowest loss."""
        losses = [loss for _, loss in self.eval_losses]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    def _rows(self) -> list[tuple[str, str]]:
        rows = [
            ("trained", f"adapter {self.adapter!r}" if self.adapter else "the whole model"),
            ("steps", f"{self.steps}, stopped by {self.stopped_by}"),
            ("loss, first and last", f"{self.losses[0]:.3f} → {self.losses[-1]:.3f}" if self.losses else "no step was made"),
        ]
        if self.eval_losses:
            rows.append(("held-out loss", " → ".join(f"{loss:.3f}" for _, loss in self.eval_losses)))
        if self.learning_rates:
            rows.append(("learning rate, highest and last", f"{max(self.learning_rates):.3g}, {self.learning_rates[-1]:.3g}"))
        rows.append(("time", f"{self.seconds:.1f} s, {self.tokens_per_second:,.0f} tokens/s"))
        rows.append(("peak memory", format_bytes(self.peak_memory)))
        rows += [(f"– {part}", format_bytes(size)) for part, size in self.memory.items()]
        return rows + ([("notice", self.notice)] if self.notice else [])

    def __repr__(self) -> str:
        return text_table(["run", ""], self._rows())

    def _repr_html_(self) -> str:
        return svg_curve(self.losses, "training loss") + html_table(["run", ""], self._rows())
