"""`fastff explore`."""

from __future__ import annotations

from fastff.cli.console import console
from fastff.explore import ExploreSettings


def explore(settings: ExploreSettings) -> int:
    """Write a page that shows which leaves every token of a text takes: one file, without server or network."""
    from fastff.explore.explorer_page import explore as run

    found = run(settings)
    tokens = sum(len(text.pieces) for text in found.texts)
    console.print(f"wrote {settings.out}: {tokens} tokens, {len(found.layers)} layers", markup=False)
    return 0
