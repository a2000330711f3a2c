"""Layer speed: conditional layers beside the fastest dense layers of the same run, outputs checked first."""

from fastff.bench.cpu_run import Record, Settings, Timing, run_grid
from fastff.bench.workloads import Grid, Only

__all__ = ["Grid", "Only", "Record", "Settings", "Timing", "run_grid"]
