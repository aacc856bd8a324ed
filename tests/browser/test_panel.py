"""The control panel as a person uses it, in a real JupyterLab: choose, read, train, stop, resume, and run the code that it shows."""

import re

import nbformat
import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]
MINUTE = 60_000
PANEL = "import lora_nb as ln\np = ln.panel()\np"
SAME = """import torch
made = {}
exec(p.code.value, made)
theirs = ln.parameters(made["model"])
"the same adapter: " + str(all(torch.equal(v, theirs[k]) for k, v in ln.parameters(p.model).items()))"""


@pytest.fixture
def cell(lab, command, workspace):
    """A notebook with the panel and one more cell, the first of which was run."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (PANEL, SAME)])
    made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(made, workspace / "panel.ipynb")
    command("docmanager:open", path="panel.ipynb")
    lab.locator(".jp-NotebookPanel .jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for(timeout=MINUTE)
    lab.locator(".jp-NotebookPanel .jp-Spinner").wait_for(state="detached", timeout=MINUTE)
    lab.locator(".jp-CodeCell .cm-content").first.click()
    lab.keyboard.press("Shift+Enter")
    found = lab.locator(".jp-CodeCell").first
    found.get_by_label("Rank r").wait_for(timeout=2 * MINUTE)
    return found


def test_from_a_choice_to_the_same_adapter_from_its_code(lab, cell):
    cell.get_by_label("Rank r").select_option("8")
    cell.get_by_text("218,112 of 6,021,376").wait_for()
    cell.get_by_label("Target modules").select_option(["q_proj (6), 256 × 256", "v_proj (6), 256 × 256"])
    cell.get_by_text("49,152 of 5,852,416").wait_for()
    cell.get_by_label("Steps").fill("60")
    cell.get_by_label("Batch").fill("4")
    cell.get_by_label("Batch").press("Tab")
    cell.get_by_role("button", name="Train", exact=True).click()
    cell.get_by_text(re.compile(r"Step \d+ of 60")).wait_for(timeout=MINUTE)
    cell.get_by_role("button", name="Stop", exact=True).click()
    cell.get_by_text(re.compile(r"Stopped after \d+ steps")).wait_for(timeout=MINUTE)
    cell.get_by_role("button", name="Resume", exact=True).click()
    cell.get_by_text("Done after 60 steps").wait_for(timeout=2 * MINUTE)
    cell.get_by_role("button", name="Show the code", exact=True).click()
    assert "target_modules=['q_proj', 'v_proj']" in cell.get_by_role("textbox", name="Code", exact=True).input_value()
    second = lab.locator(".jp-CodeCell").nth(1)
    second.locator(".cm-content").click()
    lab.keyboard.press("Shift+Enter")
    second.get_by_text("the same adapter: True").wait_for(timeout=2 * MINUTE)


def test_hostile_names_stay_text(lab, cell):
    for name in ("<img src=x onerror=alert(1)>", '"; rm -rf /', "محوّل", "x" * 5000):
        cell.get_by_label("Base").fill(name)
        cell.get_by_role("alert").get_by_text(name[:40]).first.wait_for()
    assert lab.locator("img[src=x]").count() == 0


@pytest.mark.usefixtures("cell")
def test_axe_finds_no_barrier_in_light_or_dark(axe, theme):
    for name in ("Dark", "Light"):
        theme(name)
        assert axe(".jp-CodeCell .jp-OutputArea") == []
