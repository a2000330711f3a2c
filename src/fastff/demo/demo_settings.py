"""What the user of `fastff demo` chooses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cyclopts import Parameter


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Raises ValueError for a number that cannot be."""

    out: Path = Path("demo-report")
    """Directory of the page."""
    models: Path = Path("models")
    """Directory of the models that ship; parts whose model is missing are left out, which the page says."""
    sentences: int = 1500
    """Sentences of the novels to search."""
    tokens: int = 96
    """Tokens that each model generates."""
    seconds: float = 4.0
    """Seconds to time each comparison."""

    def __post_init__(self) -> None:
        for name in ("sentences", "tokens", "seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} {getattr(self, name)} is not above 0")
