"""What watches a run from outside: the log in JSON Lines, TensorBoard, and callbacks of one's own.

A callback is called with each `Step`; one that returns True ends the run. So a panel's Stop button is
`callbacks=[lambda step: pressed.is_set()]` with a `threading.Event`.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, Self, TextIO

from lora_nb.configs import TrainConfig
from lora_nb.errors import TrainingError
from lora_nb.training.distributed import first
from lora_nb.training.run import Run, Step

Callback = Callable[[Step], bool | None]


class Watchers:
    """The bar, the recorders and the caller's own callbacks, for as long as a run goes on.

    In several processes only the first writes and shows a bar; callbacks are called in each.
    """

    def __init__(self, config: TrainConfig, run: Run, total: int, callbacks: Sequence[Callback]) -> None:
        from tqdm.auto import tqdm

        self.callbacks, self.recorders = callbacks, recorders(config, run) if first() else []
        # A bar belongs to a cell or a terminal, which a thread of its own has not, nor have the other processes. It is silenced only
        # then, so that TQDM_DISABLE is heard.
        watched = first() and threading.current_thread() is threading.main_thread()
        silent = {} if watched else {"disable": True}
        self.bar = tqdm(desc="training", unit="step", total=total, initial=run.steps, **silent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        for recorder in self.recorders:
            recorder.close()

    def step(self, step: Step) -> bool:
        """Tell everyone, whatever the first says; does one want to stop?"""
        self.bar.set_postfix(loss=f"{step.loss:.3f}", refresh=False)
        self.bar.update()
        for recorder in self.recorders:
            recorder.step(step)
        asked = [callback(step) for callback in self.callbacks]
        return any(asked)

    def evaluation(self, step: int, loss: float) -> None:
        for recorder in self.recorders:
            recorder.evaluation(step, loss)


class Recorder(Protocol):
    """Writes a run down while it goes on."""

    def step(self, step: Step) -> None: ...

    def evaluation(self, step: int, loss: float) -> None: ...

    def close(self) -> None: ...


def recorders(config: TrainConfig, run: Run) -> list[Recorder]:
    """Those that the config asks for; a resumed run goes on where its checkpoint was made.

    Raises:
        TrainingError: the log cannot be written, or TensorBoard is not installed.
    """
    out: list[Recorder] = []
    if file := config.log_file or (config.checkpoint_dir and Path(config.checkpoint_dir) / "log.jsonl"):
        out.append(JsonLines(Path(file), run.steps))
    if config.tensorboard_dir:
        out.append(TensorBoard(Path(config.tensorboard_dir), run.steps))
    return out


class JsonLines:
    """One line a step, `{"step": 1, "total": 200, "loss": …}`, and one an evaluation, `{"step": 50, "eval_loss": …}`.

    Each line is handed to the system at once, so another program can read along. Lines of steps that a resumed run makes
    again are dropped. A disk that fills up ends the log with a warning, not the run.
    """

    def __init__(self, path: Path, done: int) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = _lines_until(path, done) if done and path.exists() else []
            self.file: TextIO | None = path.open("w", encoding="utf-8")
            self.file.writelines(kept)
            self.file.flush()
        except OSError as error:
            raise TrainingError(f"The log {str(path)!r} cannot be written: {error.strerror}. Choose another log_file.") from error

    def step(self, step: Step) -> None:
        self._write(step.as_json())

    def evaluation(self, step: int, loss: float) -> None:
        self._write({"step": step, "eval_loss": loss})

    def close(self) -> None:
        if self.file:
            with suppress(OSError):
                self.file.close()
        self.file = None

    def _write(self, line: dict[str, Any]) -> None:
        if not self.file:
            return
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        except OSError as error:
            warnings.warn(f"The log {str(self.path)!r} ends before step {line['step']}: {error.strerror}. The run goes on.", stacklevel=3)
            self.close()


def _lines_until(path: Path, done: int) -> list[str]:
    """Lines of the first `done` steps; what a crash cut short is dropped."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= done:
                kept.append(line + "\n")
    return kept


class TensorBoard:
    """Loss, learning rate, gradient norm, tokens per second and held-out loss, through PyTorch's own writer."""

    def __init__(self, folder: Path, done: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrainingError(
                f"tensorboard_dir={str(folder)!r} needs the package tensorboard, which is not installed: pip install tensorboard. "
                "Without it, log_file=… writes the same numbers as JSON Lines."
            ) from error
        self.writer: Any = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def step(self, step: Step) -> None:
        rate = step.tokens / step.seconds if step.seconds else 0.0
        numbers = {"loss": step.loss, "learning_rate": step.learning_rate, "grad_norm": step.grad_norm, "tokens_per_second": rate}
        for name, value in numbers.items():
            self.writer.add_scalar(f"train/{name}", value, step.step)

    def evaluation(self, step: int, loss: float) -> None:
        self.writer.add_scalar("eval/loss", loss, step)

    def close(self) -> None:
        self.writer.close()
