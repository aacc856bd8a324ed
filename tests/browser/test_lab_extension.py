"""Launcher, palette and side panel in a real JupyterLab."""

import json

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]
RUN = """import lora_nb as ln
from lora_nb.training.run import Run
run = Run("<img src=x onerror=alert(1)>", ln.TrainConfig(max_steps=2), losses=[2.0, 1.5], stopped_by="callback")
print("made")"""

RUN_ALL = """async (path) => { const notebook = await jupyterapp.commands.execute('docmanager:open', { path });
  await notebook.context.sessionContext.ready; void jupyterapp.commands.execute('notebook:run-all-cells'); }"""


def notebook(path, *sources):
    cells = [
        {"cell_type": "code", "id": f"c{i}", "source": s, "metadata": {}, "outputs": [], "execution_count": None}
        for i, s in enumerate(sources)
    ]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    path.write_text(json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))


def test_launcher_and_palette_have_the_three(lab, command):
    lab.evaluate("jupyterapp.commands.execute('launcher:create').then(() => null)")  # one that comes late would close the palette
    labels = {"LoRA: open the course", "LoRA: new notebook with panel", "LoRA: run all checks"}
    lab.wait_for_selector(".jp-LauncherCard[data-category='LoRA']")
    cards = lab.locator(".jp-LauncherCard[data-category='LoRA']").all_inner_texts()
    assert {text.strip() for text in cards} == labels
    command("apputils:activate-command-palette")
    lab.locator(".lm-CommandPalette-input:visible").fill("LoRA:")
    found = lab.locator(".lm-CommandPalette-itemLabel").all_inner_texts()
    assert labels <= set(found)


def test_course_opens_or_is_told_where_it_is(lab, command, workspace):
    command("lora-nb:course")
    dialog = lab.get_by_role("dialog")
    dialog.get_by_text("lora-nb lab").wait_for()
    lab.keyboard.press("Enter")
    dialog.wait_for(state="detached")
    (workspace / "notebooks").mkdir()
    notebook(workspace / "notebooks/00_start.ipynb", "1 + 1")
    command("lora-nb:course")
    lab.get_by_role("tab", name="00_start.ipynb").wait_for()


def test_checks_are_run_from_a_fresh_kernel(lab, command, workspace):
    notebook(workspace / "checks.ipynb", "print('checked', 6 * 7)")
    command("docmanager:open", path="checks.ipynb")
    lab.locator(".jp-CodeCell").wait_for()
    command("lora-nb:check")
    lab.get_by_role("button", name="Confirm Kernel Restart").click()
    lab.get_by_text("checked 42").wait_for(timeout=60_000)


def test_panel_has_a_notebook_of_its_own(lab, command, workspace):
    (workspace / "below").mkdir()
    command("lora-nb:panel", cwd="below")
    lab.locator(".jp-CodeCell .jp-InputArea-editor", has_text="ln.panel()").wait_for()
    lab.locator(".jp-CodeCell .jp-InputPrompt", has_text="[1]:").wait_for(timeout=60_000)
    assert (workspace / "below/Untitled.ipynb").exists()


def test_charts_live_in_a_notebook_and_stay_in_it_as_pictures(lab, workspace, theme, axe, save):
    source = """from lora_nb.jupyter.charts import HeatMap, LossChart
from IPython.display import display
chart = LossChart([3.0, 2.0])
display(chart, HeatMap({f"layers.{i}.<img src=x onerror=alert(1)>": i + 1.0 for i in range(2)}))
chart.add(3, 1.5)
chart.flush()"""
    notebook(workspace / "charts.ipynb", source)
    lab.evaluate(RUN_ALL, "charts.ipynb")
    lab.locator(".lora-said", has_text="step 3: loss 1.5").wait_for(timeout=120_000)
    assert lab.locator(".lora-heat td[tabindex]").all_inner_texts() == ["1", "2"]
    lab.get_by_role("slider").focus()
    lab.keyboard.press("Home")
    lab.locator(".lora-said", has_text="step 1: loss 3").wait_for()
    for name in ("Light", "Dark"):
        theme(name)
        assert axe(".jp-OutputArea-output .lora-chart") == []
    save()
    saved = json.loads((workspace / "charts.ipynb").read_text())["cells"][0]["outputs"]
    pictures = [output["data"]["text/html"] for output in saved if "text/html" in output.get("data", {})]
    assert len(pictures) == 2
    assert all("<svg" in "".join(picture) for picture in pictures)


def test_side_panel_tells_of_machine_runs_and_adapters(command, workspace, theme, axe, lab):
    (workspace / "deep/adapters/tone").mkdir(parents=True)
    (workspace / "deep/adapters/tone/adapter_config.json").write_text('{"peft_type": "LORA"}')
    notebook(workspace / "run.ipynb", RUN)
    lab.evaluate(RUN_ALL, "run.ipynb")
    lab.locator(".jp-OutputArea-output", has_text="made").wait_for(timeout=120_000)
    command("lora-nb:side")
    side = lab.locator(".lora-side")
    side.get_by_text("stopped by callback, 2 steps, loss 1.5").wait_for()
    assert "<img src=x onerror=alert(1)>" in side.inner_text()
    assert side.locator("meter").first.evaluate("m => m.value / m.max") > 0
    side.get_by_role("button", name="deep/adapters/tone").wait_for()
    for name in ("Light", "Dark"):
        theme(name)
        assert axe(".lora-side") == []
    side.get_by_role("button", name="deep/adapters/tone").press("Enter")
    lab.get_by_role("alert").get_by_text("adapter_model.safetensors is not here").wait_for()
