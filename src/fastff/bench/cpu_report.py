"""What a run of the table is shown as: the best of each case on the terminal, every cell in CSV and JSON, a chart."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from fastff.bench.cpu_run import PARTIAL, Record, Timing
from fastff.bench.limits import Limits
from fastff.bench.workloads import TWINS, Grid, Only, Workload, label, visits
from fastff.io import write_json, write_text
from fastff.report.axis import Axis
from fastff.report.chart import Panel, Series
from fastff.report.chart import chart as draw
from fastff.report.numbers import three_digits

NAME = "layer-cpu"
PRECISIONS = ("fp32", "bf16", "int8")
OURS = {"fp32": "fastff", "bf16": "fastff bf16", "int8": "fastff int8"}


@dataclass(frozen=True)
class Best:
    """One tree in one workload: fastff by precision beside the fastest dense provider of each precision."""

    layer: str
    rows: int
    layers: int
    threads: int
    training: bool
    ours: dict[str, Timing]
    dense: dict[str, Timing]

    def ratio(self, precision: str, against: str = "fp32") -> float | None:
        """How many times faster fastff in one precision is than the fastest dense layer of another; None if unknown."""
        if precision not in self.ours or against not in self.dense:
            return None
        return self.dense[against].latency_us_p50 / self.ours[precision].latency_us_p50

    @property
    def case(self) -> str:
        return f"{self.layer}-{visits(self.layers, self.training)}-{self.rows}-rows-{self.threads}-threads"


def best_of(timings: Sequence[Timing]) -> list[Best]:
    """Of every tree in every workload, in the order of the run. The dense layers are those of the tree's twins, the
    faster where one was measured in two workloads of the same rows, visits and threads."""
    found = []
    for key in dict.fromkeys(_case(t) for t in timings if t.kind == "conditional"):
        layer, *workload = key
        here = [t for t in timings if _case(t)[1:] == tuple(workload)]
        ours = {p: t for p, name in OURS.items() for t in here if (t.layer, t.provider) == (layer, name)}
        twins = [t for t in here if t.kind == "dense" and t.layer in TWINS.get(layer, (t.layer,))]
        dense = {p: _fastest(t for t in twins if t.precision == p) for p in PRECISIONS}
        found.append(Best(*key, ours, {p: t for p, t in dense.items() if t is not None}))
    return found


def _case(timing: Timing) -> tuple[str, int, int, int, bool]:
    return timing.layer, timing.rows, timing.layers, timing.threads, timing.training


def _fastest(timings: Iterable[Timing]) -> Timing | None:
    return min(timings, key=lambda t: t.latency_us_p50, default=None)


def tables(record: Record, *, wide: bool) -> list[Table]:
    """The best of each case, a table a layer: microseconds a row, times faster, the share of the machine's limits.

    wide: with quartiles, for a terminal of 150 columns or more."""
    found = best_of(record.timings)
    return [_table(name, [best for best in found if best.layer == name], wide) for name in _layers(found)]


def _layers(found: Sequence[Best]) -> list[str]:
    return list(dict.fromkeys(best.layer for best in found))


def _table(title: str, found: Sequence[Best], wide: bool) -> Table:
    shown = Table(title=f"{title}: us a row and layer, medians", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    heads = ("visits", "rows", "thr", "dense fp32", "fp32", "bf16", "int8", "x fp32", "x bf16", "x int8", "limit")
    for head in heads:
        shown.add_column(head, justify="left" if head in ("visits", "dense fp32") else "right", no_wrap=True)
    for best in found:
        dense, plain = best.dense.get("fp32"), best.ours.get("fp32")
        limit = None if plain is None or plain.limit_fraction is None else f"{plain.limit_fraction:.0%}"
        ratios = (best.ratio("fp32"), best.ratio("bf16"), best.ratio("int8", "int8"))
        shown.add_row(
            visits(best.layers, best.training),
            str(best.rows),
            str(best.threads),
            _number(dense, wide) + (f" {dense.provider}" if dense else ""),
            *(_number(best.ours.get(p), wide) for p in PRECISIONS),
            *("" if ratio is None else three_digits(ratio) for ratio in ratios),
            limit or "",
        )
    return shown


def _number(timing: Timing | None, wide: bool) -> str:
    if timing is None:
        return ""
    spread = f" ({three_digits(timing.latency_us_p25)}-{three_digits(timing.latency_us_p75)})" if wide else ""
    return three_digits(timing.latency_us_p50) + spread


def notes(record: Record) -> list[str]:
    """The machine, its limits, and what was left out with its reasons, one line each."""
    lines = [
        "x fp32, x bf16: over the fastest dense fp32 layer; x int8: over the fastest dense int8 layer; limit: the "
        "least time that the machine's limits allow the fp32 layer, of its median",
        ", ".join(f"{key} {value}" for key, value in record.machine.items()),
    ]
    lines += [
        f"{found.threads} thread{'s' * (found.threads > 1)}: reads {found.memory_bytes_per_s / 1e9:.1f} GB/s of memory "
        f"and {found.cache_bytes_per_s / 1e9:.1f} GB/s of the last-level cache, multiplies at "
        f"{found.flops_per_s / 1e9:.0f} GFLOP/s in fp32"
        for found in record.limits.values()
    ]
    by_reason: dict[tuple[str, str], list[str]] = {}
    for name, why in record.left_out.items():
        where, provider = name.split(" ", 1)
        by_reason.setdefault((provider, why), []).append(where)
    for (provider, why), places in by_reason.items():
        cases = places[0] if len(places) == 1 else f"{len(places)} cases, {places[0]} to {places[-1]}"
        lines.append(f"left out: {provider}: {why} ({cases})")
    return lines


def save(record: Record, directory: Path, *, whole: bool = True) -> list[Path]:
    """Write layer-cpu.csv, .json and .svg into a directory; returns their paths. A whole run leaves no partial one."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{NAME}.{kind}" for kind in ("csv", "json", "svg")]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(Timing.__dataclass_fields__))
    writer.writeheader()
    writer.writerows(_rounded(t) for t in record.timings)
    write_text(paths[0], table.getvalue())
    write_json(paths[1], document(record, whole=whole))
    chart(record, paths[2])
    if whole:
        (directory / PARTIAL).unlink(missing_ok=True)
    return paths


def update(found: Mapping[str, Any], record: Record) -> Record:
    """A saved run with the workloads of `record` in the place of its own, whose limits and settings stay with them.

    Raises ValueError if a workload was measured in part only, or on another CPU."""
    only = record.settings["grid"]["only"]
    if only["layer"] or only["provider"]:
        raise ValueError("an update measures whole workloads: choose them by rows, visits and threads")
    if found["machine"]["cpu"] != record.machine["cpu"]:
        raise ValueError(f"measured on {record.machine['cpu']}, the results are of {found['machine']['cpu']}")
    workloads = {_workload(t) for t in record.timings}
    fresh: dict[tuple[Any, ...], list[Timing]] = {}
    for timing in record.timings:
        fresh.setdefault((timing.layer, timing.provider, *_workload(timing)), []).append(timing)
    timings: list[Timing] = []
    for old in (Timing(**values) for values in found["timings"]):  # in their order
        again = fresh.get((old.layer, old.provider, *_workload(old)))
        if again:
            timings.append(again.pop(0))
        elif _workload(old) not in workloads:
            timings.append(old)
    timings += [timing for again in fresh.values() for timing in again]
    marks = {
        f"-{visits(layers, training)}-{rows}-rows-{threads}-threads " for rows, layers, threads, training in workloads
    }
    left_out = {name: why for name, why in found["left_out"].items() if not any(mark in name for mark in marks)}
    limits = {values["threads"]: Limits(**values) for values in found["limits"]}
    made = {
        "machine": record.machine,
        "settings": record.settings,
        "limits": [asdict(measured) for measured in record.limits.values()],
        "workloads": sorted(mark.strip("- ") for mark in marks),
    }
    return Record(
        found["machine"],
        found["settings"],
        limits,
        timings,
        {**left_out, **record.left_out},
        updates=[*found.get("updates", []), made],
    )


def is_whole(record: Record) -> bool:
    """Whether every layer of every workload of the record's own grid was measured."""
    values = {name: tuple(given) for name, given in record.settings["grid"].items() if name != "only"}
    only = Only(**{kind: tuple(given) for kind, given in record.settings["grid"]["only"].items()})
    measured = {(timing.layer, *_workload(timing)) for timing in record.timings}
    return all(
        (label(subject), *_workload(workload)) in measured
        for workload in Grid(**values, only=only).workloads()
        for subject in workload.subjects
    )


def _workload(of: Timing | Workload) -> tuple[int, int, int, bool]:
    return of.rows, of.layers, of.threads, of.training


def document(record: Record, *, whole: bool = True) -> dict[str, Any]:
    """A run as plain values: what tools/tables reads. whole: whether all of its workloads are finished."""
    return {
        "whole": whole,
        "machine": record.machine,
        "settings": record.settings,
        "limits": [asdict(found) for found in record.limits.values()],
        "left_out": record.left_out,
        "best": [_summary(best) for best in best_of(record.timings)],
        "timings": [_rounded(t) for t in record.timings],
        **({"updates": record.updates} if record.updates else {}),
    }


def _summary(best: Best) -> dict[str, Any]:
    def name_and_time(timings: dict[str, Timing]) -> dict[str, Any]:
        return {
            p: {"provider": t.provider, "layer": t.layer, "latency_us_p50": _short(t.latency_us_p50),
                "relative_error": _short(t.relative_error)}
            for p, t in timings.items()
        }  # fmt: skip

    ratios = {
        f"{p}_over_dense_{against}": ratio
        for p in PRECISIONS
        for against in ("fp32", "int8")
        if (ratio := best.ratio(p, against)) is not None
    }
    case = {name: getattr(best, name) for name in ("case", "layer", "rows", "layers", "threads", "training")}
    rounded = {name: _short(value) for name, value in ratios.items()}
    return {**case, "ours": name_and_time(best.ours), "dense": name_and_time(best.dense), "ratios": rounded}


def _rounded(timing: Timing) -> dict[str, Any]:
    return {name: _short(value) for name, value in asdict(timing).items()}


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def chart(record: Record, path: Path) -> None:
    """Times faster than the fastest dense fp32 layer, over rows: a panel a tree, a line a precision and threads.

    Of the workloads that visit most layers.
    """
    found = [best for best in best_of(record.timings) if not best.training]
    panels = []
    for name in _layers(found) or [""]:
        here = [best for best in found if best.layer == name]
        most = max((best.layers for best in here), default=1)
        panels.append(_panel([best for best in here if best.layers == most], f"{name}, {visits(most, False)}"))
    drawn = draw(panels, title="Times faster than the fastest dense fp32 layer", width=330 * len(panels), height=360)
    write_text(path, drawn)


def _panel(here: Sequence[Best], title: str) -> Panel:
    series = []
    for threads in dict.fromkeys(best.threads for best in here):
        for color, precision in enumerate(PRECISIONS):
            points = sorted(
                (best.rows, ratio)
                for best in here
                if best.threads == threads and (ratio := best.ratio(precision)) is not None
            )
            if points:
                name = f"{precision}, {threads} thread{'s' * (threads > 1)}"
                series.append(Series(name, points, color, line="solid" if threads == 1 else "dashed"))
    rows = Axis("rows a call", log=True, ticks=sorted({best.rows for best in here}))
    times = Axis("times faster than the fastest dense fp32 layer", log=True)
    return Panel(series, rows, times, title, levels=[(1.0, "as fast")])
