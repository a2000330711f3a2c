"""What `fastff bench --device cuda` does."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from fastff.bench.gpu_cases import cells
from fastff.bench.gpu_device import Cuda
from fastff.bench.gpu_report import notes, save, tables
from fastff.bench.gpu_run import Settings, run_gpu
from fastff.bench.workers import FAILED, WRONG
from fastff.report.progress import shown


def bench_gpu(settings: Settings, out: Path, console: Console) -> int:
    """Run, print and save. Returns the exit code: 1 without a device or with a wrong output, 130 if interrupted.

    What a stopped run measured is kept in `out`, and the same command resumes from it."""
    try:
        device = Cuda()
    except RuntimeError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1

    try:
        with shown(console, "fastff") as progress:
            record = run_gpu(list(cells()), settings, device, out, progress)
    except KeyboardInterrupt:
        console.print(f"interrupted: run the same command again to resume from {out}", style="yellow", markup=False)
        return 130
    for table in tables(record):
        console.print(table)
    for line in notes(record):
        console.print(line, markup=False)
    for path in save(record, out):
        console.print(f"wrote {path}", markup=False)
    return 1 if any(why.startswith((WRONG, FAILED)) for why in record.left_out.values()) else 0
