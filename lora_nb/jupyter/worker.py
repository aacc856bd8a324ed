"""Training beside a live notebook: the loop in a thread, since a widget's callbacks wait while a cell runs."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from lora_nb.configs import TrainConfig
from lora_nb.datasets import Dataset
from lora_nb.thread_pool import give_back, give_back_after_cells
from lora_nb.training.loop import train
from lora_nb.training.run import Run, Step

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OFTEN = 1.0  # seconds between two looks at a run: on a laptop the browser that draws them takes its time from the training


@dataclasses.dataclass
class Job:
    """What to train, and who hears of it.

    Args:
        before, after: called in the thread around the training, as for samples.
        seen: gets the steps made since it was last called.
        ended: gets the run, or what went wrong.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    examples: Dataset
    held: Dataset | None
    config: TrainConfig
    before: Callable[[], None]
    seen: Callable[[list[Step]], None]
    after: Callable[[], None]
    ended: Callable[[Run | None, BaseException | None], None]


class Worker:
    """One training at a time, which can be stopped between two steps."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.stopping = threading.Event()
        give_back_after_cells()  # a click may be heard in a subshell of the kernel, and train in a third thread

    @property
    def busy(self) -> bool:
        """Whether something is being trained."""
        return self.thread is not None and self.thread.is_alive()

    def start(self, job: Job) -> None:
        """Begin; a daemon, so that a kernel that is shut down does not wait for it."""
        self.stopping.clear()
        give_back()
        self.thread = threading.Thread(target=self._work, args=(job,), name="lora_nb training", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Ask it to end after the step at hand."""
        self.stopping.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Until it has ended; whether it has."""
        if self.thread is not None:
            self.thread.join(seconds)
        return not self.busy

    def _work(self, job: Job) -> None:
        waiting: list[Step] = []
        last = 0.0

        def heard(step: Step) -> bool:
            nonlocal last
            waiting.append(step)
            if time.perf_counter() - last > OFTEN:
                job.seen(waiting.copy())
                waiting.clear()
                last = time.perf_counter()
            return self.stopping.is_set()

        try:
            job.before()
            run = train(job.model, job.tokenizer, job.examples, job.config, eval_dataset=job.held, callbacks=[heard])
            job.seen(waiting)
            job.after()
        except BaseException as error:  # noqa: BLE001 - a thread has nobody else to tell
            job.ended(None, error)
        else:
            job.ended(run, None)
