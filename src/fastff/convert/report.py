"""The report of a conversion: JSON, a page that needs nothing else, and a model card."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .8rem;border-bottom:1px solid #ccc;"
    "text-align:right}td:first-child,th:first-child{text-align:left}"
)


def write(out: Path, record: dict[str, Any]) -> None:
    """Write OUT/report/report.json, OUT/report/index.html and OUT/README.md."""
    folder = out / "report"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "index.html").write_text(page(record), encoding="utf-8")
    (out / "README.md").write_text(card(record), encoding="utf-8")


def ratio(record: dict[str, Any]) -> float:
    """How many times faster the whole converted model is."""
    return float(record["latency"]["dense_ms"] / record["latency"]["converted_ms"])


def ceiling(record: dict[str, Any]) -> float:
    """Amdahl's limit: how many times faster the model would be if its feedforward layers took no time."""
    dense_us = 1e3 * record["latency"]["dense_ms"]
    return float(dense_us / max(dense_us - sum(layer["dense_us"] for layer in record["layers"]), 1e-9))


def quality_rows(record: dict[str, Any]) -> list[list[str]]:
    """One row a model: name, quality before and after the joint distillation, held-out loss."""
    rows = [["dense (original)", "", figure(record["dense"]), ""]]
    for name, arm in record["arms"].items():
        rows.append([name, figure(arm["before"]), figure(arm["after"]), figure(arm["held_out_loss"], 4)])
    return rows


def figure(value: float | None, digits: int = 2) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"


def layer_rows(record: dict[str, Any]) -> list[list[str]]:
    """One row a block: what stands there, times, what the layer alone misses, what the best selection would miss."""
    rows = []
    for layer, missed in zip(record["layers"], record["arms"]["tree"]["missed"], strict=True):
        d = layer["description"]
        name = (
            "dense: a tree is slower here" if d is None else f"{d['trees']}x{d['depth']}, leaves of {d['leaf_width']}"
        )
        rows.append(
            [
                str(layer["block"]),
                name,
                f"{layer['dense_us']:.0f}",
                f"{layer['new_us']:.0f}",
                "" if missed is None else f"{100 * missed:.1f}",
                *(f"{100 * value:.1f}" for value in layer["oracle_missed"].values()),
            ]
        )
    return rows


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = ["<tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in head) + "</tr>"]
    cells += ["<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows]
    return f"<table>{''.join(cells)}</table>"


def page(record: dict[str, Any]) -> str:
    """The report as one HTML page."""
    metric = record["metric"] or "quality"
    fractions = [f"best {100 * float(f):.0f} % misses, %" for f in record["layers"][0]["oracle_missed"]]
    health = [
        [str(k), f"{r['entropy_bits']:.2f} of {r['depth']}", f"{r['dead_leaves']} of {r['leaves']}"]
        for k, r in enumerate(record["routing"])
    ]
    parts = [
        f"<h1>Conversion of {html.escape(record['settings']['model'])}</h1>",
        f"<p>{html.escape(summary(record))}</p><h2>Quality</h2>",
        _table(
            ["model", f"{metric}, layers taught alone", f"{metric}, distilled", "held-out loss"], quality_rows(record)
        ),
        "<p>The narrow dense control spends the same floating-point operations and is taught in the same way. Where it "
        "is as good as the tree, the tree's routing brings nothing.</p><h2>Layers</h2>",
        _table(["block", "layer", "dense, us", "new, us", "misses, %", *fractions], layer_rows(record)),
        "<p>Misses: share of the dense layer's effect, after the following norm, that the layer alone does not give "
        "back; each dimension counts by its own variance. Best: the dense neurons that contribute most, chosen for "
        "each token with knowledge of all.</p><h2>Routing</h2>",
        _table(["tree layer", "leaf entropy, bits", "leaves never used"], health),
    ]
    title = html.escape(record["settings"]["model"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Conversion of {title}</title>'
        f"<style>{STYLE}</style>{''.join(parts)}</html>\n"
    )


def summary(record: dict[str, Any]) -> str:
    """The result in a few sentences."""
    latency = record["latency"]
    before, after = figure(record["dense"]), figure(record["arms"]["tree"]["after"])
    return (
        f"The feedforward layers spend {100 * record['active']:.1f} % of their floating-point operations. One sentence "
        f"of up to 128 tokens takes {latency['converted_ms']:.1f} ms instead of {latency['dense_ms']:.1f} ms "
        f"({ratio(record):.2f}x) on {record['device']}; without any feedforward work it would be "
        f"{ceiling(record):.2f}x. {record['metric'] or 'Quality'}: {before} before, {after} after. "
        f"The conversion took {record['seconds']:.0f} s."
    )


def card(record: dict[str, Any]) -> str:
    """Model card in Markdown."""
    lines = [
        f"# {Path(record['settings']['model']).name}, conditional feedforward layers",
        "",
        summary(record),
        "",
        "```python",
        "import fastff.models",
        "from transformers import AutoModel",
        "",
        'model = AutoModel.from_pretrained("path/to/this/directory")',
        "```",
        "",
        f"| model | {record['metric'] or 'quality'}, layers taught alone | distilled | held-out loss |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in quality_rows(record)),
        "",
        "Details: `report/index.html` and `report/report.json`.",
        "",
    ]
    return "\n".join(lines)
