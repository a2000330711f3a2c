"""Layer speed: a conditional layer beside the fastest dense layer of the same process, outputs checked first."""

from fastff.bench.cases import CASES, Case
from fastff.bench.run import Timing, run_cases

__all__ = ["CASES", "Case", "Timing", "run_cases"]
