"""Where the result files lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MACHINES = ROOT / "benchmarks" / "results"
INTEL = MACHINES / "intel-xeon-amx-2-cores"
AMD = MACHINES / "amd-epyc-2-cores"
H200 = MACHINES / "nvidia-h200"
TRAINING = ROOT / "experiments"


def read(path: Path) -> Any:
    return json.loads(path.read_text())
