"""Verbs that use what there is: generate, inspect, merge, combine, show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from torch import nn

from lora_nb.adapter_files import CONFIG
from lora_nb.attach import adapters, disabled
from lora_nb.attach_report import AttachReport
from lora_nb.checkpoint import load_adapter, save
from lora_nb.combine import METHODS as COMBINATIONS
from lora_nb.combine import combine as combine_adapters
from lora_nb.commands.session import Session
from lora_nb.datasets import prompt_of
from lora_nb.errors import AdapterError, ConfigError, nearest
from lora_nb.generation import generate as generate_text
from lora_nb.merge import MergeReport
from lora_nb.merge import merge as merge_adapters
from lora_nb.render import html_table, text_table
from lora_nb.showing import Source
from lora_nb.showing import show as show_source
from lora_nb.summary import AdapterSummary
from lora_nb.summary import inspect as inspect_adapter

MOST_FOLDERS = 2000  # looked at for adapters; a home folder holds more than anyone wants to wait for


def saved_adapters(session: Session) -> Iterator[str]:
    """Folders of adapters at most three levels below this one."""
    looked = 0
    for pattern in ("*", "*/*", "*/*/*"):
        for path in sorted(Path().glob(f"{pattern}/{CONFIG}")):
            looked += 1
            if looked > MOST_FOLDERS:
                return
            if not any(part.startswith(".") for part in path.parts):
                yield path.parent.as_posix()


def adapter_names(session: Session) -> Iterator[str]:
    """Adapters on the model, then those in folders."""
    yield from adapters(session.model).reports if session.model is not None else ()
    yield from saved_adapters(session)


@dataclass(frozen=True)
class Answers:
    """What each of several, the base first, wrote after each prompt."""

    prompts: list[str]
    texts: dict[str, list[str]]

    def _lines(self, i: int) -> list[tuple[str, str]]:
        return [(who, " ".join(texts[i].split())) for who, texts in self.texts.items()]

    def __repr__(self) -> str:
        return "\n\n".join(text_table([prompt, ""], self._lines(i)) for i, prompt in enumerate(self.prompts))

    def _repr_html_(self) -> str:
        rows = [(prompt, *(text for _, text in self._lines(i))) for i, prompt in enumerate(self.prompts)]
        return html_table(["prompt", *self.texts], rows)


def put_on(session: Session, model: nn.Module, wanted: str) -> str:
    """The name of an adapter on the model, or of one that is loaded from a folder for it; the active ones stay so."""
    there = adapters(model)
    if wanted in there.reports:
        return wanted
    if not Path(wanted).is_dir() and there.reports:
        raise AdapterError(
            f"There is neither an adapter {wanted!r} on the model nor such a folder." + nearest(wanted, adapter_names(session))
        )
    name = _free(Path(wanted).name or "default", there.reports)
    load_adapter(model, wanted, name)
    return name


def _free(name: str, taken: Any) -> str:
    """A name for an adapter made from that of its folder."""
    plain = "".join(c if c.isalnum() or c in "-_ " else "-" for c in name).lstrip("-_ ") or "adapter"
    return plain if plain not in taken else next(f"{plain}-{i}" for i in range(2, len(taken) + 3) if f"{plain}-{i}" not in taken)


def generate(
    session: Session,
    prompts: Annotated[list[str], "what to continue; several are answered in one batch"],
    *,
    base: Annotated[str, "tiny, a folder, or a Hub id; default: what is loaded, else tiny"] = "",
    adapter: Annotated[list[str], "adapters on the model or folders; their answers stand beside the base's", adapter_names] = (),  # type: ignore[assignment]
    pair: Annotated[bool, "write each prompt as in training on pairs: 'prompt =>'"] = False,
    max_new_tokens: Annotated[int, "most tokens to write"] = 60,
    temperature: Annotated[float, "0: always the likeliest token"] = 0.0,
    seed: Annotated[int, "of the drawing"] = 0,
) -> Answers:
    """Let a base write, and beside it the same base with adapters."""
    model, tokenizer = session.open(base)
    written = [prompt_of(p) if pair else p for p in prompts]
    before = adapters(model).active
    who = [put_on(session, model, wanted) for wanted in adapter] or list(before)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    with disabled(model) if adapters(model).reports else nullcontext():
        texts = {"base": generate_text(model, tokenizer, written, **settings)}
    for shown, name in zip(adapter or who, who, strict=True):
        texts[shown] = generate_text(model, tokenizer, written, adapter=name, **settings)
    answers = Answers(list(prompts), texts)  # type: ignore[arg-type]
    session.leave(answers=answers)
    return answers


def inspect(session: Session, path: Annotated[str, "folder of a saved adapter", saved_adapters]) -> AdapterSummary:
    """Say what a saved adapter is, without loading a model."""
    return inspect_adapter(path)


def merge(
    session: Session,
    adapter: Annotated[list[str], "adapters on the model or folders; default: the active ones", adapter_names] = (),  # type: ignore[assignment]
    *,
    base: Annotated[str, "tiny, a folder, or a Hub id; default: what is loaded, else tiny"] = "",
    into: Annotated[str, "over a base in 4 bits: what the weights become", ("dequantized", "requantized")] = "dequantized",
    out: Annotated[str, "folder for the merged model, which needs no adapter any more"] = "",
) -> MergeReport:
    """Put adapters into the base's weights, and say how much of each update arrived."""
    if not session.lasting and not out:
        raise ConfigError("merge has nowhere to leave its result: name a folder with --out.")
    model, tokenizer = session.open(base)
    names = [put_on(session, model, wanted) for wanted in adapter]
    report = merge_adapters(model, names or None, into=into)  # type: ignore[arg-type]
    session.leave(merged=report)
    if out:
        model.save_pretrained(out)  # type: ignore[operator]
        tokenizer.save_pretrained(out)
        session.say(f"saved in {out}")
    return report


def combine(
    session: Session,
    adapter: Annotated[list[str], "adapters on the model or folders, two or more", adapter_names],
    *,
    weights: Annotated[list[float], "one for each; default: equal shares"] = (),  # type: ignore[assignment]
    method: Annotated[str, "how", COMBINATIONS] = "cat",
    density: Annotated[float | None, "share of the entries to keep, for the methods that drop some"] = None,
    name: Annotated[str, "of the new adapter"] = "combined",
    base: Annotated[str, "tiny, a folder, or a Hub id; default: what is loaded, else tiny"] = "",
    out: Annotated[str, "folder to save it in"] = "",
) -> AttachReport:
    """Make one adapter out of several."""
    if not session.lasting and not out:
        raise ConfigError("combine has nowhere to leave its result: name a folder with --out.")
    if weights and len(weights) != len(adapter):
        raise ConfigError(f"combine has {len(adapter)} adapters and {len(weights)} weights: give one weight for each, or none.")
    model, _ = session.open(base)
    names = [put_on(session, model, wanted) for wanted in adapter]
    shares = dict(zip(names, weights or [1 / len(names)] * len(names), strict=True))
    report = combine_adapters(model, shares, method, name, density=density)
    session.leave(report=report)
    if out:
        session.say(f"saved in {save(model, out, name)}")
    return report


def show(session: Session, name: Annotated[str, "a function, class, method or file of lora_nb, or $variable"]) -> Source:
    """Show the source that runs."""
    return show_source(name)
