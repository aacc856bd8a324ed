"""`lora-nb VERB …`: the verbs of `commands` from a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lora_nb.commands import TERMINAL, Session
from lora_nb.commands.options import HelpAsked, parse
from lora_nb.errors import LoraNbError


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point; what lora_nb refuses ends with one line and status 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    session = Session()
    try:
        verb, options = parse(words, TERMINAL, session, "lora-nb")
        result = verb(session, **options)
    except HelpAsked as help_:
        print(help_, end="")
    except LoraNbError as error:
        print(error if str(error).startswith("lora-nb") else f"lora-nb: {error}", file=sys.stderr)
        sys.exit(2)
    else:
        if result is not None:
            print(result)


if __name__ == "__main__":
    main()
