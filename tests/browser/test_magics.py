"""`%lora` and `%%lora` typed into cells of a real JupyterLab: what Tab offers, what a cell leaves, what a wrong word gets."""

import re

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]
MINUTE = 60_000
METHODS = ["lora", "rslora", "dora", "houlsby", "pfeiffer", "parallel"]
MODULES = ["all-linear", "down_proj", "gate_proj", "k_proj", "lm_head", "o_proj", "q_proj", "up_proj", "v_proj"]
TRAIN = """%%lora train --max-steps 30 --r 4
Could you please close the window? => Can you close the window?
I do not know. => I don't know.
It is very late. => It's so late.
We shall depart tomorrow. => We're off tomorrow.
He is not here. => He's not here."""
GENERATE = """%%lora generate --pair --adapter default --max-new-tokens 8
I do not know.
It is very late."""
KEPT = """import lora_nb as ln
moved = any(p.any() for name, p in ln.parameters(model).items() if name.endswith("lora_B"))
run.stopped_by, 0 < run.steps < 5000, bool(moved)"""
LONG = TRAIN.replace("30 --r 4", "5000")


@pytest.fixture
def cells(lab, opened, request):
    """A notebook with the extension and the embedded base; gives what types a cell, and what runs it and gives its output."""
    found = opened(f"{request.node.name}.ipynb", "%load_ext lora_nb\n%lora load tiny")

    def typed(text):
        lab.keyboard.press("Escape")
        lab.keyboard.press("b")
        lab.keyboard.press("Enter")
        lab.keyboard.type(text)

    def ran(text):
        typed(text)
        lab.keyboard.press("Control+Enter")
        return lab.locator(".jp-CodeCell.jp-mod-active .jp-OutputArea")

    found.locator(".cm-content").click()
    lab.keyboard.press("Control+Enter")
    found.get_by_text("→ model, tokenizer").wait_for(timeout=2 * MINUTE)
    return typed, ran


def test_tab_offers_what_fits_and_nothing_else(lab, cells):
    """JupyterLab adds words of the cell behind them, which with an empty word are all of them."""
    typed, _ = cells
    line = lab.locator(".jp-CodeCell.jp-mod-active .cm-line")
    matches = lab.locator(".jp-Completer:visible .jp-Completer-match")

    def offers():
        lab.keyboard.press("Tab")
        matches.first.wait_for()
        return matches.all_inner_texts()

    typed("%lora attach --me")
    assert offers() == ["--method"]
    lab.keyboard.press("Enter")
    matches.first.wait_for(state="hidden")
    assert line.inner_text() == "%lora attach --method"
    for text, wanted in ((" ", METHODS), ("lora --target-modules ", MODULES)):
        lab.keyboard.type(text)
        assert offers()[: len(wanted)] == wanted
        lab.keyboard.press("Escape")
    lab.keyboard.type("q_proj --r")
    assert offers() == ["--r", "--reduction-factor"]
    lab.keyboard.press("Escape")


def test_five_lines_make_an_adapter_that_answers(cells):
    _, ran = cells
    out = ran(TRAIN)
    out.get_by_text("→ report, run").wait_for(timeout=MINUTE)
    out.get_by_text("30, stopped by max_steps").wait_for()
    answers = ran(GENERATE)
    answers.get_by_role("columnheader", name="default").wait_for(timeout=MINUTE)
    assert answers.get_by_role("columnheader", name="base").count() == 1
    assert answers.get_by_role("row").filter(has_text="It is very late.").count() == 1


def test_a_wrong_word_gets_one_line_and_an_interrupt_keeps_what_was_learnt(lab, cells):
    _, ran = cells
    for line, nearest in (
        ("%lora trian tone", "train"),
        ("%lora attach --metod dora", "--method"),
        ("%lora attach --method dorra", "dora"),
    ):
        said = ran(line).locator("[data-mime-type='application/vnd.jupyter.stderr']")
        said.wait_for(timeout=MINUTE)
        assert re.fullmatch(rf"UsageError: .*Did you mean '{nearest}'.*", said.inner_text().strip())
    out = ran(LONG)
    lab.locator(".jp-CodeCell.jp-mod-active .jp-InputPrompt", has_text="[*]").wait_for()
    lab.wait_for_timeout(2000)
    lab.keyboard.press("i")
    lab.keyboard.press("i")
    out.get_by_text("→ report, run").wait_for(timeout=MINUTE)
    kept = ran(KEPT)
    kept.get_by_text("('interrupt', True, True)").wait_for()
