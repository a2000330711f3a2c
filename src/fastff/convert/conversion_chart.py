"""Quality against time, drawn as SVG text that goes into the report's page as it is."""

from __future__ import annotations

from typing import Any

from fastff.report.drawing import svg

# Okabe and Ito's colours, which colour-blind readers tell apart; each series has its own mark and dashes too.
SERIES = {
    "dense": ("#000000", "D", ""),
    "tree": ("#d55e00", "o", "-"),
    "narrow": ("#0072b2", "s", "--"),
    "pruned": ("#009e73", "^", "-."),
    "none": ("#cc79a7", "X", ""),
}
LABELS = {
    "dense": "dense (original)",
    "tree": "trees",
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
    return {name: sorted(points) for name, points in out.items() if points}


def curve(record: dict[str, Any]) -> str:
    """One panel a timed shape: the quality of every model against the time of a whole call."""
    shapes = record["shapes"]
    with svg("curve", 4.8 * len(shapes), 4.2) as (figure, out):
        panels = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
        for k, (axes, shape) in enumerate(zip(panels, shapes, strict=True)):
            _panel(axes, series(record, k))
            axes.set_title(f"{shape[0]} sequence{'s' * (shape[0] > 1)} of {shape[1]} tokens", fontsize=11)
            axes.set_xlabel("milliseconds a call (left is better)")
        panels[0].set_ylabel(_label(record))
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=10)
    return out[0]


def _panel(axes: Any, points: dict[str, list[tuple[float, float]]]) -> None:
    for name, at in points.items():
        colour, mark, dashes = SERIES[name]
        x, y = zip(*at, strict=True)
        axes.plot(x, y, mark + dashes, color=colour, markersize=7, linewidth=1.5, label=LABELS[name])
    axes.set_xlim(left=0)


def _label(record: dict[str, Any]) -> str:
    if record["metric"] is None or record["dense"]["quality"] is None:
        return "loss on held-out text (less is better)"
    table = f", {record['tables'][0]}" if record["tables"] else ""
    return f"{record['metric']}{table} ({'less' if record['kind'] == 'causal' else 'more'} is better)"
