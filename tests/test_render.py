"""Tables, sizes and the small curve, compared with what a person would write."""

import re
import xml.etree.ElementTree as ET
from math import inf, nan

import pytest

from lora_nb.render import format_bytes, format_cell, html_table, svg_curve, svg_heatmap, text_table


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (8_400_000, "8.01 MiB"),  # the docstring's own
        (999.4 * 1024, "999 KiB"),
        (999.6 * 1024, "1000 KiB"),  # three figures would be 1e+03
        (1023 * 2**20, "1023 MiB"),
        (80 * 2**30, "80 GiB"),
        (3 * 2**40, "3 TiB"),
        (5000 * 2**40, "5000 TiB"),
        (-1536, "-1.5 KiB"),
    ],
)
def test_format_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1234567, "1,234,567"), (0.123456, "0.1235"), (2.0, "2"), ("q_proj", "q_proj"), (True, "True"), (nan, "nan")]
)
def test_format_cell(value: str | float, text: str) -> None:
    assert format_cell(value) == text


def test_text_table_pads_words_to_the_left_and_numbers_to_the_right() -> None:
    assert text_table(["module", "rank", "scale"], [["q_proj", 8, 2.0], ["a", 1024, 0.5]]) == (
        "module   rank  scale\n"
        "------  -----  -----\n"
        "q_proj      8      2\n"
        "a       1,024    0.5"
    )  # fmt: skip


def test_text_table_without_rows_is_its_header() -> None:
    assert text_table(["module", "rank"], []) == "module  rank\n------  ----"


def test_text_table_leaves_no_blanks_at_line_ends() -> None:
    assert not re.search(r" $", text_table(["a", "words"], [["x", "y"], ["longer", "z"]]), re.MULTILINE)


def test_html_table_is_well_formed_and_holds_every_cell() -> None:
    root = ET.fromstring(html_table(["module", "rank"], [["q_proj", 1024], ["v_proj", 0.5]], caption="adapter"))  # noqa: S314 - our own
    assert root.tag == "table"
    assert root.findtext("caption") == "adapter"
    assert [th.text for th in root.iter("th")] == ["module", "rank"]
    assert [[td.text for td in tr] for tr in root.find("tbody")] == [["q_proj", "1,024"], ["v_proj", "0.5"]]
    assert [td.get("style") for td in root.iter("td")] == ["text-align:left", "text-align:right"] * 2


def test_html_table_escapes_what_comes_from_outside() -> None:
    evil = "<script>alert('x')</script>"
    html = html_table([evil], [[evil]], caption=evil)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 3


def test_html_table_without_a_caption_has_none() -> None:
    assert "caption" not in html_table(["a"], [[1]])


def points(svg: str) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in re.search(r'points="([^"]+)"', svg)[1].split()]


def test_svg_curve_draws_low_values_low_and_time_to_the_right() -> None:
    drawn = points(svg_curve([3.0, 1.0, 2.0], "loss", width=216, height=116))
    assert drawn == [(8, 8), (108, 108), (208, 58)]  # eight pixels of margin; y grows downwards


def test_svg_curve_says_in_words_what_it_shows() -> None:
    svg = svg_curve([3.0, 1.0, 2.0], "loss & more")
    assert svg.count("loss &amp; more: from 3.000 to 2.000, lowest 1.000") == 2  # for the eye and for a screen reader
    ET.fromstring(f"<p>{svg}</p>")  # noqa: S314 - our own


def test_svg_curve_leaves_out_what_is_not_finite_in_its_place() -> None:
    drawn = points(svg_curve([2.0, nan, inf, 1.0], "loss", width=316, height=116))
    assert drawn == [(8, 8), (308, 108)]


def test_svg_curve_of_a_constant_lies_within_the_picture() -> None:
    assert all(0 <= y <= 120 for _, y in points(svg_curve([5.0, 5.0, 5.0], "loss")))


@pytest.mark.parametrize("values", [[], [1.0], [nan, 1.0]])
def test_svg_curve_of_fewer_than_two_values_is_nothing(values: list[float]) -> None:
    assert svg_curve(values, "loss") == ""


def test_svg_heatmap_is_the_stronger_the_further_from_zero() -> None:
    values = {("up<b>", "0"): 1.0, ("down", "0"): -0.5, ("down", "1"): 0.0}
    svg = svg_heatmap(["up<b>", "down"], ["0", "1"], values, "cosine")
    root = ET.fromstring(svg)  # noqa: S314 - our own
    cells = [(rect.get("fill"), float(rect.get("fill-opacity"))) for rect in root.iter("rect")]
    assert cells == [("#1f77b4", 0.75), ("#d95f02", 0.375), ("#1f77b4", 0.0)]
    assert [t.text for t in root.iter("title")] == ["up<b>, 0: 1.0000", "down, 0: -0.5000", "down, 1: 0.0000"]
    assert svg.count("cosine: from -0.500 to 1.000") == 2  # for the eye and for a screen reader


def test_svg_heatmap_puts_each_cell_in_its_row_and_column() -> None:
    values = {("up", "0"): 0.1, ("down", "0"): 0.2, ("down", "1"): 0.3}
    root = ET.fromstring(svg_heatmap(["up", "down"], ["0", "1"], values, "cosine"))  # noqa: S314 - our own
    (x0, y0), (x1, y1), (x2, y2) = ((float(rect.get("x")), float(rect.get("y"))) for rect in root.iter("rect"))
    assert x0 == x1 < x2
    assert y0 < y1 == y2
    svg = next(iter(root.iter("svg")))
    assert x2 < float(svg.get("width"))
    assert y2 < float(svg.get("height"))


def test_svg_heatmap_of_nothing_is_nothing() -> None:
    assert svg_heatmap([], [], {}, "cosine") == ""
