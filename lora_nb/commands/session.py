"""What one verb leaves for the next: in a notebook it lasts, on the command line for one verb only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_nb.attach import adapters
from lora_nb.bases import load
from lora_nb.errors import ConfigError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_nb.training.loop import Run


@dataclasses.dataclass
class Session:
    """A base with its tokenizer, the last run, and how things are said.

    Args:
        say: shows an object on the way to the result: printed, or displayed.
        lasting: whether a later verb finds what this one left, as in a notebook; else what was learnt must be saved.
        variables: those of the notebook, for `$name` and for names that stand where an object may.
        named: what the last verb leaves under which name.
    """

    say: Callable[[object], None] = print
    lasting: bool = False
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: nn.Module | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    run: Run | None = None
    base: str = ""
    named: dict[str, object] = dataclasses.field(default_factory=dict)

    def open(self, base: str = "", quant: str = "") -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """The model that is there, or the one named; nothing named and nothing there: the embedded base.

        Raises:
            ConfigError: another base or form than the one that is there, which would throw away what it has learnt.
        """
        if self.model is not None and self.tokenizer is not None:
            if base and base != self.base:
                raise ConfigError(f"{self._there()}, and --base asks for {base!r}: `load {base}` first, which takes its place.")
            if quant:
                raise ConfigError(f"{self._there()}: --quant is for a base that is being loaded, as in `load --quant {quant}`.")
            return self.model, self.tokenizer
        self.base = base or "tiny"
        self.model, self.tokenizer = load(self.base, quant=quant or None)
        self.leave(model=self.model, tokenizer=self.tokenizer)
        return self.model, self.tokenizer

    def _there(self) -> str:
        return f"The model in use is {self.base or 'your own variable `model`'}"

    def opened(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """The model that is there.

        Raises:
            ConfigError: none is.
        """
        if self.model is None or self.tokenizer is None:
            raise ConfigError("No model is loaded: `load tiny` first, or assign `model` and `tokenizer`.")
        return self.model, self.tokenizer

    def adapted(self) -> bool:
        """Whether an adapter is on the model."""
        return self.model is not None and bool(adapters(self.model).reports)

    def leave(self, **named: object) -> None:
        """Have results under names, for the notebook."""
        self.named.update(named)

    def variable(self, name: str) -> Any:
        """The notebook's variable of that name.

        Raises:
            ConfigError: there is none.
        """
        if name in self.variables:
            return self.variables[name]
        mine = [n for n in self.variables if not n.startswith("_")]
        raise ConfigError(f"${name}: there is no variable {name!r}." + nearest(name, mine))
