"""The verb that opens the course."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import sys
from pathlib import Path
from typing import Annotated

from lora_nb.commands.session import Session
from lora_nb.errors import LoraNbError

PACKAGE = Path(__file__).parents[1]
COURSE = PACKAGE / "notebooks"  # in a wheel
CHECKOUT = PACKAGE.parent / "notebooks"  # in a checkout


def lab(
    session: Session,
    *,
    folder: Annotated[str, "folder with the notebooks; default: the course"] = "",
    port: Annotated[int, "0: the first free one from 8888 up"] = 0,
    no_browser: Annotated[bool, "only print the address"] = False,
    jupyter: Annotated[str, "further arguments for JupyterLab, in one string"] = "",
) -> None:
    """Open the course in JupyterLab, on its first notebook."""
    course = Path(folder) if folder else _course()
    port = port or _free_port()
    token = os.environ.setdefault("JUPYTER_TOKEN", secrets.token_hex(16))
    headless = sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    command = [sys.executable, "-m", "jupyterlab", str(course / "00_start.ipynb"), f"--port={port}", "--port-retries=0"]
    command += ["--log-level=WARN", "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    command += ["--no-browser"] if no_browser or headless else []
    command += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    print(f"The course opens at  http://localhost:{port}/lab/tree/00_start.ipynb?token={token}\nStop it with Ctrl-C.", flush=True)
    os.execv(sys.executable, [*command, *jupyter.split()])  # noqa: S606 - no shell is wanted


def _course() -> Path:
    """The notebooks of the checkout; from a wheel, a copy in the current folder, so that what is installed stays whole."""
    if (CHECKOUT / "00_start.ipynb").is_file():
        return CHECKOUT
    mine = Path.cwd() / "lora_nb_course"
    if not mine.exists():
        if not COURSE.is_dir():
            raise LoraNbError("This installation has no notebooks: install lora-nb from its wheel or run it from a checkout.")
        shutil.copytree(COURSE, mine)
    return mine


def _free_port() -> int:
    for port in range(8888, 8988):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):
                return port
    raise LoraNbError("No port between 8888 and 8987 is free: choose one with --port.")
