"""What a GPU run is shown as: ratios to the fastest dense provider, every cell in CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from fastff.bench.gpu_run import Record, Timing
from fastff.io import write_json, write_text
from fastff.report.numbers import three_digits

NAME = "layer-gpu"


@dataclass(frozen=True)
class Best:
    """One case: fastff's fastest form beside the fastest dense provider."""

    dense: Timing
    ours: Timing

    @property
    def ratio(self) -> float:
        """How many times faster fastff is."""
        return self.dense.latency_us_p50 / self.ours.latency_us_p50


def best_of(timings: Sequence[Timing]) -> list[Best]:
    """Of every case that has both sides, in the order of the run."""
    found = []
    for case in dict.fromkeys(map(_case, timings)):
        here = [t for t in timings if _case(t) == case]
        dense = [t for t in here if t.kind == "dense"]
        ours = [t for t in here if t.provider.startswith("fastff")]
        if dense and ours:
            found.append(Best(*(min(side, key=lambda t: t.latency_us_p50) for side in (dense, ours))))
    return found


def _case(timing: Timing) -> tuple[Any, ...]:
    return timing.layer, timing.rows, timing.dtype, timing.training, timing.layers, timing.cold


def tables(record: Record) -> list[Table]:
    """Cases with their ratios, and the training steps of whole models."""
    shown = Table(title="us a layer, medians", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in ("layer", "rows", "dtype", "mode", "L2", "fastest dense", "fastff", "x", "TFLOP/s", "GB/s", "of copy"):
        shown.add_column(head, no_wrap=True, justify="left" if head in ("layer", "mode", "fastest dense") else "right")
    for best in best_of(record.timings):
        ours = best.ours
        shown.add_row(
            ours.layer,
            str(ours.rows),
            ours.dtype,
            "fwd+bwd" if ours.training else "forward",
            "cold" if ours.cold else "warm",
            f"{three_digits(best.dense.latency_us_p50)} {best.dense.provider}",
            three_digits(ours.latency_us_p50),
            three_digits(best.ratio),
            three_digits(ours.tflops),
            "" if ours.gb_per_s is None else three_digits(ours.gb_per_s),
            "" if ours.copy_fraction is None else f"{ours.copy_fraction:.0%}",
        )
    steps = Table(title="a training step of a whole model", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in ("feedforward", "ms", "quartiles", "peak GiB"):
        steps.add_column(head, justify="left" if head == "feedforward" else "right")
    for step in record.steps:
        spread = f"{three_digits(step.step_ms_p25)}-{three_digits(step.step_ms_p75)}"
        steps.add_row(step.name, three_digits(step.step_ms_p50), spread, three_digits(step.peak_bytes / 2**30))
    return [shown, steps] if record.steps else [shown]


def notes(record: Record) -> list[str]:
    """The device and versions, memory of training, what was left out or not reached."""
    lines = [", ".join(f"{key} {value}" for key, value in record.about.items())]
    for best in best_of(record.timings):
        if best.ours.held_bytes is not None and best.dense.held_bytes:
            lines.append(
                f"{best.ours.layer}, {best.ours.rows} rows, {best.ours.dtype}, forward + backward: activations held "
                f"{best.ours.held_bytes / 2**20:.0f} MiB, dense {best.dense.held_bytes / 2**20:.0f} MiB; peak "
                f"{(best.ours.peak_bytes or 0) / 2**20:.0f} MiB, dense {(best.dense.peak_bytes or 0) / 2**20:.0f} MiB"
            )
    lines += [f"left out: {key}: {why}" for key, why in record.left_out.items()]
    if record.not_reached:
        lines.append(f"no time for {len(record.not_reached)} cells, from {record.not_reached[0]!r} on")
    return lines


def save(record: Record, directory: Path) -> list[Path]:
    """Write layer-gpu.csv and .json beside the lines that a run can go on from; returns their paths."""
    paths = [directory / f"{NAME}.{kind}" for kind in ("csv", "json")]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(Timing.__dataclass_fields__))
    writer.writeheader()
    writer.writerows(asdict(t) for t in record.timings)
    write_text(paths[0], table.getvalue())
    best = [
        {"dense": b.dense.key, "ours": b.ours.key, "ratio": float(f"{b.ratio:.4g}")} for b in best_of(record.timings)
    ]
    document = {"best": best, **asdict(record)}
    write_json(paths[1], document)
    return paths
