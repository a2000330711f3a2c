"""Whole models for inference without PyTorch: exported to OpenVINO, or run by the native engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastff.engine.generate import Engine

__all__ = ["load"]


def load(folder: str | Path, *, map: bool = False) -> Engine:
    """Open a directory that `fastff export --to native` wrote: `fastff.engine.generate.load`."""
    from fastff.engine import generate

    return generate.load(folder, map=map)
