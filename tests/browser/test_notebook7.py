"""Panel and magics in Notebook 7, which has another shell around the same notebook."""

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]
MINUTE = 60_000


def test_panel_and_magics_work_there(page, notebook7, run):
    cells = notebook7("seven.ipynb", "%load_ext lora_nb\n%lora panel", "%lora attach --method ")
    run(cells.first)
    panel = cells.first
    panel.get_by_label("Rank r").wait_for(timeout=2 * MINUTE)
    panel.get_by_label("Rank r").focus()
    page.keyboard.press("ArrowUp")
    panel.get_by_text("218,112 of 6,021,376").wait_for()
    panel.get_by_label("Steps").fill("5")
    panel.get_by_label("Steps").press("Tab")
    panel.get_by_role("button", name="Train", exact=True).click()
    panel.get_by_text("Done after 5 steps").wait_for(timeout=MINUTE)
    panel.get_by_role("button", name="Show the code").click()
    panel.get_by_role("button", name="Insert as a cell").click()
    assert "max_steps=5," in cells.nth(1).locator(".cm-content").inner_text()
    page.keyboard.press("Shift+Enter")
    cells.nth(1).locator(".jp-OutputArea-output", has_text="5, stopped by max_steps").wait_for(timeout=MINUTE)
    cells.nth(2).locator(".cm-content").click()
    page.keyboard.press("End")
    page.keyboard.press("Tab")
    page.locator(".jp-Completer:visible .jp-Completer-match", has_text="houlsby").wait_for()
