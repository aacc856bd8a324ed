"""`%lora VERB …` and `%%lora VERB …`: the verbs of `lora_nb.commands` in a notebook, with completion.

    %load_ext lora_nb
    %lora load tiny
    %lora attach --r 8
    %%lora train
    Could you please close the window? => Can you close the window?

Nothing is kept here: the model, the tokenizer and the last run are the notebook's own variables `model`, `tokenizer` and `run`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from IPython.core.completer import CompletionContext, SimpleCompletion, context_matcher
from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, magics_class, no_var_expand
from IPython.display import display
from torch import nn

from lora_nb.commands import NOTEBOOK, Session
from lora_nb.commands.options import HelpAsked, Verb, complete, parse
from lora_nb.datasets import Pair
from lora_nb.errors import ConfigError, LoraNbError
from lora_nb.jupyter.panel import Panel
from lora_nb.training.loop import Run

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell


def panel(session: Session) -> Panel:
    """Open the control panel, on the notebook's `model` and `tokenizer` if there are such."""
    own = session.model is not None and session.tokenizer is not None
    made = Panel(model=session.model, tokenizer=session.tokenizer) if own else Panel()
    session.leave(panel=made)
    return made


VERBS: tuple[Verb, ...] = (*NOTEBOOK, panel)
ARROW = "=>"
# Verbs that take the cell below the line, and the parameter that it becomes.
BODIES = {"train": "data", "generate": "prompts"}
HIDDEN = ("In", "Out", "exit", "quit", "open", "get_ipython")


@magics_class
class LoraMagics(Magics):
    """The magic. What it leaves for the next verb lies in the notebook's variables, where the reader can see and change it."""

    def __init__(self, shell: InteractiveShell) -> None:
        super().__init__(shell)
        self.notebook = shell
        self.base = ""
        self.made: nn.Module | None = None

    def session(self) -> Session:
        """The notebook as the verbs see it."""
        there: dict[str, Any] = {n: v for n, v in self.notebook.user_ns.items() if n not in HIDDEN}
        model, run = there.get("model"), there.get("run")
        return Session(
            say=_say,
            lasting=True,
            variables=there,
            model=model if isinstance(model, nn.Module) else None,
            tokenizer=there.get("tokenizer"),
            run=run if isinstance(run, Run) else None,
            base=self.base if model is self.made else "",
        )

    @no_var_expand
    @line_cell_magic
    def lora(self, line: str, cell: str | None = None) -> object:
        """Fine-tune, generate, merge and more: `%lora` lists the verbs, `%lora VERB --help` the options of one."""
        session = self.session()
        try:
            verb, arguments = self._parsed(line, cell, session)
            result = verb(session, **arguments)
        except HelpAsked as help_:
            print(help_, end="")  # noqa: T201 - what was asked for
            return None
        except LoraNbError as error:
            raise UsageError(str(error)) from None
        self._keep(session)
        return result

    def _parsed(self, line: str, cell: str | None, session: Session) -> tuple[Verb, dict[str, object]]:
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise ConfigError(f"%lora {line}: {str(error).lower()}: each quotation mark needs a second one.") from error
        if cell is None or not words or words[0] not in BODIES:
            if cell is not None and words:
                raise ConfigError(f"%%lora {words[0]} takes no cell below it, only {' and '.join(BODIES)} do: write %lora {words[0]}.")
            return parse(words, VERBS, session, "%lora")
        # The body stands for the words that the line would have.
        name = BODIES[words[0]]
        if len(words) > 1 and not words[1].startswith("-"):
            raise ConfigError(f"%%lora {words[0]}: {name} stand in the cell, so leave {words[1]!r} out of the line.")
        verb, arguments = parse([words[0], "…", *words[1:]], VERBS, session, "%%lora")
        return verb, arguments | {name: examples(cell) if name == "data" else prompts(cell)}

    def _keep(self, session: Session) -> None:
        if not session.named:
            return
        self.notebook.push(session.named)  # type: ignore[no-untyped-call]
        if "model" in session.named:
            self.base, self.made = session.base, session.model
        names = ", ".join(session.named)
        print(f"→ {names}")  # noqa: T201 - where to find it


def _say(thing: object) -> None:
    print(thing) if isinstance(thing, str) else display(thing)  # type: ignore[no-untyped-call] # noqa: T201 - this is how it is said


def examples(body: str) -> list[Any]:
    """The examples of a cell: `prompt => completion` a line, JSON Lines, or plain texts divided by blank lines.

    Raises:
        ConfigError: nothing in it, or a line unlike the others.
    """
    lines = [(i, line.strip()) for i, line in enumerate(body.splitlines(), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"%%lora train: the cell is empty. Write one example a line: formal {ARROW} informal.")
    if all(line.startswith("{") for _, line in lines):
        return [_json(i, line) for i, line in lines]
    if any(f" {ARROW}" in line for _, line in lines):
        return [_pair(i, line) for i, line in lines]
    return [text for text in (part.strip() for part in body.split("\n\n")) if text]


def _json(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ConfigError(f"%%lora train, line {number} of the cell is not JSON: {error}.") from error


def _pair(number: int, line: str) -> Pair:
    prompt, arrow, completion = line.partition(ARROW)
    if not arrow or not prompt.strip() or not completion.strip():
        raise ConfigError(f"%%lora train, line {number} of the cell is {line[:60]!r}: other lines say prompt {ARROW} completion.")
    return Pair(prompt.strip(), completion.strip())


def prompts(body: str) -> list[str]:
    """One a line."""
    found = [line.strip() for line in body.splitlines() if line.strip()]
    if not found:
        raise ConfigError("%%lora generate: the cell is empty. Write one prompt a line.")
    return found


def matcher(magics: LoraMagics) -> Any:
    """What Tab offers after `%lora`: that and nothing of Python's."""

    @context_matcher(identifier="lora_nb.matcher", priority=120)  # type: ignore[untyped-decorator]
    def lora_matcher(context: CompletionContext) -> Any:
        line = context.line_with_cursor
        head = line.lstrip()
        marks = ("%lora ", "%%lora ")
        if not head.startswith(marks) or (head.startswith("%%") and context.cursor_line > 0):
            return {"completions": []}
        typed = line[: context.cursor_position].split("lora ", 1)[1]
        session = magics.session()
        word = "" if not typed or typed[-1].isspace() else typed.split()[-1]
        # IPython asks Python where nothing is offered: then rather what stands there already.
        fits = [o for o in complete(typed, VERBS, session) if o.startswith(word)] or [word or "--help"]
        return {"completions": _completions(fits), "suppress": True, "matched_fragment": word, "ordered": True}

    return lora_matcher


def _completions(words: Iterable[str]) -> list[SimpleCompletion]:
    return [SimpleCompletion(text=shlex.quote(w) if " " in w else w, type="option") for w in words]


__all__ = ["VERBS", "LoraMagics", "examples", "matcher", "prompts"]
