"""Tables, axes and charts: what stands in them, where, and that equal data gives equal text."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ET

import pytest

from fastff.report import svg
from fastff.report.axis import Axis, plain, si
from fastff.report.chart import Panel, Row, Series, Value, chart, rows_chart
from fastff.report.markdown import markdown_table, replace_marked
from fastff.report.numbers import three_digits, times_faster

SVG = "{http://www.w3.org/2000/svg}"


def test_a_table_has_a_cell_for_every_column():
    assert markdown_table(["a", "b"], [(1, None), ("x", 2.5)]) == "| a | b |\n|---|---|\n| 1 |  |\n| x | 2.5 |"
    with pytest.raises(ValueError, match="a row has 1 cells, the table 2 columns"):
        markdown_table(["a", "b"], [(1,)])


def test_a_marked_place_is_replaced_and_must_be_there_once():
    page = "before\n<!-- t -->\nold\n<!-- /t -->\nafter\n"
    assert replace_marked(page, "t", r"new \1") == "before\n<!-- t -->\nnew \\1\n<!-- /t -->\nafter\n"
    for text in ("nothing", page + page):
        with pytest.raises(ValueError, match="places are marked t, expected 1"):
            replace_marked(text, "t", "new")


@pytest.mark.parametrize(("value", "shown"), [(0.1234, "0.123"), (12.34, "12.3"), (123.4, "123"), (1234.5, "1,234")])
def test_three_digits(value, shown):
    assert three_digits(value) == shown


def test_other_numbers():
    assert [times_faster(ratio) for ratio in (0.82, 9.94, 41.2, 1615)] == ["0.8x", "9.9x", "41x", "1,615x"]
    assert [si(value) for value in (12, 24_576, 4_193_280)] == ["12", "24.6k", "4.19M"]
    assert [plain(value) for value in (0.05, 16, 1024)] == ["0.05", "16", "1,024"]


def test_linear_ticks_are_round_and_within_the_axis():
    scale = Axis(margin=0).scale([0.013, 0.088], 0, 400)
    assert scale.ticks() == pytest.approx([0.02, 0.04, 0.06, 0.08])
    assert scale.at(0.013) == 0
    assert scale.at(0.088) == pytest.approx(400)


def test_logarithmic_ticks_thin_out():
    assert Axis(log=True, margin=0).scale([1, 100], 0, 400).ticks() == [1, 2, 5, 10, 20, 50, 100]
    assert Axis(log=True, margin=0).scale([1, 1e6], 0, 400).ticks() == [10.0**k for k in range(7)]
    assert Axis(log=True, ticks=[1, 8, 999]).scale([1, 128], 0, 400).ticks() == [1, 8]


def test_a_logarithmic_axis_refuses_zero():
    with pytest.raises(ValueError, match="cannot show 0"):
        Axis(log=True).scale([0, 1], 0, 400)


def test_one_value_has_room_around_it():
    scale = Axis().scale([3.0], 0, 100)
    assert scale.at(3.0) == pytest.approx(50)


def parsed(text):
    return ET.fromstring(text)


def texts(root):
    return [element.text for element in root.iter(f"{SVG}text")]


def test_points_stand_where_their_values_are():
    panel = Panel(
        [Series("a & b", [(1, 2.0), (10, 1.0), (100, 3.0)], line="dashed", mark="")], Axis("x", log=True), Axis("y")
    )
    text = chart([panel], title="<title>")
    assert text == chart([panel], title="<title>")
    root = parsed(text)
    points = root.find(f"{SVG}polyline").get("points").split()
    places = [tuple(map(float, point.split(","))) for point in points]
    assert places[1][0] - places[0][0] == pytest.approx(places[2][0] - places[1][0], abs=0.2), "a logarithmic axis"
    assert places[2][1] < places[0][1] < places[1][1], "more is higher"
    assert {"a & b", "x", "y"} <= set(texts(root))
    assert root.find(f"{SVG}title").text == "<title>"


def test_colours_are_classes_with_a_value_for_dark_readers():
    text = chart([Panel([Series("a", [(0, 0), (1, 1)], color=3)])], title="t")
    light, dark = text.split("@media (prefers-color-scheme: dark)")
    assert svg.LIGHT[3] in light
    assert svg.DARK[3] in dark
    assert "#" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)


def test_every_mark_is_drawn_around_its_point():
    for shape in svg.MARKS:
        root = parsed(f'<svg xmlns="http://www.w3.org/2000/svg">{svg.mark(shape, 50, 60, "c1")}</svg>')
        (element,) = root
        if shape == "circle":
            assert (element.get("cx"), element.get("cy")) == ("50.0", "60.0")
        else:
            corners = [tuple(map(float, corner.split(","))) for corner in element.get("points").split()]
            assert all(math.dist(corner, (50, 60)) < 8 for corner in corners)


def test_labels_of_close_points_do_not_cover_each_other():
    points = [(1.0, 2.0 + 1e-4 * k) for k in range(4)]
    text = chart([Panel([Series("s", points, labels=[f"p{k}" for k in range(4)])], y=Axis(low=0, high=9))], title="t")
    heights = sorted(float(y) for y, _ in re.findall(r'y="([\d.]+)"[^>]*>(p\d)<', text))
    assert len(heights) == 4
    assert all(b - a >= 11.9 for a, b in itertools.pairwise(heights))


def test_words_of_a_crowd_stand_in_a_column_in_the_order_of_their_points_and_a_lone_one_beside_its_own():
    points, names = [(1.0, 5.0), (1.02, 5.05), (0.99, 4.95), (2.0, 8.0)], ["b", "a", "c", "lone"]
    root = parsed(chart([Panel([Series("s", points, labels=names)], y=Axis(low=0, high=9))], title="t"))
    words = {element.text: element for element in root.iter("{http://www.w3.org/2000/svg}text")}
    column = [words[name] for name in "abc"]
    assert len({word.get("x") for word in column}) == 1
    heights = [float(word.get("y")) for word in column]
    assert heights == sorted(heights)
    leaders = [e for e in root.iter("{http://www.w3.org/2000/svg}line") if e.get("class") == "thin c0"]
    assert [float(e.get("y2")) + 4 for e in leaders] == heights
    marks = list(root.iter("{http://www.w3.org/2000/svg}circle"))
    starts = [(float(e.get("x1")), float(e.get("y1"))) for e in leaders]
    places = [(float(e.get("cx")), float(e.get("cy"))) for e in marks]
    assert starts == [places[1], places[0], places[2]]
    assert 0 < abs(float(words["lone"].get("x")) - places[3][0]) < 10


def test_no_word_of_a_crowd_is_above_the_drawing():
    points = [(1.0, 8.9 + 0.01 * k) for k in range(9)]
    drawn = chart([Panel([Series("s", points, labels=[f"p{k}" for k in range(9)])], y=Axis(low=0, high=9))], title="t")
    heights = [float(y) for y, _ in re.findall(r'y="(-?[\d.]+)"[^>]*>(p\d)<', drawn)]
    assert len(heights) == 9
    assert min(heights) > 8


def test_panels_share_one_legend():
    panels = [Panel([Series("same", [(0, 1)])], levels=[(1.0, "level")]) for _ in range(3)]
    assert texts(parsed(chart(panels, title="t"))).count("same") == 1
    assert texts(parsed(chart(panels, title="t"))).count("level") == 1


def test_bars_are_as_long_as_their_values():
    rows = [Row("one", [Value(10, 9, 11, label="ten")]), Row("two", [Value(20, 20, 20)])]
    root = parsed(rows_chart(rows, Axis(low=0, high=25), title="t", bars=True))
    short, long = (float(r.get("width")) for r in root.iter(f"{SVG}rect"))
    assert long == pytest.approx(2 * short, rel=0.01)
    assert {"one", "two", "ten"} <= set(texts(root))


def test_dots_may_have_a_line_at_zero():
    rows = [Row("a", [Value(-1.5, -2, -1)]), Row("b", [Value(0.5, 0.4, 0.6)])]
    root = parsed(rows_chart(rows, Axis(), title="t", zero=True))
    zero = next(line for line in root.iter(f"{SVG}line") if line.get("class") == "ink")
    left, right = (float(c.get("cx")) for c in root.iter(f"{SVG}circle"))
    assert left < float(zero.get("x1")) < right
