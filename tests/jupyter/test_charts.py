"""The charts' Python side: what is sent, and the still picture of a saved notebook."""

import math
import struct

import nbformat
import pytest
import torch
from nbconvert import HTMLExporter

import lora_nb as ln
from lora_nb.jupyter.charts import AdapterCompare, Chart, HeatMap, LossChart, MemoryChart
from lora_nb.training.run import Run, Step
from tests.models import tiny_llama

HOSTILE = "<img src=x onerror=alert(1)>"


def floats(chart):
    return list(struct.unpack(f"<{len(chart.losses) // 4}f", chart.losses))


def step(number, loss, total=4):
    return Step(number, total, loss, 1e-3, 1.0, 10, 0.1)


def test_loss_chart_is_a_callback_whose_last_step_is_always_sent():
    chart = LossChart()
    for i, loss in enumerate((4.0, 3.0, 2.0, 1.0), 1):
        assert chart(step(i, loss)) is None
    assert floats(chart) == [4.0, 3.0, 2.0, 1.0]


def test_steps_made_again_take_the_place_of_the_first_ones():
    chart = LossChart([4.0, 3.0, 9.0, 9.0])
    chart.add(3, 2.0)
    chart.flush()
    assert floats(chart) == [4.0, 3.0, 2.0]


def test_a_step_further_on_leaves_a_gap():
    chart = LossChart()
    chart.add(3, 2.0)
    assert [math.isnan(x) for x in floats(chart)] == [True, True, False]


def test_loss_chart_of_a_run():
    run = Run("tone", ln.TrainConfig(max_steps=2), losses=[2.0, 1.5], eval_losses=[(2, 1.75), (3, float("nan"))])
    chart = LossChart.of(run)
    assert floats(chart) == [2.0, 1.5]
    assert chart.held_out == [[2, 1.75], [3, None]]
    chart.add_held_out(2, 1.25)
    assert chart.held_out == [[2, 1.25], [3, None]]
    assert "1.25" in repr(chart)


def test_heat_map_has_the_norm_of_each_update():
    model = tiny_llama()
    ln.attach(model, ln.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"]), name="tone")
    with torch.no_grad():
        for pair in ln.parameters(model, "tone").values():
            pair.normal_()
    chart = HeatMap.of(model, "tone")
    assert [row.rsplit(".")[-1] for row in chart.rows] == ["q_proj", "v_proj"]
    path = "model.layers.1.self_attn.v_proj"
    part = model.get_submodule(path)
    x = torch.eye(part.in_features)
    with torch.no_grad():
        changed = part(x)
        with ln.disabled(model):
            delta = changed - part(x)
    assert chart.values[1][1] == pytest.approx(delta.norm().item(), rel=1e-5)
    assert chart.by_path[path] == chart.values[1][1]


def test_heat_map_may_have_holes_and_numbers_that_are_none():
    chart = HeatMap({"layers.0.q": 1.0, "layers.1.v": float("inf")})
    assert chart.values == [[1.0, None], [None, None]]
    chart.update({"layers.0.q": 2.0})
    assert (chart.columns, chart.values) == (["0"], [[2.0]])


def test_compare_fills_in_what_an_adapter_lacks():
    chart = AdapterCompare({"a": {"rank": 2}, "b": {"alpha": 3.0}})
    assert chart.facts == [["rank", [2, None]], ["alpha", [None, 3.0]]]


def test_memory_adds_up():
    chart = MemoryChart({"weights": 2048, "optimizer": 1024}, {"card": 4096})
    assert chart.total == 3072
    chart.update({"weights": 8192})
    assert "too small" in repr(chart)


@pytest.mark.parametrize(
    "chart",
    [
        pytest.param(lambda: LossChart([2.0, 1.0]), id="loss"),
        pytest.param(lambda: MemoryChart({HOSTILE: 2048}, {HOSTILE: 4096}), id="memory"),
        pytest.param(lambda: HeatMap({f"layers.0.{HOSTILE}": 1.0, "layers.1.q": 2.0}, HOSTILE), id="heat"),
        pytest.param(lambda: AdapterCompare({HOSTILE: {HOSTILE: HOSTILE}}, HOSTILE), id="adapters"),
    ],
)
def test_saved_notebook_has_a_picture_without_markup_of_names(chart):
    bundle, _ = chart()._repr_mimebundle_()
    assert bundle.keys() == {"application/vnd.jupyter.widget-view+json", "text/html", "text/plain"}
    assert "<img" not in bundle["text/html"]
    assert "<table" in bundle["text/html"] or "<svg" in bundle["text/html"]
    assert "object at 0x" not in bundle["text/plain"]


def test_a_page_made_of_a_saved_notebook_shows_the_picture():
    data, metadata = HeatMap({"layers.0.q": 1.0, "layers.1.q": 2.0})._repr_mimebundle_()
    cell = nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("display_data", data, metadata=metadata)])
    page, _ = HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    assert ">1.00</text></g></svg>" in page


@pytest.mark.parametrize("empty", [LossChart(), MemoryChart({}), HeatMap({}), AdapterCompare({})], ids=lambda c: type(c).__name__)
def test_nothing_to_show_is_no_error(empty):
    assert isinstance(empty._repr_mimebundle_()[0]["text/html"], str)


@pytest.mark.parametrize("chart", Chart.__subclasses__())
def test_one_module_without_imports_reaches_the_browser(chart):
    esm = str(chart._esm)
    assert "import " not in esm.replace("important ", "")
    assert "http" not in esm.replace("http://www.w3.org/", "")
    assert esm.count("export ") == 1
    assert len(esm) + len(str(chart._css)) < 20_000  # each saved widget carries it


def test_held_out_points_are_in_order_and_once_however_they_come() -> None:
    chart = LossChart()
    for step, loss in ((0, 3.5), (4, 3.0), (0, 3.5), (4, 2.5), (60, 2.0), (30, float("nan"))):
        chart.add_held_out(step, loss)
    assert chart.held_out == [[0, 3.5], [4, 2.5], [30, None], [60, 2.0]]
