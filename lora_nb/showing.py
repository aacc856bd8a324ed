"""The source that runs, as a picture of itself: what a lesson shows is never a copy that can drift."""

from __future__ import annotations

import html
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import lora_nb.layers
from lora_nb.errors import ConfigError, nearest

PACKAGE = "lora_nb"


@dataclass(frozen=True)
class Source:
    """The lines of a function, class or module, and where they stand: coloured in a notebook, plain elsewhere."""

    name: str
    place: str
    text: str

    def __repr__(self) -> str:
        return f"# {self.place}\n{self.text}"

    def _repr_html_(self) -> str:
        head = f'<figure style="margin:0" aria-label="source of {html.escape(self.name)}">'
        return f"{head}<figcaption><code>{html.escape(self.place)}</code></figcaption>{self._code()}</figure>"

    def _code(self) -> str:
        try:
            from pygments import highlight
            from pygments.formatters import HtmlFormatter
            from pygments.lexers import PythonLexer
        except ImportError:  # comes with IPython
            return f"<pre>{html.escape(self.text)}</pre>"
        # The colours of a notebook's own cells, so that they suit light and dark.
        style = "".join(f".lora-nb-source .{c}{{color:var({v},{f})}}" for c, v, f in COLOURS)
        return f"<style>{style}</style>" + str(
            highlight(self.text, PythonLexer(), HtmlFormatter(cssclass="lora-nb-source", nobackground=True))
        )


COLOURS = (
    ("k", "--jp-mirror-editor-keyword-color", "#007b00"),
    ("kn", "--jp-mirror-editor-keyword-color", "#007b00"),
    ("ow", "--jp-mirror-editor-keyword-color", "#007b00"),
    ("kc", "--jp-mirror-editor-keyword-color", "#007b00"),
    ("nf", "--jp-mirror-editor-def-color", "#00f"),
    ("nc", "--jp-mirror-editor-def-color", "#00f"),
    ("s1", "--jp-mirror-editor-string-color", "#a31515"),
    ("s2", "--jp-mirror-editor-string-color", "#a31515"),
    ("sa", "--jp-mirror-editor-string-color", "#a31515"),
    ("sd", "--jp-mirror-editor-comment-color", "#406a6a"),
    ("c1", "--jp-mirror-editor-comment-color", "#406a6a"),
    ("mi", "--jp-mirror-editor-number-color", "#707000"),
    ("mf", "--jp-mirror-editor-number-color", "#707000"),
)


def show(thing: str | Callable[..., Any] | type | ModuleType) -> Source:
    """The source of a function, class, method or module; of one of this package's also by name, as in `"LoraWeights.forward"`.

    Raises:
        ConfigError: no such name, or something that has no Python source.
    """
    target = found(thing) if isinstance(thing, str) else thing
    target = target.fget if isinstance(target, property) else target
    try:
        lines, start = inspect.getsourcelines(target)  # type: ignore[arg-type]
        module = inspect.getmodule(target)
    except (OSError, TypeError) as error:
        raise ConfigError(f"show({thing!r}): it has no Python source to show; give a function, a class, a method or a module.") from error
    name = getattr(target, "__qualname__", getattr(target, "__name__", str(thing)))
    place = f"{module.__name__.replace('.', '/')}.py, line {max(start, 1)}" if module else "this notebook"
    return Source(name, place, textwrap.dedent("".join(lines)).rstrip() + "\n")


def found(name: str) -> Any:
    """What a name means: `lora_nb.merge.merge`, `merge`, `LoraWeights.forward`, `layers.lora`.

    Raises:
        ConfigError: nothing in the package is called that.
    """
    short = name.removeprefix(f"{PACKAGE}.")
    modules = {m.__name__.removeprefix(f"{PACKAGE}."): m for m in _modules()}
    if short in modules:
        return modules[short]
    # The longest module first: `layers.lora.LoraWeights` is in `layers.lora`, not in something called layers.
    for path in sorted(modules, key=len, reverse=True):
        if short.startswith(f"{path}."):
            return _inside(modules[path], short.removeprefix(f"{path}."), name)
    head, _, rest = short.partition(".")
    own = {n: v for m in reversed(modules.values()) for n, v in vars(m).items() if getattr(v, "__module__", None) == m.__name__}
    if head in own:
        return _inside(own[head], rest, name)
    raise ConfigError(f"show({name!r}): nothing in {PACKAGE} is called {head!r}." + nearest(head, {n for n in own if n[0] != "_"}))


def _inside(thing: Any, path: str, asked: str) -> Any:
    for part in path.split(".") if path else ():
        if not hasattr(thing, part):
            there = [n for n in dir(thing) if not n.startswith("_")]
            raise ConfigError(f"show({asked!r}): {getattr(thing, '__name__', thing)} has no {part!r}." + nearest(part, there))
        thing = getattr(thing, part)
    return thing


def _modules() -> Iterator[ModuleType]:
    """The package's modules that need nothing beyond what it needs, the maths first."""
    yield from _under(lora_nb.layers)
    yield from (m for m in _under(lora_nb) if not m.__name__.startswith("lora_nb.layers"))


def _under(package: ModuleType) -> Iterator[ModuleType]:
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not any(word in info.name for word in ("jupyter", "triton", "http", "commands", "cli", "notebooks", "labextension")):
            yield importlib.import_module(info.name)
