"""The verbs: one function each, whose signature is the one definition of its options for every door that leads to it.

`making.py` has those that make an adapter, `using.py` those that use it, `asking.py` those that answer before anything is spent,
`course.py` the one that opens the course;
`options.py` reads the signatures.
"""

from __future__ import annotations

from lora_nb.commands.asking import check, latency, memory, rank
from lora_nb.commands.course import lab
from lora_nb.commands.making import attach, load, save, train
from lora_nb.commands.options import Verb
from lora_nb.commands.serving import adapters, serve
from lora_nb.commands.session import Session
from lora_nb.commands.using import combine, generate, inspect, merge, show

# On a command line nothing lasts from one verb to the next, so those that only prepare are the notebook's.
ANYWHERE: tuple[Verb, ...] = (train, generate, inspect, memory, latency, rank, merge, combine, show, check, adapters, serve)
TERMINAL: tuple[Verb, ...] = (lab, *ANYWHERE)
NOTEBOOK: tuple[Verb, ...] = (load, attach, *ANYWHERE, save)

__all__ = [
    "ANYWHERE",
    "NOTEBOOK",
    "TERMINAL",
    "Session",
    "adapters",
    "attach",
    "check",
    "combine",
    "generate",
    "inspect",
    "lab",
    "latency",
    "load",
    "memory",
    "merge",
    "rank",
    "save",
    "serve",
    "show",
    "train",
]
