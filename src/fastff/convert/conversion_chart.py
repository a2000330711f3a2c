"""Quality against time, drawn as SVG text that goes into the report's page as it is."""

from __future__ import annotations

import math
from typing import Any

from fastff.report.axis import Axis
from fastff.report.chart import Panel, Series, chart

# Colour, mark and line of each kind of model.
SERIES = {
    "dense": (6, "diamond", ""),
    "chosen": (1, "circle", "solid"),
    "narrow": (0, "square", "dashed"),
    "pruned": (2, "triangle", "dashdot"),
    "none": (5, "cross", ""),
}
LABELS = {
    "dense": "dense (original)",
    "chosen": "chosen layers",
    "tree": "trees",  # of records from before other kinds of layers were tried
    "narrow": "narrow dense",
    "pruned": "pruned dense",
    "none": "no feedforward",
}


def series(record: dict[str, Any], shape: int) -> dict[str, list[tuple[float, float]]]:
    """Points (milliseconds, quality) of each kind of model at a timed shape, by rising time. Quality is the metric, or
    where there is none the loss on held-out text."""
    metric = record["metric"] is not None and record["dense"]["quality"] is not None
    out: dict[str, list[tuple[float, float]]] = {name: [] for name in SERIES}
    if metric:
        out["dense"].append((record["dense"]["latency_ms"][shape], record["dense"]["quality"]))
    for point in (record, *record["curve"]):
        for name, variant in point["variants"].items():
            out[name].append((variant["latency_ms"][shape], variant["after"] if metric else variant["held_out_loss"]))
    known = {name: sorted(p for p in points if math.isfinite(p[1])) for name, points in out.items()}
    return {name: points for name, points in known.items() if points}


def reads_pictures(record: dict[str, Any]) -> bool:
    """Whether it is an image model's; records of before there were any may not say."""
    return record.get("kind") == "image"


def curve(record: dict[str, Any]) -> str:
    """One panel a timed shape: the quality of every model against the time of a whole call."""
    shapes = record["shapes"]
    every = [series(record, k) for k in range(len(shapes))]
    seen = [quality for points in every for at in points.values() for _, quality in at] or [0.0]
    room = 0.06 * (max(seen) - min(seen)) or 0.1 * abs(seen[0]) or 1.0
    panels = []
    for (sequences, tokens), points in zip(shapes, every, strict=True):
        drawn = [Series(LABELS[name], at, *SERIES[name]) for name, at in points.items()]
        time = Axis("milliseconds a call (left is better)", low=0)
        quality = Axis(_label(record), low=min(seen) - room, high=max(seen) + room)  # the same in every panel
        example, part = ("picture", "patches") if reads_pictures(record) else ("sequence", "tokens")
        title = f"{sequences} {example}{'s' * (sequences > 1)} of {tokens} {part}"
        panels.append(Panel(drawn, time, quality, title))
    return chart(panels, title="Quality against time", width=460 * len(panels), height=380)


def _label(record: dict[str, Any]) -> str:
    if record["metric"] is None or record["dense"]["quality"] is None:
        return "loss on held-out text (less is better)"
    table = f", {record['tables'][0]}" if record["tables"] else ""
    return f"{record['metric']}{table} ({'less' if record['kind'] == 'causal' else 'more'} is better)"
