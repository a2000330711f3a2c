"""The report of a conversion: JSON, a page that needs nothing else, and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastff.convert.conversion_chart import LABELS, curve, reads_pictures
from fastff.convert.time_budget import duration
from fastff.io import write_text
from fastff.report import pages
from fastff.report.markdown import markdown_table

AUTO_NAMES = {
    "embedding": "AutoModel",
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "classifier": "AutoModelForSequenceClassification",
    "image": "AutoModel",
}
BASELINES = {
    "narrow": "Narrow dense: the dense neurons that do most, output weights solved again, of the same floating-point "
    "operations as the chosen layers.",
    "pruned": "Pruned dense: the dense neurons that do most, as they were.",
    "none": "No feedforward: a constant.",
}


def write(out: Path, record: dict[str, Any]) -> None:
    """Write OUT/report/report.json, OUT/report/index.html and OUT/README.md."""
    write_text(out / "report" / "report.json", json.dumps(record, indent=2) + "\n")
    write_text(out / "report" / "index.html", page(record))
    write_text(out / "README.md", card(record))


def ratios(record: dict[str, Any], what: str = "latency_ms", name: str | None = None) -> list[float]:
    """How many times faster than dense a model (the one that was written) is, at each timed shape: whole calls, or with
    "feedforward_ms" those layers."""
    pairs = zip(record["dense"][what], record["variants"][name or record["written"]][what], strict=True)
    return [dense / max(new, 1e-9) for dense, new in pairs]


def figure(value: float | None, digits: int = 2) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"


def shape_names(record: dict[str, Any]) -> list[str]:
    """The timed shapes: sequences x tokens, or how many pictures."""
    if reads_pictures(record):
        return [f"{count} picture{'s' * (count > 1)}" for count, _ in record["shapes"]]
    return [f"{sequences}x{tokens}" for sequences, tokens in record["shapes"]]


def metric_names(record: dict[str, Any]) -> list[str]:
    """The metric on every table, the one that decides first."""
    metric = record["metric"] or "quality"
    return [f"{metric}, {table}" for table in record["tables"]] or [metric]


def quality_head(record: dict[str, Any]) -> list[str]:
    first, *others = metric_names(record)
    times = [f"{name}, ms (feedforwards)" for name in shape_names(record)]
    return ["model", "active, %", f"{first}, layers trained alone", first, *others, "held-out loss", *times]


def quality_rows(record: dict[str, Any]) -> list[list[str]]:
    """One row a model: name, share of the work, quality before and after joint distillation, held-out loss, times."""
    dense = record["dense"]
    figures = ["", figure(dense["quality"]), *map(figure, dense["further"].values()), ""]
    rows = [["dense (original)", "100", *figures, *_times(dense)]]
    for point in (record, *record["curve"]):
        for name, variant in point["variants"].items():
            figures = [figure(variant["before"]), figure(variant["after"]), *map(figure, variant["further"].values())]
            figures.append(figure(variant["held_out_loss"], 4))
            rows.append([LABELS[name], f"{100 * variant['active']:.1f}", *figures, *_times(variant)])
    beside = record.get("beside")
    if beside is not None:
        scores = [figure(score) for score in beside["scores"]] or [figure(None)] * len(metric_names(record))
        times = ("too long" if ms is None else f"{ms:.1f}" for ms in beside["latency_ms"])
        rows.append([beside["model"], "", "", *scores, "", *times])
    return rows


def _times(variant: dict[str, Any]) -> list[str]:
    pairs = zip(variant["latency_ms"], variant["feedforward_ms"], strict=True)
    return [f"{whole:.1f} ({layers:.1f})" for whole, layers in pairs]


def layer_name(description: Mapping[str, Any] | None) -> str:
    """A layer in words: trees x depth or leaves chosen, neurons of a leaf, shared neurons."""
    if description is None:
        return "dense"
    if description["kind"] == "none":
        return "none"
    if description["kind"] == "dense":
        return f"{description['intermediate_size']} neurons"
    shared = f", {description['shared']} shared" if description.get("shared") else ""
    if description["kind"] == "flat":
        return f"{description['k']} of {description['leaves']} leaves of {description['leaf_width']}{shared}"
    return f"{description['trees']}x{description['depth']}, leaves of {description['leaf_width']}{shared}"


def layer_rows(record: dict[str, Any]) -> list[list[str]]:
    """One row a block: what stands there and why, its times and those of the dense layer, what it and the best
    selection miss."""
    rows = []
    for layer in record["layers"]:
        dense, *others = layer["options"]
        mine = next(
            (o for o in others if (o["kind"], o["description"]) == (layer["kind"], layer["description"])), dense
        )
        rows.append(
            [
                str(layer["block"]),
                layer_name(layer["description"]),
                layer["reason"] if mine is dense else f"{layer['reason']}: {mine['kind']}",
                " / ".join(f"{us:.0f}" for us in dense["times_us"]),
                "" if mine is dense else " / ".join(f"{us:.0f}" for us in mine["times_us"]),
                "" if mine is dense else f"{mine['loss_increase']:.4f}",
                _other(layer["runner_up"]),
                "" if layer["unexplained"] is None else f"{100 * layer['unexplained']:.1f}",
                *(f"{100 * value:.1f}" for value in layer["best_selection_unexplained"].values()),
            ]
        )
    return rows


def _other(option: dict[str, Any] | None) -> str:
    """What the runner-up of a block would have cost."""
    if option is None:
        return ""
    return f"{option['kind']}: {option['loss_increase']:.4f}, {' / '.join(f'{us:.0f}' for us in option['times_us'])} us"


def tried_rows(record: dict[str, Any]) -> list[list[str]]:
    """One row a shape that was tried on the middle block."""
    return [
        [
            tried["kind"],
            layer_name(tried["description"]),
            " / ".join(f"{us:.0f}" for us in tried["times_us"]),
            f"{100 * tried['unexplained']:.1f}",
            f"{tried['loss_increase']:.4f}",
        ]
        for tried in record["tried"]
    ]


def page(record: dict[str, Any]) -> str:
    """The report as one HTML page."""
    best = [f"best {100 * float(f):.0f} % leave, %" for f in record["layers"][0]["best_selection_unexplained"]]
    at = " / ".join(shape_names(record))
    layers = [
        "block",
        "layer",
        "why",
        f"dense, us, {at}",
        f"new, us, {at}",
        "loss increase alone",
        "runner-up",
        "unexplained, %",
    ]
    routing = [
        (k, f"{used['entropy_bits']:.2f} of {used['most_bits']:.2f}", f"{used['dead_leaves']} of {used['leaves']}")
        for k, used in enumerate(record["routing"])
    ]
    return pages.render(
        "conversion.html",
        model=record["settings"]["model"],
        summary=summary(record),
        quality={"head": quality_head(record), "rows": quality_rows(record)},
        curve=curve(record),
        baselines=" ".join(text for name, text in BASELINES.items() if name in record["variants"]),
        recipe=_recipe_sentence(record),
        timed_on=record["timed_on"],
        layers={"head": [*layers, "unexplained, %", *best], "rows": layer_rows(record)},
        tried={
            "head": ["kind", "layer", f"us, {at}", "unexplained, %", "loss increase alone"],
            "rows": tried_rows(record),
        },
        examples="pictures" if reads_pictures(record) else "text",
        token="patch" if reads_pictures(record) else "token",
        routing={"head": ["conditional layer", "leaf entropy, bits", "leaves never used"], "rows": routing},
    )


def _recipe_sentence(record: dict[str, Any]) -> str:
    """How all students were trained, and what that took."""
    table, memory = record["timetable"], record["gpu_bytes"]
    held = "" if memory is None else f"; {memory['used'] / 2**30:.1f} GiB of GPU memory were used at most"
    return (
        f"Every model but the original was distilled in {table['steps']:,} steps of {record['settings']['batch']} "
        f"examples, which took {table['step_s'] / table['students']:.3g} s each when some were tried before{held}."
    )


def summary(record: dict[str, Any]) -> str:
    """The result in a few sentences."""
    written = record["variants"][record["written"]]
    layers = ratios(record, "feedforward_ms")
    times = [
        f"{_taking(record, name)} {new:.1f} ms instead of {old:.1f} ms ({old / max(new, 1e-9):.2f}x; feedforwards "
        f"{own:.1f}x; without any {ceiling:.2f}x)"
        for name, new, old, own, ceiling in zip(
            shape_names(record),
            written["latency_ms"],
            record["dense"]["latency_ms"],
            layers,
            record["ceilings"],
            strict=True,
        )
    ]
    kept = sum(layer["description"] is None for layer in record["layers"])
    won = f"Written: {LABELS[record['written']]}{_next(record)}. "
    stayed = f" {kept} of {len(record['layers'])} layers are dense." if kept else ""
    scores = zip(
        metric_names(record),
        [record["dense"]["quality"], *record["dense"]["further"].values()],
        [written["after"], *written["further"].values()],
        strict=True,
    )
    quality = "; ".join(f"{name}: {figure(old)} before, {figure(new)} after" for name, old, new in scores)
    part = "last part of the conversion, which was interrupted," if record["continued"] else "conversion"
    return (
        f"{won}The feedforward layers spend {100 * written['active']:.1f} % of their floating-point operations."
        f"{stayed} Timed on {record['timed_on']}: {'; '.join(times)}. {quality}. The {part} took "
        f"{duration(record['seconds'])} on {record['device']}."
    )


def _taking(record: dict[str, Any], shape: str) -> str:
    if not reads_pictures(record):
        return f"{shape} tokens take"
    return f"{shape} {'take' if shape.endswith('s') else 'takes'}"


def _next(record: dict[str, Any]) -> str:
    """What the runner-up would have been."""
    name = record["runner_up"]
    if name is None:
        return ""
    other, metric = record["variants"][name], metric_names(record)[0]
    times = " / ".join(f"{ms:.1f}" for ms in other["latency_ms"])
    score = "" if other["after"] is None else f"{metric} {figure(other['after'])}, "
    return f"; the runner-up, {LABELS[name]}, has {score}held-out loss {other['held_out_loss']:.4f}, {times} ms"


def card(record: dict[str, Any]) -> str:
    """Model card in Markdown."""
    auto, directory = AUTO_NAMES[record["kind"]], '"path/to/this/directory"'
    names, loads = [auto], [f"model = {auto}.from_pretrained({directory})"]
    if reads_pictures(record):
        names.insert(0, "AutoImageProcessor")
        loads.insert(0, f"processor = AutoImageProcessor.from_pretrained({directory})")
    lines = [
        f"# {Path(record['settings']['model']).name}, converted feedforward layers",
        "",
        summary(record),
        "",
        "```python",
        "import fastff.models",
        f"from transformers import {', '.join(names)}",
        "",
        *loads,
        "```",
        "",
        markdown_table(quality_head(record), quality_rows(record)),
        "",
        *(
            ["`pooler_output` is not trained, the original has no weights of it: take `last_hidden_state.mean(1)`.", ""]
            if record.get("untrained_pooler")
            else []
        ),
        "Details: `report/index.html` and `report/report.json`.",
        "",
    ]
    return "\n".join(lines)
