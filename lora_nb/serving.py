"""Many adapters behind one base: requests for any of them are answered together, a token of each in every step.

    ask → queue (fair between adapters) → its adapter is brought to a slot → its prompt joins the batch → a token a step → done

One thread runs the model, another loads adapters, and whoever asks waits for neither: `submit` gives a ticket at once. A step is one
forward over all texts under way (`packed.py`), each row through its own adapter (`layers/mixed.py`); texts join and leave between
steps, so nobody waits for a longer text of somebody else's.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from lora_nb.attach import acting, disabled
from lora_nb.beside import Beside
from lora_nb.configs import TrainConfig
from lora_nb.datasets import Dataset
from lora_nb.errors import AdapterError, ConfigError, LoraNbError, QueueFullError, ServingError, nearest
from lora_nb.fairness import FairQueue
from lora_nb.generation import check_settings, prompt_ids, stop_tokens
from lora_nb.layers.adapted import AdaptedLayer
from lora_nb.layers.mixed import Share
from lora_nb.packed import KeyValues, Pass, Row, check_model, forward, sent
from lora_nb.serving_figures import AdapterFigures, ServerFigures
from lora_nb.tickets import Asked, Ticket
from lora_nb.tiers import Tiers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARES = 2  # sets of adapters whose stacked weights are kept


class AdapterServer:
    """Serves texts from a base and any number of adapters, until it is closed; while it is open the model is its own.

    Args:
        device_slots: adapters that can act at the same time.
        host_slots: further adapters kept in memory; all others are read from disk when somebody asks for them.
        folder: adapters are its subfolders. Those that the model carries can be asked for as well, and others can be `add`ed.
        max_batch: texts under way at the same time.
        max_queue: requests that may wait for that; beyond, they are refused.
        prefill_tokens: about how many tokens of new prompts join the batch in one step, so that long prompts hold up nobody's next
            token for long.

    Raises:
        ConfigError: a number below 1.
        BaseModelError: a model that gives other texts when they are packed.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        device_slots: int = 8,
        host_slots: int = 64,
        *,
        folder: str | Path | None = None,
        max_batch: int = 16,
        max_queue: int = 256,
        prefill_tokens: int = 512,
    ) -> None:
        sizes = {"device_slots": device_slots, "max_batch": max_batch, "max_queue": max_queue, "prefill_tokens": prefill_tokens}
        for name, value in {**sizes, "host_slots": host_slots}.items():
            if not isinstance(value, int) or value < (0 if name == "host_slots" else 1):
                raise ConfigError(f"{name}={value!r}: it must be a whole number of at least {0 if name == 'host_slots' else 1}.")
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.max_queue, self.prefill = max_batch, max_queue, prefill_tokens
        self._was_training = model.training
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        model.eval()
        with disabled(model):
            check_model(model)
        self.tiers = Tiers(model, device_slots, host_slots, None if folder is None else Path(folder), self._wake)
        self._stops = set(stop_tokens(model, tokenizer))
        self._kept = KeyValues(max_batch)
        self._queue: FairQueue[Ticket] = FairQueue()
        self._running: list[Ticket] = []
        self._generators: dict[Ticket, torch.Generator] = {}
        self._shares: OrderedDict[tuple[str, ...], dict[AdaptedLayer, Share]] = OrderedDict()
        self._training: Beside | None = None
        self._trained: Beside | None = None
        self._figures: dict[str | None, AdapterFigures] = {}
        self._steps, self._born, self._ended_by = 0, time.monotonic(), Counter[str]()
        self._change, self._closing = threading.Condition(), False
        model.requires_grad_(requires_grad=False)
        self._thread = threading.Thread(target=self._serve, name="lora_nb server", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: str,
        adapter: str | None = None,
        *,
        max_new_tokens: int = 60,
        temperature: float = 0.0,
        seed: int = 0,
        time_limit: float | None = None,
    ) -> Ticket:
        """Ask for a text and get a ticket for it at once.

        Args:
            adapter: its name, or None for the base.
            temperature: 0 always takes the likeliest token; higher is freer.
            seed: of the drawing, when temperature is above 0; the text does not depend on who else is served.
            time_limit: seconds after which it ends with what there is.

        Raises:
            AdapterError: no such adapter.
            ConfigError: a setting that is not allowed, or a prompt that leaves no room for the text.
            QueueFullError: too many wait already.
            ServingError: the server is closed.
        """
        if adapter is not None:
            self.tiers.check(adapter)
        if isinstance(prompt, str) and not prompt.isprintable() and any("\ud800" <= c <= "\udfff" for c in prompt):
            raise ConfigError("The prompt is no whole Unicode: one half of a surrogate pair stands alone.")
        ids = prompt_ids(self.tokenizer, prompt)[0]
        check_settings(self.model, len(ids), max_new_tokens, temperature)
        if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
            raise ConfigError(f"seed={seed!r}: it must be a whole number of 64 bits.")
        if time_limit is not None and not (isinstance(time_limit, int | float) and 0 < time_limit < math.inf):
            raise ConfigError(f"time_limit={time_limit!r}: it must be a number of seconds above 0.")
        deadline = None if time_limit is None else time.monotonic() + time_limit
        ticket = Ticket(Asked(adapter, ids, max_new_tokens, float(temperature), seed, deadline), self.tokenizer)
        with self._change:
            if self._closing:
                raise ServingError("The server is closed: make a new AdapterServer.")
            if len(self._queue) >= self.max_queue:
                raise QueueFullError(f"{len(self._queue)} requests wait already, which is as many as may (max_queue): ask again later.")
            self._queue.push(adapter, ticket, [t.adapter for t in self._running])
            self._change.notify_all()
        return ticket

    def generate(self, prompts: Sequence[str], adapter: Sequence[str | None] | str | None = None, *, max_new_tokens: int = 60) -> list[str]:
        """The texts after several prompts, all asked for at once; an adapter for each, or one for all."""
        names = [adapter] * len(prompts) if adapter is None or isinstance(adapter, str) else list(adapter)
        if isinstance(prompts, str) or len(names) != len(prompts):
            raise ConfigError("generate takes a list of prompts, and one adapter for all or a list of as many.")
        tickets = [self.submit(p, name, max_new_tokens=max_new_tokens) for p, name in zip(prompts, names, strict=True)]
        return [ticket.result().text for ticket in tickets]

    def adapters(self) -> list[str]:
        """Names that can be asked for."""
        return self.tiers.names()

    def add(self, name: str, path: str | Path) -> None:
        """Let the adapter saved in `path` be asked for by a name."""
        self.tiers.add(name, Path(path))

    def remove(self, name: str) -> None:
        """Forget an adapter that was added; texts under way go on."""
        self.tiers.remove(name)

    def train(self, name: str, dataset: Dataset, config: TrainConfig | None = None, *, rows_at_once: int = 1) -> Beside:
        """Train an adapter that the model carried when the server was made, beside what is served; it can be asked for meanwhile.

        Raises:
            AdapterError: not such an adapter.
            ServingError: another one trains.
        """
        if name not in self.tiers.residents:
            raise AdapterError(f"{name!r} cannot train here: attach it before the server is made." + nearest(name, self.tiers.residents))
        with self._change:
            if self._closing or self._trains():
                raise ServingError("The server is closed." if self._closing else "An adapter trains already: wait for it, or stop() it.")
        training = Beside(self.model, self.tokenizer, name, dataset, config or TrainConfig(), rows_at_once=rows_at_once)
        with self._change:
            self._training = training
            self._change.notify_all()
        return training

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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

    def _routed(self, batch: Pass) -> Any:
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
        ticket.finish(reason, error)
        with self._change:
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
