"""The demo from its start to its page and its table."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastff.demo.demo_settings import DemoSettings
from fastff.demo.shipped_models import shipped
from fastff.demo.showcase import Showcase, run
from fastff.io import write_text
from fastff.report import pages

PAGE = "index.html"


def run_demo(settings: DemoSettings, console: Console) -> int:
    """Measure, write the page into `settings.out` and print the table. Raises what the parts raise."""
    with tempfile.TemporaryDirectory() as work:
        found = run(settings, shipped(settings.models), Path(work), lambda line: console.print(f"{line} ..."))
    write_text(settings.out / PAGE, page(found))
    table = Table()
    for name in ("", "here", "weak point"):
        table.add_column(name)
    for row in found.rows:
        table.add_row(*row)
    console.print(table)
    for line in found.missing:
        console.print(f"left out: {line}", style="yellow", markup=False)
    console.print(f"wrote {settings.out / PAGE} in {found.seconds:.0f} s", markup=False)
    return 0


def page(found: Showcase) -> str:
    """The page's text."""
    rows: list[list[Any]] = []
    if found.layer is not None:
        rows = [
            [n, f"{tree:,.1f}", f"{dense:,.1f}", f"{dense / tree:,.1f}"] for n, tree, dense in found.layer["timings"]
        ]
    return pages.render("demo.html", found={**asdict(found), "layer_rows": rows})
