"""Charts as SVG text: series of points over two axes, and named rows with bars or dots.

Series differ by colour, mark and dashes, so that a chart can be read without colours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fastff.report.axis import Axis, Scale
from fastff.report.svg import LETTER, drawing, line, mark, polyline, rect, text

LEFT, RIGHT, TOP, BOTTOM = 62.0, 18.0, 30.0, 52.0  # room around a panel
LEGEND_LINE = 20.0
BESIDE = 8.0  # from a point to its label
LEADER = 18.0  # that labels of a crowd stand further away
FIRST_BASELINE = 11.0  # of a column: no word is above the drawing
LABEL_GAP = 13.0  # between the baselines of two labels


@dataclass(frozen=True)
class Series:
    """Points (x, y) of one name. color: an index of the palette; mark: one of svg.MARKS, or "" for none; line: one of
    svg.DASHES, or "" for none; labels: a word beside each point."""

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    mark: str = "circle"
    line: str = ""
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Panel:
    """Series over two axes. levels: horizontal lines (y, name), in the legend as dotted lines; uprights: x of vertical
    lines."""

    series: Sequence[Series]
    x: Axis = field(default_factory=Axis)
    y: Axis = field(default_factory=Axis)
    title: str = ""
    levels: Sequence[tuple[float, str]] = ()
    uprights: Sequence[float] = ()


def chart(panels: Sequence[Panel], *, title: str, width: float = 640, height: float = 400) -> str:
    """Panels side by side with one legend below. width: of the whole; height: without the legend."""
    each = width / len(panels)
    shapes: list[str] = []
    for index, panel in enumerate(panels):
        shapes += _panel(panel, index * each, each, height)
    legend, lines = _legend(panels, width, height)
    return drawing(width, height + LEGEND_LINE * lines, [*shapes, *legend], title=title)


def _panel(panel: Panel, left: float, width: float, height: float) -> list[str]:
    across = [x for series in panel.series for x, _ in series.points] + list(panel.uprights)
    up = [y for series in panel.series for _, y in series.points] + [y for y, _ in panel.levels]
    x = panel.x.scale(across, left + LEFT, left + width - RIGHT)
    y = panel.y.scale(up, height - BOTTOM, TOP)
    shapes = [*_axes(x, y, panel.title)]
    shapes += [line(x.start, y.at(level), x.end, y.at(level), "line c6", "dotted") for level, _ in panel.levels]
    shapes += [line(x.at(place), y.start, x.at(place), y.end) for place in panel.uprights]
    for series in panel.series:
        places = [(x.at(px), y.at(py)) for px, py in series.points]
        if series.line:
            shapes.append(polyline(places, f"c{series.color}", series.line))
        if series.mark:
            shapes += [mark(series.mark, px, py, f"c{series.color}") for px, py in places]
    return [*shapes, *_labels(panel, x, y)]


def _axes(x: Scale, y: Scale, title: str) -> Iterator[str]:
    for tick in y.ticks():
        yield line(x.start, y.at(tick), x.end, y.at(tick))
        yield text(x.start - 7, y.at(tick) + 4, y.axis.format(tick), anchor="end", kind="soft")
    for tick in x.ticks():
        yield line(x.at(tick), y.start, x.at(tick), y.start + 4)
        yield text(x.at(tick), y.start + 18, x.axis.format(tick), anchor="middle", kind="soft")
    yield line(x.start, y.start, x.end, y.start, "soft faint")
    middle = (x.start + x.end) / 2
    if title:
        yield text(middle, TOP - 12, title, anchor="middle", kind="title")
    if x.axis.label:
        yield text(middle, y.start + 38, x.axis.label, anchor="middle")
    if y.axis.label:
        yield text(x.start - LEFT + 14, (y.start + y.end) / 2, y.axis.label, anchor="middle", turned=True)


@dataclass(frozen=True)
class _Word:
    """A label of the point at (x, y), which has a colour of the palette."""

    x: float
    y: float
    word: str
    color: int

    @property
    def wide(self) -> float:
        return len(self.word) * LETTER


def _labels(panel: Panel, x: Scale, y: Scale) -> Iterator[str]:
    """A word at the right of every point; those of a crowd stand in a column beside it, in the order of their points'
    heights, and a line in the colour of a point leads to its word."""
    crowds = [
        [_Word(x.at(px), y.at(py), word, series.color)]
        for series in panel.series
        for (px, py), word in zip(series.points, series.labels, strict=False)
    ]
    while (pair := _first_covering(crowds, x.end + RIGHT)) is not None:
        kept, joined = pair
        crowds[kept] += crowds.pop(joined)
    for crowd in crowds:
        crowd.sort(key=lambda word: (word.y, word.x))
        left, top, wide = _column(crowd, x.end + RIGHT)
        at_right = left > crowd[0].x
        for number, word in enumerate(crowd):
            base = top + LABEL_GAP * number
            if len(crowd) > 1:
                yield line(word.x, word.y, left - 2 if at_right else left + wide + 2, base - 4, f"thin c{word.color}")
            yield text(left if at_right else left + wide, base, word.word, anchor="start" if at_right else "end")


def _column(crowd: Sequence[_Word], end: float) -> tuple[float, float, float]:
    """Where the words of a crowd stand, at the right of all its points, or at their left where they would reach beyond
    `end`: the left side, the first baseline, the width."""
    away, wide = BESIDE + LEADER * (len(crowd) > 1), max(word.wide for word in crowd)
    left, right = min(word.x for word in crowd) - away - wide, max(word.x for word in crowd) + away
    middle, tall = sum(word.y for word in crowd) / len(crowd), LABEL_GAP * (len(crowd) - 1)
    top = max(FIRST_BASELINE, middle + 4 - tall / 2) if len(crowd) > 1 else middle + 4
    return right if right + wide <= end else left, top, wide


def _first_covering(crowds: Sequence[Sequence[_Word]], end: float) -> tuple[int, int] | None:
    """Two crowds of which one's words cover words or a point of the other; None if there are none."""

    def box(crowd: Sequence[_Word]) -> tuple[float, float, float, float]:
        left, top, wide = _column(crowd, end)
        return left, left + wide, top, top + LABEL_GAP * (len(crowd) - 1)

    def on_a_point(one: Sequence[_Word], other: Sequence[_Word]) -> bool:
        left, right, top, bottom = box(one)
        return any(left - 4 <= w.x <= right + 4 and top - 13 <= w.y <= bottom + 5 for w in other)

    def on_words(one: Sequence[_Word], other: Sequence[_Word]) -> bool:
        (left, right, top, bottom), (left2, right2, top2, bottom2) = box(one), box(other)
        return left < right2 and left2 < right and top < bottom2 + LABEL_GAP and top2 < bottom + LABEL_GAP

    for k, one in enumerate(crowds):
        for n in range(k + 1, len(crowds)):
            other = crowds[n]
            if on_words(one, other) or on_a_point(one, other) or on_a_point(other, one):
                return k, n
    return None


def _legend(panels: Sequence[Panel], width: float, top: float) -> tuple[list[str], int]:
    """One entry a name, broken into lines that fit; the shapes, and how many lines there are."""
    entries: dict[str, Series | None] = {}
    for panel in panels:
        entries.update({series.name: series for series in panel.series if series.name})
        entries.update({name: None for _, name in panel.levels if name})
    if not entries:
        return [], 0
    shapes: list[str] = []
    x, row = LEFT, 0
    for name, series in entries.items():
        wide = 34 + len(name) * LETTER + 18
        if x + wide > width and x > LEFT:
            x, row = LEFT, row + 1
        y = top + LEGEND_LINE * row + 4
        shapes += _sample(series, x, y)
        shapes.append(text(x + 34, y + 4, name))
        x += wide
    return shapes, row + 1


def _sample(series: Series | None, x: float, y: float) -> Iterator[str]:
    if series is None:
        yield line(x, y, x + 28, y, "line c6", "dotted")
        return
    if series.line:
        yield polyline([(x, y), (x + 28, y)], f"c{series.color}", series.line)
    if series.mark:
        yield mark(series.mark, x + 14, y, f"c{series.color}")


@dataclass(frozen=True)
class Value:
    """A number with the ends of its spread, and words beside it."""

    value: float
    low: float
    high: float
    color: int = 0
    label: str = ""


@dataclass(frozen=True)
class Row:
    """A named line of a chart of rows."""

    name: str
    values: Sequence[Value]


def rows_chart(
    rows: Sequence[Row], axis: Axis, *, title: str, bars: bool = False, width: float = 560, zero: bool = False
) -> str:
    """Horizontal bars or dots with their spreads, one line a value. zero: draw a line at zero, and show it."""
    slot = 22.0
    left = 24 + max((len(row.name) for row in rows), default=0) * LETTER
    beside = max((len(v.label) for row in rows for v in row.values), default=0) * LETTER
    ends = [end for row in rows for v in row.values for end in (v.low, v.value, v.high)] + [0.0] * zero
    height = TOP + sum(slot * len(row.values) + 10 for row in rows)
    x = axis.scale(ends, left, width - 20 - beside)
    shapes: list[str] = []
    for tick in x.ticks():
        shapes.append(line(x.at(tick), TOP - 10, x.at(tick), height))
        shapes.append(text(x.at(tick), height + 16, axis.format(tick), anchor="middle", kind="soft"))
    if zero:
        shapes.append(line(x.at(0), TOP - 10, x.at(0), height, "ink"))
    y = TOP
    for row in rows:
        shapes.append(text(left - 8, y + slot * len(row.values) / 2, row.name, anchor="end"))
        for value in row.values:
            shapes += _value(value, x, y + slot / 2 - 4, bars)
            y += slot
        y += 10
    shapes.append(text((x.start + x.end) / 2, height + 38, axis.label, anchor="middle"))
    return drawing(width, height + 50, shapes, title=title)


def _value(value: Value, x: Scale, y: float, bars: bool) -> Iterator[str]:
    at, low, high = x.at(value.value), x.at(value.low), x.at(value.high)
    if bars:
        yield rect(x.start, y - 7, max(at - x.start, 0.5), 14, f"c{value.color}")
    yield line(low, y, high, y, "ink" if bars else f"line c{value.color}")
    if not bars:
        yield mark("circle", at, y, f"c{value.color}")
    if value.label:
        yield text(max(at, high) + 8, y + 4, value.label)
