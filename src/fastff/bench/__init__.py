"""Layer speed: conditional layers beside the fastest dense layers of the same run, outputs checked first."""

from fastff.bench.cases import Grid, Only
from fastff.bench.run import Record, Settings, Timing, run_grid

__all__ = ["Grid", "Only", "Record", "Settings", "Timing", "run_grid"]
