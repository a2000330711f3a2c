"""The tables of conversions, from what the scripts here wrote."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastff.convert.conversion_chart import LABELS
from fastff.report.markdown import markdown_table

FOLDER = Path(__file__).resolve().parent
Row = dict[str, Any]


def read(name: str) -> Any:
    return json.loads((FOLDER / name).read_text())


def minilm() -> str:
    """The embedding model at 10 % and 3 % of the work."""
    records = [read("minilm-10.json"), read("minilm-3.json")]
    return minilm_table(records[0]["dense"], [row for record in records for row in record["variants"]])


def decoder(*names: str) -> str:
    """SmolLM2 at half and at a quarter of the feedforward work: means over seeds; in brackets the least and the
    greatest where there are several, and the change against dense."""
    head = ["feedforward", "active, %", "seeds", "tokens, million", "unexplained alone, %", "perplexity, alone"]
    records = [read(name) for name in names]
    dense = records[0]["dense"]
    lines = [["dense (original)", "100", "", "", "", "", f"{dense:.2f}"]]
    for record in records:
        for mine in _by_variant(record):
            change = 100 * (statistics.mean(row["after"] for row in mine) / dense - 1)
            cells = [mine[0]["variant"], f"{100 * mine[0]['active']:.1f}", f"{len(mine)}"]
            cells += [f"{mine[0]['tokens'] / 1e6:.1f}"]
            cells += [f"{100 * statistics.mean(share or 0.0 for row in mine for share in row['unexplained']):.0f}"]
            cells += [f"{statistics.mean(row['before'] for row in mine):.1f}"]
            lines.append([*cells, f"{_spread([row['after'] for row in mine])}, {change:+.1f} %"])
    return markdown_table([*head, "perplexity"], lines)


def decoder_rates(name: str) -> str:
    """Short runs of equal tokens with other settings, the best of each kind of layer first."""
    record = read(name)
    options = {"lr": "lr", "lr_others": "lr of the rest", "lr_routers": "lr of routers", "beta2": "beta2"}
    lines = [["dense (original)", "", *([""] * len(options)), "", f"{record['dense']:.2f}"]]
    for row in sorted(record["variants"], key=lambda row: (-round(row["active"], 1), row["after"])):
        given = [f"{row.get(option, record['settings'][option]):g}" for option in options]
        line = [
            row["variant"],
            f"{row['tokens'] / 1e6:.1f}",
            *given,
            f"{row['curve'][0][1]:.2f}",
            f"{row['after']:.2f}",
        ]
        lines.append(line)
    return markdown_table(["feedforward", "tokens, million", *options.values(), "at half", "perplexity"], lines)


def decoder_growth(name: str) -> str:
    """Perplexity on the way and at the end, the mean over seeds."""
    record, lines = read(name), []
    for mine in _by_variant(record):
        cells = [f"{statistics.mean(row['curve'][k][1] for row in mine):.2f}" for k in range(len(mine[0]["curve"]))]
        lines.append([mine[0]["variant"], *cells, f"{statistics.mean(row['after'] for row in mine):.2f}"])
    row = record["variants"][0]
    parts = [f"{100 * step / row['steps']:.0f} %" for step, _ in row["curve"]]
    return markdown_table(["feedforward", *parts, "100 %"], lines)


def _by_variant(record: Row) -> list[list[Row]]:
    """A record's rows, seeds of a variant together; most work first, then the lowest perplexity."""
    found: dict[str, list[Row]] = {}
    for row in record["variants"]:
        found.setdefault(row["variant"], []).append(row)
    return sorted(found.values(), key=lambda rows: (-round(rows[0]["active"], 1), float(rows[0]["after"])))


def minilm_of(name: str) -> str:
    """One other run of the embedding model."""
    record = read(name)
    return minilm_table(record["dense"], record["variants"])


def minilm_table(dense: dict[str, float], rows: Sequence[Row]) -> str:
    """One line a variant, most work first: mean (lowest-highest) over its seeds of every evaluated table."""
    names = list(dense)
    head = ["feedforward", "active, %", "seeds, steps", "unexplained alone, %", f"{names[0]}, alone", *names]
    lines = [["dense (original)", "100", "", "", "", *(f"{dense[name]:.2f}" for name in names)]]
    for variant in sorted({row["variant"] for row in rows}, key=lambda variant: _order(rows, variant)):
        mine = [row for row in rows if row["variant"] == variant]
        cells = [
            variant,
            f"{100 * mine[0]['active']:.1f}",
            f"{len(mine)}, {mine[0]['steps']:,}",
            f"{100 * statistics.mean(share for row in mine for share in row['unexplained']):.0f}",
            f"{statistics.mean(row['before'][names[0]] for row in mine):.2f}",
            *(_spread([row["after"][name] for row in mine]) for name in names),
        ]
        lines.append(cells)
    return markdown_table(head, lines)


def _order(rows: Sequence[Row], variant: str) -> tuple[float, str]:
    return -next(float(row["active"]) for row in rows if row["variant"] == variant), variant


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f}-{max(values):.2f})"


def oracle() -> str:
    """What the best neurons of every token would keep, chosen with knowledge of all, untrained."""
    record = read("minilm-10.json")
    shares = [f"{100 * float(share):.0f} %" for share in record["oracle"]]
    scores = [f"{score:.2f}" for score in record["oracle"].values()]
    row = ["sts-b dev", f"{record['dense']['sts-b dev']:.2f}", *scores]
    return markdown_table(["neurons kept of each token", "all", *shares], [row])


def tasks() -> str:
    """The classifier and the causal model, each beside its baselines; in brackets against the dense model."""
    head = ["task, metric", "feedforward", "active, %", "unexplained alone, %", "layers taught alone"]
    lines = []
    for record in read("tasks.json"):
        dense, name = record["dense"], f"{record['task']}, {record['metric']}"
        lines.append([name, "dense", "100", "", "", f"{dense:.2f}"])
        for variant, facts in record["variants"].items():
            cells = [
                name,
                variant,
                f"{100 * facts['active']:.1f}",
                f"{100 * statistics.mean(facts['unexplained']):.0f}",
                f"{facts['before']:,.2f}",
                f"{facts['after']:.2f} ({100 * (facts['after'] / dense - 1):+.1f} %)",
            ]
            lines.append(cells)
    return markdown_table([*head, "distilled together"], lines)


def latency() -> str:
    return latency_table(read("latency.json"))


def latency_table(record: dict[str, Any]) -> str:
    """Whole call and feedforwards at each shape, milliseconds and times faster than dense."""
    heads = [
        f"{a}x{b}, {what}" for a, b in (s["shape"] for s in record["shapes"]) for what in ("whole", "feedforwards")
    ]
    lines = []
    for name, share in record["active"].items():
        cells = [name, f"{100 * share:.1f}"]
        for shape in record["shapes"]:
            for what in ("whole", "feedforward"):
                ms = shape[what][name]["median_ms"]
                cells.append(f"{ms:.1f} ({shape[what]['dense']['median_ms'] / ms:.2f}x)")
        lines.append(cells)
    return markdown_table(["feedforward", "active, %", *heads], lines)


def steps() -> str:
    """Seconds of a joint step of every student on a CPU, and hours of all steps."""
    record = read("cpu-steps.json")
    names = {"tree": "trees", "narrow": "narrow dense, as pruned", "none": "no feedforward"}
    head = ["model", f"seconds a step of {record['batch']} sentences", f"{record['steps']:,} steps, hours"]
    lines = []
    for name, seconds in record["step_s"].items():
        lines.append((names[name], f"{seconds:.2f}", f"{seconds * record['steps'] / 3600:.1f}"))
    total = sum(record["step_s"].values()) + record["step_s"]["narrow"]
    lines.append(("all four of the default", f"{total:.2f}", f"{total * record['steps'] / 3600:.1f}"))
    return markdown_table(head, lines)


def command(name: str) -> str:
    """A run of the whole `fastff convert`."""
    return command_table(read(name))


def command_table(record: dict[str, Any]) -> str:
    """Every model of a report of `fastff convert`: its distance from the dense model (the loss of the distillation on
    text kept aside), its scores, what a causal one lost by them, and its times."""
    report = record["report"]
    dense, tables = report["dense"], report["tables"]
    shapes = [f"{a}x{b}, ms ({what})" for a, b in report["shapes"] for what in ("whole", "feedforwards")]
    heads = ["model", "active, %", "distance", f"{tables[0]}, alone", *tables, *shapes]
    rows = [["dense (original)", "100", "0", "", *_command_scores(dense, dense, report), *_command_times(dense, dense)]]
    for point in (report, *report["curve"]):
        for name, variant in point["variants"].items():
            scores = [
                f"{variant['held_out_loss']:.3f}",
                f"{variant['before']:,.2f}",
                *_command_scores(variant, dense, report),
            ]
            rows.append([LABELS[name], f"{100 * variant['active']:.1f}", *scores, *_command_times(variant, dense)])
    return markdown_table(heads, rows)


def _command_scores(variant: Row, dense: Row, report: dict[str, Any]) -> list[str]:
    found = [variant.get("after", variant.get("quality")), *variant["further"].values()]
    if report["kind"] != "causal" or variant is dense:
        return [f"{score:,.2f}" for score in found]
    before = [dense["quality"], *dense["further"].values()]
    return [f"{new:,.2f} ({100 * (new / old - 1):+.1f} %)" for new, old in zip(found, before, strict=True)]


def _command_times(variant: Row, dense: Row) -> list[str]:
    cells = []
    for k in range(len(dense["latency_ms"])):
        for name in ("latency_ms", "feedforward_ms"):
            times = f" ({dense[name][k] / variant[name][k]:.2f}x)" if variant is not dense else ""
            cells.append(f"{variant[name][k]:.1f}{times}")
    return cells


TABLES: dict[str, Callable[[], str]] = {
    "convert-decoder": lambda: decoder("decoder-mixed.json", "decoder-longer.json"),
    "convert-decoder-mixed-growth": lambda: decoder_growth("decoder-mixed.json"),
    "convert-decoder-rates": lambda: decoder_rates("decoder-rates.json"),
    "convert-decoder-growth": lambda: decoder_growth("decoder-longer.json"),
    "convert-decoder-short": lambda: decoder("decoder-50.json", "decoder-25.json"),
    "convert-experts": lambda: minilm_of("minilm-experts.json"),
    "convert-minilm": minilm,
    "convert-minilm-cpu": lambda: minilm_of("minilm-cpu.json"),
    "convert-minilm-earlier": lambda: minilm_of("minilm-earlier.json"),
    "convert-oracle": oracle,
    "convert-tasks": tasks,
    "convert-latency": latency,
    "convert-steps": steps,
    "convert-command-minilm": lambda: command("command-minilm.json"),
    "convert-max-loss-minilm": lambda: command("max-loss-minilm.json"),
    "convert-command-causal": lambda: command("command-causal.json"),
}
