"""`fastff convert`."""

from __future__ import annotations

from fastff.cli.console import console
from fastff.convert import ConversionSettings
from fastff.report.progress import shown


def convert(settings: ConversionSettings) -> int:
    """Make a trained dense model conditional, and report what was lost and gained."""
    from fastff.convert import convert as run
    from fastff.convert.conversion_report import summary

    with shown(console, "convert") as progress:
        record = run(settings, progress=progress, say=lambda line: console.print(line, markup=False))
    console.print(summary(record), markup=False)
    console.print(f"wrote {settings.out} and {settings.out / 'report' / 'index.html'}", markup=False)
    return 0
