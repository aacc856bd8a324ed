"""Many adapters behind one base: requests for any of them are answered together, a token of each in every step.

    ask → queue (fair between adapters) → its adapter is brought to a slot → its prompt joins the batch → a token a step → done

One thread runs the model (`scheduler.py`), another loads adapters (`tiers.py`), and whoever asks waits for neither: `submit` gives a
ticket at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from torch import nn

from lora_nb.beside import Beside
from lora_nb.configs import TrainConfig
from lora_nb.datasets import Dataset
from lora_nb.errors import AdapterError, ConfigError, nearest
from lora_nb.generation import check_settings, prompt_ids
from lora_nb.scheduler import Scheduler
from lora_nb.serving_figures import ServerFigures
from lora_nb.tickets import Asked, Ticket

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        place = None if folder is None else Path(folder)
        self.scheduler = Scheduler(model, tokenizer, host_slots=host_slots, folder=place, **sizes)
        self.tiers = self.scheduler.tiers

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
        self.scheduler.push(ticket)
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
        self.scheduler.check_free()
        training = Beside(self.model, self.tokenizer, name, dataset, config or TrainConfig(), rows_at_once=rows_at_once)
        self.scheduler.begin(training)
        return training

    def figures(self) -> ServerFigures:
        """What was served so far, by adapter."""
        return self.scheduler.figures()

    def close(self) -> None:
        """Stop, and give the model back as it was; texts under way end as cancelled, with what they have."""
        self.scheduler.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
