"""Verbs about many adapters: what they take on disk, and a server of them."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated

from lora_nb.adapter_files import CONFIG
from lora_nb.bases import EMBEDDED, load
from lora_nb.commands.session import Session
from lora_nb.errors import AdapterFileError, ConfigError
from lora_nb.http_door import Door
from lora_nb.serving import AdapterServer
from lora_nb.storage import KINDS, StorageTable, storage, store

TOKEN = "LORA_NB_TOKEN"  # noqa: S105 - the name of the variable that has it


def adapters(
    session: Session,
    folder: Annotated[str, "folder whose subfolders are adapters"] = "adapters",
    *,
    base: Annotated[str, "tiny or a folder: whose size to compare with"] = "tiny",
    kind: Annotated[str, "store them in fewer bits as well, in --out", KINDS] = "",
    out: Annotated[str, "folder for the smaller ones"] = "",
) -> StorageTable:
    """Say what adapters take on disk, beside a whole model for each."""
    found = _saved(folder)
    if bool(kind) != bool(out):
        raise ConfigError("To store adapters in fewer bits name both: --kind fp16 --out FOLDER.")
    source = EMBEDDED.get(base, Path(base))
    size = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    if not size:
        raise ConfigError(f"There are no weights in {str(base)!r}: name the folder of a base, or tiny.")
    return storage([store(path, Path(out) / path.name, kind) for path in found] if kind else found, size)  # type: ignore[arg-type]


def serve(
    session: Session,
    folder: Annotated[str, "folder whose subfolders are adapters; no others can be asked for"] = "adapters",
    *,
    base: Annotated[str, "tiny, a folder, or a Hub id; default: the one in use, else tiny"] = "",
    port: Annotated[int, "on this machine's loopback address; 0: a free one"] = 0,
    device_slots: Annotated[int, "adapters that can act at the same time"] = 8,
    host_slots: Annotated[int, "further adapters kept in memory"] = 64,
    max_batch: Annotated[int, "texts written at the same time"] = 16,
) -> Door | None:
    """Serve the adapters of a folder over HTTP, as OpenAI's completions; the token is that of LORA_NB_TOKEN, or a new one."""
    _saved(folder)
    name = base or session.base or "tiny"
    model, tokenizer = load(name)  # one of its own: while it is served, no other verb may touch it
    token = os.environ.get(TOKEN) or secrets.token_urlsafe(24)
    server = AdapterServer(model, tokenizer, device_slots, host_slots, folder=folder, max_batch=max_batch)
    try:
        opened = Door(server, token, port, name)
    except BaseException:
        server.close()
        raise
    said = f"the token is that of {TOKEN}" if os.environ.get(TOKEN) else f"its token is {token}"
    session.say(f"{opened!r}; {said}; {'close()' if session.lasting else 'Ctrl-C'} ends it")
    if session.lasting:
        session.leave(door=opened, server=server)
        return opened
    try:
        opened.wait()
    except KeyboardInterrupt:
        session.say("stopping")
    finally:
        opened.close()
    return None


def _saved(folder: str) -> list[Path]:
    """Its adapters.

    Raises:
        AdapterFileError: there are none.
    """
    found = sorted(p.parent for p in Path(folder).glob(f"*/{CONFIG}"))
    if not found:
        raise AdapterFileError(f"{folder!r} has no adapters: each is a subfolder with {CONFIG}, as save(model, '{folder}/NAME') makes it.")
    return found
