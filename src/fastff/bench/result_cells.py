"""Files of measured cells, of which a run may measure some anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastff.io import read_json


def kept_cells(path: Path, measured: Sequence[dict[str, Any]], place: Sequence[str]) -> list[dict[str, Any]]:
    """Cells of the file, if there is one, that were not measured now: place names what tells them apart. Raises
    FileError for a file without cells."""
    if not path.exists():
        return []
    now = {tuple(cell[name] for name in place) for cell in measured}
    old = read_json(path, needs={"cells": list}, remedy="name another file")["cells"]
    return [cell for cell in old if tuple(cell.get(name) for name in place) not in now]
