"""The control panel as a person uses it, in a real JupyterLab: choose, read, train, stop, resume, and run the code that it shows."""

import os
import re
from pathlib import Path

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
def shown(opened, run):
    """Opens a notebook with the panel, and gives the panel's cell once it is there."""

    def show(name="panel.ipynb", *more):
        cell = opened(name, PANEL, *more).first
        run(cell)
        cell.get_by_label("Rank r").wait_for(timeout=2 * MINUTE)
        return cell

    return show


def press(cell, *names):
    for name in names:
        cell.get_by_role("button", name=name, exact=True).click()


def test_from_a_choice_to_the_same_adapter_from_its_code(lab, shown, run):
    cell = shown("panel.ipynb", SAME)
    cell.get_by_label("Rank r").select_option("8")
    cell.get_by_text("218,112 of 6,021,376").wait_for()
    cell.get_by_label("Target modules").select_option(["q_proj (6), 256 × 256", "v_proj (6), 256 × 256"])
    cell.get_by_text("49,152 of 5,852,416").wait_for()
    cell.get_by_label("Steps").fill("60")
    cell.get_by_label("Batch").fill("4")
    cell.get_by_label("Batch").press("Tab")
    press(cell, "Train")
    cell.get_by_text(re.compile(r"Step \d+ of 60")).wait_for(timeout=MINUTE)
    press(cell, "Stop")
    cell.get_by_text(re.compile(r"Stopped after \d+ steps")).wait_for(timeout=MINUTE)
    press(cell, "Resume")
    cell.get_by_text("Done after 60 steps").wait_for(timeout=2 * MINUTE)
    press(cell, "Show the code")
    assert "target_modules=['q_proj', 'v_proj']" in cell.get_by_role("textbox", name="Code", exact=True).input_value()
    second = lab.locator(".jp-CodeCell").nth(1)
    run(second)
    second.get_by_text("the same adapter: True").wait_for(timeout=2 * MINUTE)


def test_by_keyboard_alone_from_top_to_bottom(lab, shown, save, workspace):
    """No click after the first: Tab goes on from field to field, arrows and letters change what has the focus and nothing else."""
    cell = shown("keys.ipynb")
    lab.keyboard.press("Escape")
    lab.evaluate("document.querySelector('.lora-panel input').focus()")
    keys = lab.keyboard

    def go(wanted, key="Tab"):
        for _ in range(40):
            if wanted.evaluate("element => element === document.activeElement"):
                return
            keys.press(key)
        pytest.fail(f"{key} never comes to {wanted}")

    def button(name, key="Tab"):
        there = cell.get_by_role("button", name=name, exact=True, disabled=False)
        there.wait_for()
        go(there, key)
        keys.press("Enter")

    go(cell.get_by_label("Steps"))
    keys.type("40")
    go(cell.get_by_label("Rank r"))
    keys.press("ArrowUp")
    cell.get_by_text("218,112 of 6,021,376").wait_for()
    go(cell.get_by_label("Target modules"))
    keys.press("ArrowDown")
    cell.get_by_text("24,576 of 5,827,840").wait_for()
    keys.press("b")
    button("Train")
    cell.get_by_text(re.compile(r"Step \d+ of 40")).wait_for(timeout=MINUTE)
    button("Stop")
    cell.get_by_text(re.compile(r"Stopped after \d+ steps")).wait_for(timeout=MINUTE)
    button("Resume")
    cell.get_by_text("Done after 40 steps").wait_for(timeout=2 * MINUTE)
    button("Save")
    cell.get_by_text("Saved in adapters/panel").wait_for()
    assert (workspace / "adapters/panel/adapter_model.safetensors").exists()
    button("Show the code", "Shift+Tab")
    go(cell.get_by_role("textbox", name="Code", exact=True))
    button("Insert as a cell")
    assert lab.locator(".jp-CodeCell").count() == 3, "the panel's, the new one, the empty one that Shift+Enter left"
    second = lab.locator(".jp-CodeCell").nth(1)
    assert "max_steps=40" in second.inner_text()
    keys.press("Shift+Enter")
    second.locator(".jp-OutputArea-output", has_text="40, stopped by max_steps").wait_for(timeout=2 * MINUTE)
    save()
    outputs = nbformat.read(workspace / "keys.ipynb", 4).cells[0].outputs
    assert ["trainable parameters" in o.data["text/html"] and "<svg" in o.data["text/html"] for o in outputs] == [True]


def test_two_notebooks_at_once_and_a_restart_in_the_midst(lab, command, shown, run, workspace):
    for name in ("one.ipynb", "two.ipynb"):
        cell = shown(name)
        cell.get_by_label("Steps").fill("5000" if name == "one.ipynb" else "60")
        cell.get_by_label("Batch").fill("2")
        cell.get_by_label("Batch").press("Tab")
        press(cell, "Train")
        cell.get_by_text(re.compile(r"Step \d+ of")).wait_for(timeout=MINUTE)
    command("docmanager:open", path="one.ipynb")
    lab.get_by_text(re.compile(r"Step \d+ of 5000")).wait_for()
    command("kernelmenu:restart")
    lab.get_by_role("button", name="Confirm Kernel Restart").click()
    first = lab.locator(".jp-NotebookPanel:visible .jp-CodeCell").first
    lab.evaluate("jupyterapp.shell.currentWidget.context.sessionContext.session.kernel.info")
    run(first)
    first.get_by_text("Step ").wait_for(state="detached", timeout=MINUTE)
    first.get_by_label("Steps").fill("3")
    first.get_by_label("Steps").press("Tab")
    press(first, "Train")
    first.get_by_text("Done after 3 steps").wait_for(timeout=MINUTE)
    command("docmanager:open", path="two.ipynb")
    lab.get_by_text("Done after 60 steps").wait_for(timeout=2 * MINUTE)
    assert len(list(workspace.glob("runs/tone-*/log.jsonl"))) >= 3


def test_hostile_names_stay_text(lab, shown):
    cell = shown("hostile.ipynb")
    for name in ("<img src=x onerror=alert(1)>", '"; rm -rf /', "محوّل", "x" * 5000):
        cell.get_by_label("Base").fill(name)
        cell.get_by_role("alert").get_by_text(name[:40]).first.wait_for()
    assert lab.locator("img[src=x]").count() == 0


def test_axe_finds_no_barrier_in_light_or_dark(shown, axe, theme):
    cell = shown("axe.ipynb")
    press(cell, "Show the code")
    cell.get_by_role("textbox", name="Code", exact=True).wait_for()
    for name in ("Dark", "Light"):
        theme(name)
        assert axe(".jp-CodeCell .jp-OutputArea") == []


@pytest.mark.skipif("LORA_NB_SCREENSHOTS" not in os.environ, reason="only for the picture: LORA_NB_SCREENSHOTS=docs")
def test_picture_for_the_readme(lab, shown):
    lab.set_viewport_size({"width": 1180, "height": 2000})
    cell = shown("picture.ipynb")
    cell.get_by_label("Steps").fill("80")
    cell.get_by_label("Steps").press("Tab")
    press(cell, "Train")
    cell.get_by_text("Done after 80 steps").wait_for(timeout=5 * MINUTE)
    press(cell, "Show the code")
    cell.locator(".lora-panel").screenshot(path=Path(os.environ["LORA_NB_SCREENSHOTS"]) / "panel.png")
