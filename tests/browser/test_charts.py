"""The charts in a real browser, without Jupyter: what they show, what keys do, and that a name stays a name."""

import re

import pytest

from lora_nb.jupyter.charts import AdapterCompare, HeatMap, LossChart, MemoryChart
from lora_nb.jupyter.code_cell import CodeCell

pytestmark = [pytest.mark.browser]

HOSTILE = '<img src=x onerror="window.hacked = true">'
RTL = "محوّل"
LONG = "x" * 5000
GB = 1e9


def compare() -> AdapterCompare:
    return AdapterCompare({"tone": {"rank": 8, "base": "tiny", "sample": "Could you?"}, "topics": {"rank": 2, "base": "tiny"}})


def heat() -> HeatMap:
    names = ("self_attn.q_proj", "mlp.up_proj")
    return HeatMap({f"model.layers.{layer}.{name}": 0.25 * (layer + 1) * (i + 1) for layer in range(3) for i, name in enumerate(names)})


CHARTS = {
    "loss": lambda: LossChart([3.5, 2.5, 1.25, 1.0], [(2, 2.75), (4, 1.5)]),
    "memory": lambda: MemoryChart({"weights": 6 * GB, "optimizer": 3 * GB}, {"T4": 16 * GB, "GTX 1070": 8 * GB, "A100": 80 * GB}),
    "heat": heat,
    "adapters": compare,
    "code": lambda: CodeCell(value="print(1)"),
}


def rows(page, selector="table"):
    page.locator(selector).first.wait_for()  # it is made when it is opened
    return page.eval_on_selector(selector, "t => [...t.rows].map(r => [...r.cells].map(c => c.innerText.trim()))")


def test_loss_is_read_by_keyboard(page, mount):
    mount(CHARTS["loss"]())
    said = page.locator(".lora-said")
    assert said.inner_text() == "step 4: loss 1, held-out 1.5"
    slider = page.get_by_role("slider")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert said.inner_text() == "step 3: loss 1.25"
    assert slider.get_attribute("aria-valuetext") == "step 3: loss 1.25"
    page.keyboard.press("Home")
    assert said.inner_text() == "step 1: loss 3.5"


def test_loss_as_a_table(page, mount):
    mount(CHARTS["loss"]())
    page.get_by_text("Values as a table").click()
    assert rows(page) == [["step", "training", "held-out"], ["1", "3.5", ""], ["2", "2.5", "2.75"], ["3", "1.25", ""], ["4", "1", "1.5"]]


def test_loss_goes_on_while_it_is_watched(page, mount):
    mount(LossChart())
    assert page.locator(".lora-said").inner_text() == "No step yet"
    page.evaluate("model.set('losses', new DataView(new Float32Array([2, 1.5, NaN]).buffer))")
    page.wait_for_function("document.querySelector('.lora-said').textContent === 'step 3: loss NaN'")
    page.evaluate("stop()")
    assert page.evaluate("Object.values(model.heard).every((s) => s.size === 0)")


def test_curve_is_drawn_where_the_losses_are(page, mount):
    """The pixels of the series' colour: in every column, at the top where the loss is highest."""
    mount(LossChart([2.0] * 50 + [1.0] * 50))
    picture = page.evaluate(
        """() => { const c = document.querySelector('canvas'); const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        const high = []; for (let x = 0; x < c.width; x++) for (let y = 0; y < c.height; y++) {
          const i = 4 * (y * c.width + x); if (d[i + 2] > d[i] + 60 && d[i + 3] > 150) { high.push([x / c.width, y / c.height]); break; } }
        return high; }"""
    )
    left = [y for x, y in picture if 0.1 < x < 0.45]
    right = [y for x, y in picture if 0.6 < x < 0.9]
    assert len(left) > 100
    assert max(left) < 0.2
    assert min(right) > 0.7


def test_ten_thousand_points_stay_fluent(page, mount):
    """A new point in each of 60 frames: 30 of them a second is what looks alive."""
    mount(LossChart([1 + 1 / (i + 1) for i in range(10_000)]))
    seconds = page.evaluate(
        """async () => { const all = new Float32Array(10060).map((_, i) => 1 + Math.sin(i / 50) / 3 + Math.random() / 5);
        const frame = () => new Promise(requestAnimationFrame); await frame(); const start = performance.now();
        for (let i = 0; i < 60; i++) { model.set('losses', new DataView(all.buffer, 0, 4 * (10000 + i))); await frame(); }
        return (performance.now() - start) / 1000; }"""
    )
    print(f"{60 / seconds:.0f} frames a second")
    assert 60 / seconds > 30


def test_memory_says_what_fits(page, mount):
    mount(CHARTS["memory"]())
    assert page.locator(".lora-said").inner_text() == "8.38 GiB in all: fits T4 (14.9 GiB)"
    widths = page.eval_on_selector_all(".lora-part", "all => all.map(e => e.getBoundingClientRect().width)")
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.01)
    bar = page.locator(".lora-bar").bounding_box()
    line = page.locator(".lora-line", has_text="T4").bounding_box()
    assert (line["x"] - bar["x"]) / bar["width"] == pytest.approx(1 / 1.05, abs=0.01)
    page.get_by_text("Values as a table").click()
    assert ["in all", "9,000,000,000", "8.38 GiB"] in rows(page)
    assert rows(page, "table:nth-of-type(2)")[1:] == [
        ["GTX 1070", "7.45 GiB", "no"],
        ["T4", "14.9 GiB", "yes"],
        ["A100", "74.5 GiB", "yes"],
    ]


def test_memory_follows_a_change(page, mount):
    mount(CHARTS["memory"]())
    page.evaluate("model.set('parts', [['weights', 1024]])")
    page.wait_for_function("document.querySelector('.lora-said').textContent.startsWith('1 KiB in all')")


def test_heat_map_holds_values_and_keys_walk_it(page, mount):
    mount(heat())
    assert rows(page) == [["", "0", "1", "2"], ["self_attn.q_proj", "0.25", "0.5", "0.75"], ["mlp.up_proj", "0.5", "1", "1.5"]]
    page.locator("td[tabindex='0']").focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "End"):
        page.keyboard.press(key)
    assert page.locator(".lora-said").inner_text() == "mlp.up_proj, layer 2: 1.5"
    assert page.locator("td[tabindex='0']").count() == 1
    page.locator("tbody td").first.hover()
    assert page.locator(".lora-said").inner_text() == "self_attn.q_proj, layer 0: 0.25"


def test_adapters_stand_side_by_side(page, mount):
    mount(compare())
    assert rows(page) == [["", "tone", "topics"], ["rank", "8", "2"], ["base", "tiny", "tiny"], ["sample", "Could you?", "–"]]
    wide = page.eval_on_selector_all(".lora-meter", "all => all.map(e => e.getBoundingClientRect().width / e.parentElement.clientWidth)")
    assert wide[0] / wide[1] == pytest.approx(4, rel=0.1)


def test_code_is_offered_to_who_can_insert_it_and_else_copied(page, mount):
    mount(CodeCell(value="print(1)"))
    said = page.get_by_role("status")
    page.get_by_role("button", name="Insert as a cell").click()
    page.get_by_text(re.compile("No cell can be inserted here. (Copied|Selected)")).wait_for()
    page.evaluate("addEventListener('lora-nb-insert', (event) => { window.taken = event.detail; event.preventDefault(); })")
    page.get_by_role("textbox", name="Code").fill("print(2)")
    page.get_by_role("button", name="Insert as a cell").click()
    assert said.inner_text() == "It is in the cell below."
    assert page.evaluate("window.taken") == "print(2)"
    page.evaluate("model.set('value', 'print(3)')")
    page.wait_for_function("document.querySelector('textarea').value === 'print(3)'")


@pytest.mark.parametrize("name", [HOSTILE, '"; rm', RTL, LONG], ids=["markup", "shell", "right-to-left", "long"])
def test_names_stay_text(page, mount, name):
    for chart in (
        HeatMap({f"layers.0.{name}": 1.0, f"layers.1.{name}": 2.0}, label=name),
        MemoryChart({name: 1e9}, {name: 2e9}),
        AdapterCompare({name: {name: name}}),
    ):
        mount(chart)
        assert name in page.evaluate("document.body.textContent")
        assert page.locator("img").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1"), type(chart)
    assert page.evaluate("window.hacked") is None


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("chart", CHARTS)
def test_no_barrier(page, mount, axe, chart, theme):
    mount(CHARTS[chart](), theme)
    for details in page.locator("summary").all():
        details.click()
    assert axe() == []
