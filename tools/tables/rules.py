"""The rules of imports, as CONTRIBUTING.md shows them."""

from __future__ import annotations

import tomllib

from tools.tables.places import ROOT

from fastff.report.markdown import markdown_table


def imports() -> str:
    """The order of the rooms, and where heavy packages may be imported."""
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["fastff"]
    order = " <- ".join(group.replace(" ", ", ") for group in rules["import-order"])
    rows = [
        (f"`{package}`", ", ".join(f"`{p}`" for p in places.split())) for package, places in rules["only-in"].items()
    ]
    return f"`{order}`\n\n{markdown_table(['package', 'imported in'], rows)}"
