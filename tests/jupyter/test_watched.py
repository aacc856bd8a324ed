"""A notebook that nobody watches keeps the panel as a table and a picture; one that is watched keeps the widget, too."""

import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter

VIEW = "application/vnd.jupyter.widget-view+json"
SOURCE = """import lora_nb as ln
from lora_nb.jupyter.settings import Settings
from lora_nb.jupyter.panel import Panel
p = Panel(Settings(r=2, lora_alpha=6, max_steps=3, batch_size=2))
p.train(); p.worker.wait()
p"""


@pytest.mark.slow
def test_nbconvert_shows_table_and_figure_without_a_network(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SOURCE)])
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    data = notebook.cells[0].outputs[-1].data
    assert VIEW not in data
    assert "trainable parameters" in data["text/plain"]
    page, _ = HTMLExporter().from_notebook_node(notebook)
    body = page[page.index("<body") :]
    assert "trainable parameters" in body
    assert "training loss" in body
    assert body.count("<svg") >= 2
    assert f'type="{VIEW}"' not in body


@pytest.mark.slow
def test_voila_shows_the_widget(tmp_path, monkeypatch):
    """It says in the environment that it is there, and runs the cells as nbconvert does."""
    monkeypatch.setenv("VOILA_BASE_URL", "/")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import lora_nb as ln\nln.panel()")])
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert VIEW in notebook.cells[0].outputs[-1].data
