"""The report's charts, drawn from `results.json` alone: SVG text that goes into the page as it is."""

from __future__ import annotations

from typing import Any

from fastff.inspect.picture import STYLE, Box, draw_path, draw_scale, draw_tree
from fastff.report import svg
from fastff.report.axis import Axis
from fastff.report.chart import Panel, Row, Series, Value, chart, rows_chart
from train_tiny.settings import VARIANTS
from train_tiny.terminal import speed_pair

# Colour and dashes of each variant.
LOOKS = {
    "dense": (0, "solid"),
    "forest": (1, "solid"),
    "tree": (2, "solid"),
    "forest-narrow": (3, "dashed"),
    "tree-narrow": (4, "dashed"),
    "none": (5, "dotted"),
    "start": (6, "solid"),
}
TITLES = {variant.name: variant.title for variant in VARIANTS} | {"start": "shared start"}
WIDTH = 560.0


def speed(results: dict[str, Any]) -> str:
    """Microseconds a row of fastff and of every dense provider, on a logarithmic axis."""
    measured = results["speed"]
    rows = []
    for count in measured["rows"]:
        pair = zip(("forest", "dense"), speed_pair(measured, count), strict=True)
        rows.append(Row(f"{count:,} row{'s' * (count > 1)}", [_latency(timing, key) for key, timing in pair]))
    return rows_chart(rows, Axis("microseconds a row (less is better)", log=True), title="Speed of a layer", bars=True)


def _latency(timing: dict[str, Any], key: str) -> Value:
    middle = timing["latency_us_p50"]
    label = f"{timing['provider']} {middle:,.{1 if middle < 100 else 0}f}"
    return Value(middle, timing["latency_us_p25"], timing["latency_us_p75"], LOOKS[key][0], label)


def curves(results: dict[str, Any]) -> str:
    """Training loss of the shared start and of every variant after it."""
    start, variants = results["start"], results.get("pretrain", {})
    series = [_curve("start", start["curve"], 0, start["tokens"] / start["steps"])]
    for name, found in variants.items():
        series.append(_curve(name, found["curve"], start["tokens"], found["tokens"] / found["steps"]))
    axes = Axis("tokens seen, thousands", low=0), Axis("training loss, nats")
    return chart([Panel(series, *axes, uprights=[start["tokens"] / 1000])], title="Training loss", width=WIDTH)


def _curve(name: str, curve: list[list[float]], begin: float, tokens_a_step: float) -> Series:
    color, dashes = LOOKS[name]
    points = [((begin + step * tokens_a_step) / 1000, loss) for step, loss in curve]
    return Series(TITLES[name], points, color, mark="", line=dashes)


def losses(results: dict[str, Any]) -> str:
    """Loss on unseen books beyond the dense twin's, with two paired standard errors."""
    against = results["summary"]["against_dense"]
    rows = [_dot(name, found["difference"], 2 * found["error"]) for name, found in against.items()]
    return rows_chart(rows, Axis("loss minus the dense twin's, nats (left is better)"), title="Losses", zero=True)


def accuracies(results: dict[str, Any]) -> str:
    """Accuracy on sentences of unseen books, with two standard errors."""
    every = {**results["finetune"], **results.get("baselines", {})}
    rows = [_dot(name, 100 * found["accuracy"], 200 * found["accuracy_error"]) for name, found in every.items()]
    return rows_chart(rows, Axis("sentences attributed rightly, %"), title="Accuracies")


def _dot(name: str, value: float, error: float) -> Row:
    words = TITLES | {"bag_of_words": "bag of words", "majority": "always one author"}
    return Row(words[name], [Value(value, value - error, value + error, LOOKS.get(name, (6, ""))[0])])


def routing(variant: dict[str, Any]) -> str:
    """Every tree of every layer of a variant, coloured by use."""
    shapes: list[str] = []
    y = 0.0
    for number, layer in enumerate(variant["routing"].values(), start=1):
        columns = 1 if layer["trees"] == 1 else 8
        height = 130.0 if columns == 1 else 48.0
        shapes.append(svg.text(0, y + 14, f"layer {number}", kind="title"))
        y += 22
        for index, counts in enumerate(layer["counts"]):
            width = WIDTH / columns
            box = Box(index % columns * width, y + index // columns * (height + 6), width - 6 * (columns > 1), height)
            shapes += draw_tree(counts, layer["depth"], box)
        y += -(-layer["trees"] // columns) * (height + 6) + 8
    shapes += draw_scale(0.15 * WIDTH, y + 4, 0.7 * WIDTH)
    return svg.drawing(WIDTH, y + 56, shapes, title="How often each node is visited", style=STYLE)


def paths(variant: dict[str, Any]) -> str:
    """The ways of a sentence's pieces through the first tree of every layer."""
    filled = variant["fill"]
    masked = {mask["position"] for mask in filled["masks"]}
    shapes: list[str] = []
    y = 0.0
    for number, (name, layer) in enumerate(variant["routing"].items(), start=1):
        box = Box(0, y + 22, WIDTH, 140)
        shapes.append(svg.text(0, y + 14, f"layer {number}", kind="title"))
        shapes += ['<g opacity="0.35">', *draw_tree(layer["counts"][0], layer["depth"], box), "</g>"]
        for place, trees in enumerate(filled["paths"][name]):
            kind = "c1 masked" if place in masked else "ink piece"
            shapes.append(draw_path(trees[0], layer["depth"], box, kind))
        y += 176
    style = STYLE + "\n.fastff-chart .piece { stroke-width: 0.8 }\n.fastff-chart .masked { stroke-width: 2.6 }"
    return svg.drawing(WIDTH, y, shapes, title="Ways through the first tree of every layer", style=style)
