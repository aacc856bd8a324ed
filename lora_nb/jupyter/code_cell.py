"""The code that the panel shows, and two buttons that take it into a cell."""

from __future__ import annotations

import anywidget
import traitlets

from lora_nb.jupyter.charts import STYLE, module


class CodeCell(anywidget.AnyWidget):
    """Code, to be read, changed, and inserted below the cell that shows it, which our JupyterLab extension does; else it is copied."""

    _esm = module("dom", "code")
    _css = STYLE
    value = traitlets.Unicode().tag(sync=True)
