"""The report's charts, drawn from `results.json` alone: SVG text that goes into the page as it is.

Colours leave here as names of the page's variables, so that one drawing suits light and dark paper.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastff.demo.settings import ARMS
from fastff.demo.terminal import speed_pair
from fastff.inspect.picture import SPREAD, draw_path, draw_tree
from fastff.report.drawing import svg

INK, FAINT = "#010203", "#040506"  # stand for the page's text and for its thin lines
# Okabe and Ito's colours, which colour-blind readers tell apart; each arm has its own dashes too.
SERIES = {
    "dense": ("#0072b2", "-"),
    "forest": ("#d55e00", "-"),
    "tree": ("#009e73", "-"),
    "forest-narrow": ("#e69f00", "--"),
    "tree-narrow": ("#56b4e9", "--"),
    "none": ("#cc79a7", ":"),
    "start": ("#808080", "-"),
}
STYLE: dict[str, Any] = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "savefig.transparent": True,
}
TITLES = {arm.name: arm.title for arm in ARMS} | {"start": "shared start"}


def speed(results: dict[str, Any]) -> str:
    """Microseconds a row of fastff and of every dense provider, on a logarithmic axis."""
    measured = results["speed"]
    rows = measured["rows"]
    with drawing("speed", 4.8, 0.9 + 0.95 * len(rows)) as (figure, out):
        axes = figure.add_subplot()
        for place, count in enumerate(rows):
            ours, best = speed_pair(measured, count)
            for shift, timing, key in ((-0.19, ours, "forest"), (0.19, best, "dense")):
                _speed_bar(axes, place + shift, timing, key)
        axes.set_yticks(range(len(rows)), [f"{count:,} row{'s' * (count > 1)}" for count in rows])
        axes.invert_yaxis()
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xlim(low, high * 12)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("microseconds a row (less is better)")
    return out[0]


def _speed_bar(axes: Axes, place: float, timing: dict[str, Any], key: str) -> None:
    middle = timing["latency_us_p50"]
    spread = [[max(0.0, middle - timing["latency_us_p25"])], [max(0.0, timing["latency_us_p75"] - middle)]]
    axes.barh(place, middle, height=0.36, color=SERIES[key][0], xerr=spread, ecolor=INK, error_kw={"linewidth": 1})
    label = f"   {timing['provider']} {middle:,.{1 if middle < 100 else 0}f}"
    axes.text(timing["latency_us_p75"], place, label, va="center", fontsize=10)


def curves(results: dict[str, Any]) -> str:
    """Training loss of the shared start and of every arm after it."""
    start, arms = results["start"], results.get("pretrain", {})
    with drawing("curves", 4.8, 3.9) as (figure, out):
        axes = figure.add_subplot()
        _curve(axes, "start", start["curve"], 0, start["tokens"] / start["steps"])
        for name, arm in arms.items():
            _curve(axes, name, arm["curve"], start["tokens"], arm["tokens"] / arm["steps"])
        axes.axvline(start["tokens"] / 1000, color=FAINT, linewidth=1)
        axes.set_xlabel("tokens seen, thousands")
        axes.set_ylabel("training loss, nats")
        figure.legend(loc="outside lower center", ncols=2, fontsize=10)
    return out[0]


def _curve(axes: Axes, name: str, curve: list[list[float]], begin: float, tokens_a_step: float) -> None:
    colour, dashes = SERIES[name]
    x = [(begin + step * tokens_a_step) / 1000 for step, _ in curve]
    axes.plot(x, [loss for _, loss in curve], dashes, color=colour, linewidth=1.7, label=TITLES[name])


def losses(results: dict[str, Any]) -> str:
    """Loss on unseen books beyond the dense twin's, with two paired standard errors."""
    against = results["summary"]["against_dense"]
    return _dots(
        "losses",
        [(name, arm["difference"], 2 * arm["error"]) for name, arm in against.items()],
        "loss minus the dense twin's, nats (left is better)",
        zero=True,
    )


def accuracies(results: dict[str, Any]) -> str:
    """Accuracy on sentences of unseen books, with two standard errors."""
    points = [(name, 100 * a["accuracy"], 200 * a["accuracy_error"]) for name, a in results["finetune"].items()]
    controls = results.get("baselines", {})
    points += [(name, 100 * a["accuracy"], 200 * a["accuracy_error"]) for name, a in controls.items()]
    return _dots("accuracies", points, "sentences attributed rightly, %", zero=False)


def _dots(name: str, points: list[tuple[str, float, float]], label: str, *, zero: bool) -> str:
    words = TITLES | {"bag_of_words": "bag of words", "majority": "always one author"}
    with drawing(name, 4.8, 0.9 + 0.36 * len(points)) as (figure, out):
        axes = figure.add_subplot()
        for place, (key, value, error) in enumerate(points):
            colour = SERIES.get(key, (INK, ""))[0]
            axes.errorbar(value, place, xerr=error, fmt="o", color=colour, capsize=3, markersize=6)
        if zero:
            axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(points)), [words[key] for key, _, _ in points])
        axes.set_ylim(len(points) - 0.5, -0.5)
        axes.set_xlabel(label)
    return out[0]


def routing(arm: dict[str, Any], name: str) -> str:
    """Every tree of every layer of an arm, coloured by use."""
    layers = list(arm["routing"].values())
    trees, depth = layers[0]["trees"], layers[0]["depth"]
    columns = 1 if trees == 1 else 8
    lines = -(-trees // columns)
    with drawing(f"routing-{name}", 4.8, 0.8 + len(layers) * (1.5 if trees == 1 else 0.45 + 0.62 * lines)) as (
        figure,
        out,
    ):
        below = figure.subfigures(len(layers) + 1, 1, height_ratios=[1.0] * len(layers) + [0.5], squeeze=False)
        *parts, foot = below[:, 0]
        image = None
        for number, (part, layer) in enumerate(zip(parts, layers, strict=True), start=1):
            part.suptitle(f"layer {number}", fontsize=11, x=0.02, ha="left")
            grid = part.subplots(lines, columns, squeeze=False)
            for axes, counts in zip(grid.flat, layer["counts"], strict=False):
                image = draw_tree(axes, counts, depth)
                axes.grid(visible=False)
                axes.set_yticks(range(0, depth + 1, 3) if trees == 1 else [])
            if trees == 1:
                grid[0, 0].set_ylabel("level")
        if image is not None:
            _use_bar(foot, image)
    return out[0]


def _use_bar(part: Any, image: Any) -> None:
    bar = part.colorbar(image, cax=part.add_axes((0.12, 0.75, 0.84, 0.18)), orientation="horizontal")
    ticks = [-SPREAD, -SPREAD / 2, 0, SPREAD / 2, SPREAD]
    bar.set_ticks(ticks, labels=[f"{2**tick:g}" for tick in ticks])
    bar.set_label("visits, relative to even use (grey: none)", fontsize=10)


def paths(arm: dict[str, Any]) -> str:
    """The ways of a sentence's pieces through the first tree of every layer."""
    filled, layers = arm["fill"], arm["routing"]
    masked = {mask["position"] for mask in filled["masks"]}
    with drawing("paths", 4.8, 1.9 * len(layers) + 0.5) as (figure, out):
        grid = figure.subplots(len(layers), 1, squeeze=False)[:, 0]
        for number, (axes, (name, layer)) in enumerate(zip(grid, layers.items(), strict=True), start=1):
            draw_tree(axes, layer["counts"][0], layer["depth"]).set_alpha(0.35)
            for place, trees in enumerate(filled["paths"][name]):
                special = place in masked
                colour = SERIES["forest"][0] if special else INK
                draw_path(axes, trees[0], layer["depth"], color=colour, linewidth=2.2 if special else 0.6)
            axes.grid(visible=False)
            axes.set_ylabel(f"layer {number}, level")
            axes.set_yticks(range(0, layer["depth"] + 1, 3))
    return out[0]


@contextmanager
def drawing(name: str, width: float, height: float) -> Iterator[tuple[Figure, list[str]]]:
    """A figure of so many inches; when the block ends, the list holds its SVG."""
    out: list[str] = []
    with svg(name, width, height, STYLE) as (figure, drawn):
        yield figure, out
    out.append(_inline(drawn[0], name))


def _inline(text: str, name: str) -> str:
    """Let the width follow the page, and name colours by the page's variables."""
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 width="100%" role="img"', text, count=1)
    # Ids are unique within a drawing; the page holds several.
    text = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(xlink:href=")#([^"]+)"', rf'\1#{name}-\2"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    for colour, variable in ((INK, "ink"), (FAINT, "faint")):
        text = text.replace(colour, f"var(--{variable})")
    for key, (colour, _) in SERIES.items():
        text = text.replace(colour, f"var(--{key})")
    return text
