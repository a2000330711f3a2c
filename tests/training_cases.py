"""Small text and small runs that the tests of `fastff.training` share."""

from pathlib import Path
from typing import Any

from fastff.demo.data import documents
from fastff.training.pretrain import Settings

# For the preset tiny on windows of 16 tokens: a step takes a few hundredths of a second.
FEEDFORWARD = '{"kind": "fff", "depth": 3, "trees": 2, "gate": "boundary", "bias": true}'


def write_text(folder: Path, *, paragraphs: int = 120) -> Path:
    """A text file with the beginning of a bundled novel, one document a paragraph."""
    path = folder / "text.txt"
    path.write_text("\n\n".join(next(iter(documents("learn.txt.xz").values()))[:paragraphs]), encoding="utf-8")
    return path


def small(out: Path, text: Path, **changes: Any) -> Settings:
    """A run of eight steps of four rows with a vocabulary of 300."""
    sizes: dict[str, Any] = {
        "steps": 8,
        "batch": 4,
        "micro_batch": 2,
        "length": 16,
        "vocab_size": 300,
        "valid_windows": 8,
        "log_every": 1,
        "save_every": 3,
        "feedforward": FEEDFORWARD,
        "data": text.parent / "data",
        "cpu": True,
    }
    return Settings(out=out, text=(str(text),), **{**sizes, **changes})
