"""`lora-nb VERB …`: the verbs of `commands.py` from a terminal."""

from __future__ import annotations

import argparse
import inspect
import sys
import typing
from collections.abc import Callable, Sequence

from lora_nb import commands
from lora_nb.errors import LoraNbError, nearest
from lora_nb.version import __version__


class _Parser(argparse.ArgumentParser):
    """argparse, but what is wrong gets one line."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: {message}. `{self.prog} --help` lists what there is.\n")


def parser() -> argparse.ArgumentParser:
    """Built from the signatures of the verbs."""
    top = _Parser(prog="lora-nb", description="Parameter-efficient fine-tuning, small enough to read.")
    top.add_argument("--version", action="version", version=f"lora-nb {__version__}")
    doors = top.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    for verb in commands.VERBS:
        _add_verb(doors, verb)
    return top


def _add_verb(doors: argparse._SubParsersAction[_Parser], verb: Callable[..., object]) -> None:
    said = (verb.__doc__ or "").splitlines()[0]
    door = doors.add_parser(verb.__name__, help=said, description=said, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    hints = typing.get_type_hints(verb, include_extras=True)
    for name, parameter in inspect.signature(verb).parameters.items():
        kind, said = typing.get_args(hints[name])
        if parameter.default is inspect.Parameter.empty:
            many = typing.get_origin(kind) is list
            door.add_argument(name, nargs="+" if many else None, type=typing.get_args(kind)[0] if many else kind, help=said)
        elif kind is bool:
            door.add_argument(_option(name), action="store_true", help=said)
        else:
            door.add_argument(_option(name), type=kind, default=parameter.default, help=said, metavar=kind.__name__.upper())


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point; what lora_nb refuses ends with one line and status 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    verbs = {verb.__name__: verb for verb in commands.VERBS}
    if words and not words[0].startswith("-") and words[0] not in verbs:
        sys.exit(f"lora-nb: there is no verb {words[0]!r}.{nearest(words[0], verbs)}")
    known, unknown = parser().parse_known_args(words)
    options = vars(known)
    if unknown:
        names = [_option(name) for name in options if name != "verb"]
        sys.exit(f"lora-nb {words[0]}: there is no option {unknown[0]!r}.{nearest(unknown[0], names)}")
    try:
        verbs[options.pop("verb")](**options)
    except LoraNbError as error:
        print(f"lora-nb: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
