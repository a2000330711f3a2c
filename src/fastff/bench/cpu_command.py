"""What `fastff bench` does on a CPU: choose the grid, show the progress, print and save what was found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fastff.bench.cpu_providers import PROVIDERS
from fastff.bench.cpu_report import NAME, is_whole, notes, save, tables, update
from fastff.bench.cpu_run import PARTIAL, Record, Settings, begun, fresh, run_grid
from fastff.bench.workloads import Grid, Only
from fastff.machine import cores
from fastff.report.progress import shown


def settings_of(*, quick: bool, only: Sequence[str], seconds: float | None) -> Settings:
    """The whole grid with one thread and all cores, or a small part of it. Raises ValueError for an unknown choice."""
    chosen = Only.parse(only)
    unknown = [name for name in chosen.provider if name not in PROVIDERS]
    if unknown:
        raise ValueError(f"provider {unknown[0]!r} is not one of {', '.join(PROVIDERS)}")
    if quick:
        grid = Grid(threads=(1,), rows=(1, 128, 1024), layers=(16,), gpt3_rows=(), train_rows=(), only=chosen)
        settings = Settings(grid, seconds=seconds or 0.25, longest_call=2.0)
    else:
        settings = Settings(
            Grid(threads=tuple(dict.fromkeys((1, cores()))), only=chosen), seconds=seconds or Settings.seconds
        )
    if not settings.grid.workloads():
        raise ValueError(f"no workload has {' '.join(only)}: nothing to measure")
    return settings


def bench_cpu(settings: Settings, out: Path | None, console: Console, *, replace: bool = False) -> int:
    """Run, print and, with `out`, save; with `replace`, into what is saved there.

    Returns the exit code: 1 if an output was wrong, 130 if interrupted. Raises ValueError if these workloads cannot
    take the place of what is saved."""
    if out is not None and replace:
        update(saved(out), fresh(settings))  # says at once what it would say after hours
    if out is not None and (out / PARTIAL).is_file() and begun(settings, out) is None:
        console.print(f"{out / PARTIAL} was left by other settings, versions or commit: beginning again", markup=False)
    with shown(console, "fastff") as progress:
        try:
            record = run_grid(settings, out, progress)
        except KeyboardInterrupt:
            kept = "" if out is None else f": run the same command again to resume from {out}"
            console.print(f"interrupted{kept}", style="yellow", markup=False)
            found = None if out is None or replace else begun(settings, out)
            if found is not None and not _holds_whole(out):
                conclude(found, out, console, whole=False)
            return 130
    if out is None or not replace:
        return conclude(record, out, console)
    code = conclude(record, None, console)
    merged = update(saved(out), record)
    save(merged, out, whole=is_whole(merged))
    (out / PARTIAL).unlink(missing_ok=True)
    console.print(f"wrote {len(record.finished)} workloads into {out}", markup=False)
    return code


def _holds_whole(out: Path | None) -> bool:
    """Whether a folder holds the results of a run that ended: a part of one does not take their place."""
    return out is not None and (out / f"{NAME}.json").is_file() and bool(saved(out).get("whole"))


def saved(out: Path) -> dict[str, Any]:
    """The run whose results a folder holds."""
    found: dict[str, Any] = json.loads((out / f"{NAME}.json").read_text())
    return found


def conclude(record: Record, out: Path | None, console: Console, *, whole: bool = True) -> int:
    """Print and save what was found; of an interrupted run, the finished workloads."""
    for table in tables(record, wide=console.width >= 150):
        console.print(table)
    for line in notes(record):
        console.print(line, markup=False)
    if out is not None:
        for path in save(record, out, whole=whole):
            console.print(f"wrote {path}", markup=False)
    for name in record.wrong:
        console.print(f"error: {name}: {record.left_out[name]}", style="red", markup=False)
    return 1 if record.wrong else 0
