"""What a user may ask of `fastff explore`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from cyclopts import Parameter


@Parameter(name="*")
@dataclass(frozen=True)
class ExploreSettings:
    """One page. Raises ValueError for values that cannot be."""

    model: str
    """Directory or hub name of a model with conditional layers."""
    _: KW_ONLY
    text: tuple[str, ...]
    """A text, or the file that holds one. May be repeated: the page lets its reader choose."""
    out: Path = Path("explorer.html")
    """Page to write."""
    max_tokens: int = 10_000
    """Tokens of all texts together; what comes after is left out, which the page says."""

    def __post_init__(self) -> None:
        if not self.text:
            raise ValueError("no text: give one, or a file, with --text")
        if self.max_tokens < 1:
            raise ValueError(f"--max-tokens {self.max_tokens} is not above 0")
