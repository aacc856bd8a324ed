"""A verb's options, read off its signature: the parser, the help and the completion of both doors come from here.

A verb is a function of a `Session` and its own parameters: those that can stand by position are words of the line, keyword-only
ones are options. `Annotated[type, "help"]` carries the help; `Annotated[type, "help", choices]` the values, too: a tuple of those
allowed, or a function of the session that suggests some.
"""

from __future__ import annotations

import argparse
import inspect
import shlex
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from lora_nb.commands.session import Session
from lora_nb.errors import ConfigError, LoraNbError, nearest
from lora_nb.version import __version__

Verb = Callable[..., object]
Suggest = Callable[[Session], Iterable[str]]


@dataclass(frozen=True)
class Option:
    """One parameter of a verb; `word` is whether it stands by position, `many` whether it takes several values."""

    name: str
    kind: type
    said: str
    default: object
    word: bool
    many: bool
    choices: tuple[str, ...] | Suggest = ()

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    def suggestions(self, session: Session) -> list[str]:
        """Values to offer."""
        return list(self.choices(session) if callable(self.choices) else self.choices)


def options(verb: Verb) -> list[Option]:
    """What the verb takes, in the order of its signature, without the session."""
    hints = typing.get_type_hints(verb, include_extras=True)
    return [_option(p, *typing.get_args(hints[n])) for n, p in inspect.signature(verb).parameters.items() if n != "session"]


def _option(parameter: inspect.Parameter, kind: typing.Any, said: str, choices: tuple[str, ...] | Suggest = ()) -> Option:
    many = typing.get_origin(kind) is list
    kinds = [k for k in typing.get_args(kind) if k is not type(None)] if many or typing.get_args(kind) else [kind]
    word = parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    return Option(parameter.name, kinds[0], said, parameter.default, word, many, choices)


class RefusedError(LoraNbError):
    """A line that is no verb with its options; the message says what is wrong, in one line."""


class HelpAsked(LoraNbError):  # noqa: N818 - no error
    """A line that asks for help; the message is the help."""


class _Parser(argparse.ArgumentParser):
    """argparse that neither prints nor exits."""

    def error(self, message: str) -> typing.NoReturn:
        raise RefusedError(f"{self.prog}: {message}. `{self.prog} --help` lists what there is.")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says a default where there is one to say."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


class _Help(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> typing.NoReturn:
        raise HelpAsked(parser.format_help())


def overview(verbs: Sequence[Verb], prog: str) -> str:
    """All verbs with their first lines."""
    width = max(len(v.__name__) for v in verbs)
    lines = [f"  {v.__name__.ljust(width)}  {first_line(v)}" for v in verbs]
    return "\n".join(
        [f"{prog} VERB …: parameter-efficient fine-tuning, small enough to read.", "", *lines, "", f"{prog} VERB --help says more."]
    )


def first_line(verb: Verb) -> str:
    """The first line of its docstring."""
    return (verb.__doc__ or "").splitlines()[0]


def parse(words: Sequence[str], verbs: Sequence[Verb], session: Session, prog: str) -> tuple[Verb, dict[str, object]]:
    """The verb and its arguments.

    Raises:
        HelpAsked: for help.
        RefusedError: a wrong word, with the nearest right one; or `$name` without such a variable.
    """
    if not words or words[0] in {"--help", "-h", "help"}:
        raise HelpAsked(overview(verbs, prog) + "\n")
    if words[0] == "--version":
        raise HelpAsked(f"lora-nb {__version__}\n")
    named = {v.__name__: v for v in verbs}
    if words[0] not in named:
        raise RefusedError(f"{prog}: there is no verb {words[0]!r}." + nearest(words[0], named))
    verb = named[words[0]]
    known, unknown = _parser(verb, session, prog).parse_known_args(list(words[1:]))
    flags = [o.flag for o in options(verb) if not o.word]
    if unknown:
        kind = "option" if unknown[0].startswith("-") else "place for"
        raise RefusedError(f"{prog} {words[0]}: there is no {kind} {unknown[0]!r}." + nearest(unknown[0], flags))
    return verb, vars(known)


def _parser(verb: Verb, session: Session, prog: str) -> _Parser:
    parser = _Parser(
        prog=f"{prog} {verb.__name__}",
        description=first_line(verb),
        formatter_class=_Formatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--help", "-h", action=_Help, nargs=0, default=argparse.SUPPRESS, help="this help")
    for option in options(verb):
        _add(parser, option, session)
    return parser


def _add(parser: _Parser, option: Option, session: Session) -> None:
    said = option.said.replace("%", "%%")
    if option.kind is bool:
        parser.add_argument(option.flag, action="store_true", help=said)
        return
    kind = _Converter(option, session)
    default = None if option.required else option.default
    if option.word:
        nargs = ("+" if option.required else "*") if option.many else (None if option.required else "?")
        parser.add_argument(option.name, nargs=nargs, type=kind, default=default, help=said)
    else:
        many = {"nargs": "+"} if option.many else {}
        parser.add_argument(option.flag, type=kind, default=default, help=said, metavar=_metavar(option), **many)  # type: ignore[arg-type]


def _metavar(option: Option) -> str:
    return "{" + ",".join(option.choices) + "}" if isinstance(option.choices, tuple) and option.choices else option.kind.__name__.upper()


class _Converter:
    """From a word of the line to a value: `$name` is the notebook's variable."""

    def __init__(self, option: Option, session: Session) -> None:
        self.option, self.session = option, session
        self.__name__ = option.kind.__name__  # argparse says it

    def __call__(self, word: str) -> object:
        if word == self.option.default:  # argparse converts text defaults, too
            return word
        value = self._meant(word)
        if isinstance(value, str) or self.option.kind is not str:
            value = self.option.kind(value)
        allowed = self.option.choices
        if isinstance(allowed, tuple) and allowed and value not in allowed:
            raise argparse.ArgumentTypeError(f"{value!r}:" + nearest(str(value), allowed).rstrip("."))
        return value

    def _meant(self, word: str) -> object:
        if not (word.startswith("$") and word[1:].isidentifier()):
            return word
        try:
            return self.session.variable(word[1:])
        except ConfigError as error:  # a ValueError, of which argparse would forget what it says
            raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None


def complete(line: str, verbs: Sequence[Verb], session: Session) -> list[str]:
    """What may stand where the last word of `line` does; the line is what follows `%lora` or `lora-nb`."""
    words = _split(line)
    if len(words) <= 1:
        return [v.__name__ for v in verbs]
    verb = next((v for v in verbs if v.__name__ == words[0]), None)
    if verb is None:
        return []
    return list(dict.fromkeys(_offers(words, options(verb), session)))


def _offers(words: list[str], known: list[Option], session: Session) -> Iterator[str]:
    flags = {o.flag: o for o in known if not o.word}
    open_flag = next((flags[w] for w in reversed(words[1:-1]) if w in flags), None)
    before = words[-2]
    if before in flags and flags[before].kind is not bool:
        yield from flags[before].suggestions(session)
        return
    if words[-1].startswith("-"):
        yield from (f for f in flags if f not in words[1:-1])
        yield "--help"
        return
    if words[-1].startswith("$"):
        yield from (f"${n}" for n in session.variables if not n.startswith("_"))
        return
    if open_flag is not None and open_flag.many:
        yield from open_flag.suggestions(session)
    for option in known:
        if option.word:
            yield from option.suggestions(session)
    yield from (f for f in flags if f not in words[1:-1])


def _split(line: str) -> list[str]:
    """Words as a shell would see them; the last one is the one being written, and may be empty or an open quotation."""
    try:
        words = shlex.split(line)
    except ValueError:
        words = line.split()
    return [*words, ""] if not line or line[-1].isspace() else words
