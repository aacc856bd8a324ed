"""Two people on one notebook, with jupyter-collaboration: what one does with the panel, the other sees and may go on with."""

import re

import pytest

from tests.browser.conftest import COLLABORATION, OPEN

MINUTE = 60_000
PANEL = "import lora_nb as ln\nln.panel()"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(COLLABORATION is None, reason="needs jupyter-collaboration: LORA_NB_COLLABORATION=/path/to/python"),
]


def test_two_pages_share_one_panel(lab, second_lab, opened, run):
    mine = opened("shared.ipynb", PANEL).first
    run(mine)
    mine.get_by_label("Rank r").wait_for(timeout=2 * MINUTE)
    second_lab.evaluate(OPEN, "shared.ipynb")
    theirs = second_lab.locator(".jp-NotebookPanel:visible .jp-CodeCell").first
    theirs.get_by_label("Rank r").wait_for(timeout=MINUTE)

    mine.get_by_label("Rank r").select_option("8")
    theirs.get_by_text("218,112 of 6,021,376").wait_for()
    theirs.get_by_label("Steps").fill("2000")
    theirs.get_by_label("Steps").press("Tab")
    theirs.get_by_role("button", name="Train", exact=True).click()
    mine.get_by_text(re.compile(r"Step \d+ of 2000")).wait_for(timeout=MINUTE)
    mine.get_by_role("button", name="Stop", exact=True).click()
    for cell in (mine, theirs):
        cell.get_by_text(re.compile(r"Stopped after \d+ steps")).wait_for(timeout=MINUTE)
        assert re.match(r"step \d+: loss", cell.locator(".lora-said").last.inner_text())

    theirs.get_by_role("button", name="Show the code").click()
    theirs.get_by_role("button", name="Insert as a cell").click()
    for page in (lab, second_lab):
        inserted = page.locator(".jp-NotebookPanel:visible .jp-CodeCell").nth(1)
        inserted.get_by_text("max_steps=2000").wait_for()
        assert page.locator(".jp-NotebookPanel:visible .jp-CodeCell .jp-InputArea", has_text="max_steps=2000").count() == 1
