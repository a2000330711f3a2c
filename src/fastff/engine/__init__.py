"""Whole models for inference without PyTorch: exported to OpenVINO, or run by the native engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastff.engine.encode import EncoderEngine
    from fastff.engine.generate import Engine

__all__ = ["load"]


def load(folder: str | Path, *, map: bool = False) -> Engine | EncoderEngine:
    """Open a directory that `fastff export --to native` wrote: a decoder (`fastff.engine.generate.Engine`) or an
    encoder (`fastff.engine.encode.EncoderEngine`).

    map: share the file's pages with other processes instead of a copy on huge pages. Raises CheckpointError or
    FastffError for a directory that is none.
    """
    from fastff.engine.facts import kind_of_export

    if kind_of_export(Path(folder)) == "encoder":
        from fastff.engine.encode import EncoderEngine

        return EncoderEngine(Path(folder), map=map)
    from fastff.engine import generate

    return generate.load(folder, map=map)
