"""The thread that runs the model of a server: who joins the batch, a step of everybody in it, and who leaves.

One step is one forward over all texts under way (`packed.py`), each row through its own adapter (`layers/mixed.py`), and over the
training rows that go beside them. Texts join and leave between steps, so nobody waits for a longer text of somebody else's.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_nb.attach import acting, disabled
from lora_nb.beside import Beside
from lora_nb.errors import LoraNbError, QueueFullError, ServingError
from lora_nb.fairness import FairQueue
from lora_nb.generation import stop_tokens
from lora_nb.layers.adapted import AdaptedLayer
from lora_nb.layers.mixed import Share
from lora_nb.packed import KeyValues, Pass, Row, check_model, forward, sent
from lora_nb.serving_figures import AdapterFigures, ServerFigures
from lora_nb.thread_pool import give_back, give_back_after_cells
from lora_nb.tickets import Ticket
from lora_nb.tiers import Tiers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARES = 2  # sets of adapters whose stacked weights are kept


class Scheduler:
    """Runs a model, which is its own until it is closed, for tickets that are put in from any thread.

    Args:
        device_slots, host_slots, folder: as `Tiers` takes them.
        max_batch: texts under way at the same time.
        max_queue: tickets that may wait for that.
        prefill_tokens: about how many tokens of new prompts join in one step.

    Raises:
        BaseModelError: a model that gives other texts when they are packed.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        device_slots: int,
        host_slots: int,
        folder: Path | None,
        max_batch: int,
        max_queue: int,
        prefill_tokens: int,
    ) -> None:
        self.model, self.max_batch, self.max_queue, self.prefill = model, max_batch, max_queue, prefill_tokens
        self._was_training = model.training
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        model.eval()
        with disabled(model):
            check_model(model)
        self.tiers = Tiers(model, device_slots, host_slots, folder, self._wake)
        model.requires_grad_(requires_grad=False)
        self._stops = set(stop_tokens(model, tokenizer))
        self._kept = KeyValues(max_batch)
        self._queue: FairQueue[Ticket] = FairQueue()
        self._running: list[Ticket] = []
        self._generators: dict[Ticket, torch.Generator] = {}
        self._shares: OrderedDict[tuple[str, ...], dict[AdaptedLayer, Share]] = OrderedDict()
        self._training: Beside | None = None
        self._trained: Beside | None = None
        self._figures: dict[str | None, AdapterFigures] = {}
        self._steps, self._born = 0, time.monotonic()
        self._change, self._closing = threading.Condition(), False
        give_back()
        give_back_after_cells()
        self._thread = threading.Thread(target=self._serve, name="lora_nb server", daemon=True)
        self._thread.start()

    def push(self, ticket: Ticket) -> None:
        """Put a ticket in its adapter's line.

        Raises:
            QueueFullError: too many wait already.
            ServingError: it is closed.
        """
        with self._change:
            if self._closing:
                raise ServingError("The server is closed: make a new AdapterServer.")
            if len(self._queue) >= self.max_queue:
                raise QueueFullError(f"{len(self._queue)} requests wait already, which is as many as may (max_queue): ask again later.")
            self._queue.push(ticket.adapter, ticket, [t.adapter for t in self._running])
            self._change.notify_all()

    def check_free(self) -> None:
        """Raise ServingError if an adapter trains, or the server is closed."""
        with self._change:
            if self._closing or self._trains():
                raise ServingError("The server is closed." if self._closing else "An adapter trains already: wait for it, or stop() it.")

    def begin(self, training: Beside) -> None:
        """Let training rows join from the next step on."""
        self.check_free()
        with self._change:
            self._training = training
            self._change.notify_all()

    def figures(self) -> ServerFigures:
        """What was served so far, by adapter."""
        with self._change:
            return ServerFigures(
                {name or "base": f.copy() for name, f in self._figures.items()},
                seconds=time.monotonic() - self._born,
                steps=self._steps,
                running=len(self._running),
                waiting=len(self._queue),
                in_slots=list(self.tiers.slots),
                in_host=list(self.tiers.host),
                loads=dict(self.tiers.loads),
                kept_bytes=self._kept.bytes,
            )

    def close(self) -> None:
        """Stop, and give the model back as it was; texts under way end as cancelled, with what they have."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _wake(self) -> None:
        with self._change:
            self._change.notify_all()

    def _serve(self) -> None:
        """The thread that runs the model."""
        try:
            with acting(self.model, ()):
                while not self._closing:
                    self._turn()
        finally:
            self._shut()

    def _turn(self) -> None:
        """One step, or a wait for something to do."""
        try:
            self._end_unwanted()
            self._admit()
            if self._running or self._trains():
                self._step()
                return
        except Exception as error:  # noqa: BLE001 - whatever a batch runs into, the server goes on with the next
            self._fail(error)
            return
        with self._change:
            if not self._closing:
                self._change.wait(0.05 if len(self._queue) else None)

    def _trains(self) -> bool:
        return self._training is not None and not self._training.stopped.is_set()

    def _shut(self) -> None:
        with self._change:
            self._closing = True
            for ticket in [*self._queue, *self._running]:
                ticket.finish("cancelled")
        if self._training is not None:
            self._training.end("interrupt")
        self._shares.clear()
        self.tiers.close()
        self.model.train(self._was_training)
        for p in self._trainable:
            p.requires_grad = True

    def _end_unwanted(self) -> None:
        """Cancelled requests, and those whose time is over."""
        now = time.monotonic()

        def reason(ticket: Ticket) -> str | None:
            late = ticket.asked.deadline is not None and now > ticket.asked.deadline
            return "cancelled" if ticket.unwanted else "time_limit" if late else None

        with self._change:
            gone = self._queue.remove_if(lambda t: reason(t) is not None)
        for ticket in gone:
            self._finish(ticket, str(reason(ticket)))
        for ticket in [t for t in self._running if reason(t)]:
            self._leave(ticket, str(reason(ticket)))

    def _admit(self) -> None:
        """Let requests join the batch, one after another, of whichever adapter got least."""
        tokens, not_yet = 0, list[str | None]()
        self.tiers.forget_errors(self._line())
        while len(self._running) < self.max_batch and tokens < self.prefill:
            waiting = [name for name in self._line() if name not in not_yet]
            if not waiting:
                return
            placed = self._placed(waiting[0], {t.adapter for t in self._running if t.adapter is not None})
            if placed is None:
                return  # all slots are taken: those behind may not take the next one that is free
            if not placed:
                not_yet.append(waiting[0])  # it is being loaded: the others need not wait for it
                continue
            with self._change:
                ticket = self._queue.pop(waiting[0])
                self._queue.charge(waiting[0], len(ticket.asked.prompt_ids))
                ticket.begun = time.monotonic()
                self._running.append(ticket)
            tokens += len(ticket.asked.prompt_ids)

    def _line(self) -> list[str | None]:
        with self._change:
            return self._queue.order()

    def _placed(self, name: str | None, in_use: set[str]) -> bool | None:
        """Whether the adapter can act: True, False while it is being loaded, None if no slot is free for it."""
        if name is None or self.tiers.ready(name):
            return True
        try:
            if not self.tiers.wanted(name):
                return False
        except LoraNbError as error:
            self._refuse(name, error)
            return False
        if not self.tiers.place(name, in_use):
            return None
        for names in [names for names in self._shares if name in names]:  # it may have been read anew
            del self._shares[names]
        return True

    def _refuse(self, name: str, error: LoraNbError) -> None:
        """Everybody who waits for an adapter that cannot be had."""
        with self._change:
            gone = self._queue.remove_if(lambda t: t.adapter == name)
        for ticket in gone:
            self._finish(ticket, "error", error)

    def _step(self) -> None:
        """A token for each text under way, and the training rows, if there are."""
        rows = [self._row(ticket, slot) for slot, ticket in enumerate(self._running)]
        training = self._training if self._trains() else None
        if training is not self._trained:  # what trains is stacked anew each time, what does not is kept
            self._trained = training
            self._shares.clear()
        rows += training.rows() if training is not None else []
        batch = Pass(rows, self._kept, self.tiers.device)
        running = list(self._running)
        with torch.set_grad_enabled(training is not None), self._routed(batch):
            logits = forward(self.model, batch, routed=True)
            if training is not None:
                self._learn(training, logits[len(running) :])
        self._steps += 1
        for ticket, row in zip(running, rows, strict=False):
            ticket.kept = row.start + len(row.ids)
        if running:
            self._take(running, torch.cat([z.detach() for z in logits[: len(running)]]))

    def _learn(self, training: Beside, logits: list[Tensor]) -> None:
        try:
            training.learn(logits)
        except LoraNbError as error:
            training.end("error", error)

    def _row(self, ticket: Ticket, slot: int) -> Row:
        asked = ticket.asked
        return Row(asked.adapter, ticket.tokens[-1:] if ticket.kept else asked.prompt_ids, slot, ticket.kept)

    def _routed(self, batch: Pass) -> AbstractContextManager[None]:
        names = tuple(sorted({row.adapter for row in batch.rows if row.adapter is not None}))
        shares = self._shares.setdefault(names, {})
        self._shares.move_to_end(names)
        while len(self._shares) > SHARES:
            self._shares.popitem(last=False)
        return sent(self.tiers.layers.values(), batch, shares)

    def _take(self, running: Sequence[Ticket], logits: Tensor) -> None:
        """The next token of each text, from logits (texts, vocabulary)."""
        best, finite = logits.argmax(-1).tolist(), logits.amax(-1).isfinite().tolist()
        for i, ticket in enumerate(running):
            if not finite[i]:
                self._kept.clear(self._running.index(ticket))
                self._leave(ticket, "error", ServingError(f"The adapter {ticket.adapter!r} gave no finite numbers: train it again."))
                continue
            token = best[i] if not ticket.asked.temperature else self._drawn(ticket, logits[i])
            if token in self._stops:
                self._leave(ticket, "stop")
                continue
            ticket.put(token)
            self._count(ticket)
            if len(ticket.tokens) >= ticket.asked.max_new_tokens:
                self._leave(ticket, "length")

    def _drawn(self, ticket: Ticket, logits: Tensor) -> int:
        if ticket not in self._generators:
            self._generators[ticket] = torch.Generator().manual_seed(ticket.asked.seed)
        chances = (logits.float().cpu() / ticket.asked.temperature).softmax(-1)
        return int(torch.multinomial(chances, 1, generator=self._generators[ticket]))

    def _count(self, ticket: Ticket) -> None:
        with self._change:
            self._queue.charge(ticket.adapter, 1)
            self._of(ticket).tokens += 1

    def _of(self, ticket: Ticket) -> AdapterFigures:
        return self._figures.setdefault(ticket.adapter, AdapterFigures())

    def _leave(self, ticket: Ticket, reason: str, error: LoraNbError | None = None) -> None:
        """A text under way ends; the last one takes its slot."""
        slot, last = self._running.index(ticket), self._running[-1]
        if last is not ticket:
            self._kept.move(len(self._running) - 1, slot, last.kept)
        with self._change:
            self._running[slot] = last
            self._running.pop()
        self._generators.pop(ticket, None)
        self._finish(ticket, reason, error)

    def _finish(self, ticket: Ticket, reason: str, error: LoraNbError | None = None) -> None:
        with self._change:  # so that whoever has the result finds it in the figures
            ticket.finish(reason, error)
            self._of(ticket).ended(ticket)
        if ticket.adapter is not None and ticket.adapter not in self.tiers.residents:
            self.tiers.refresh(ticket.adapter, {t.adapter for t in self._running if t.adapter is not None})

    def _fail(self, error: Exception) -> None:
        """A step broke: those who were in it are told, and the next ones get a fresh start."""
        known = error if isinstance(error, LoraNbError) else ServingError(f"A step failed: {type(error).__name__}: {error}.")
        for ticket in list(self._running):
            self._leave(ticket, "error", known)
        if self._training is not None:
            self._training.end("error", known)
        self._kept, self._shares = KeyValues(self.max_batch), OrderedDict()
