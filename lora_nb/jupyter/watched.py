"""Whether anybody looks at the notebook, and what is shown if nobody does: a page without widgets keeps the table and the picture."""

from __future__ import annotations

import os
from typing import Any

from IPython.core.getipython import get_ipython

Bundle = tuple[dict[str, Any], dict[str, Any]]


def watched() -> bool:
    """Whether a person may be there: nbconvert, papermill and nbval run cells that may not ask for input, front ends those that may.

    Voilà runs them as nbconvert does, and then lets a person use what is there.
    """
    if "VOILA_BASE_URL" in os.environ:
        return True
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is None or bool(kernel.get_parent().get("content", {}).get("allow_stdin", True))


def beside(widget: Any, still: str, text: str) -> Bundle:
    """What a cell's output holds: the live widget if it is watched, a still page and a text.

    Args:
        widget: what ipywidgets has to say of it; nbconvert would rather show that, and then needs a network for it.
    """
    live, metadata = widget if isinstance(widget, tuple) else (widget or {}, {})
    return {**(live if watched() else {}), "text/html": still, "text/plain": text}, metadata
