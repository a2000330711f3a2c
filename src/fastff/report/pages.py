"""Pages from the Jinja2 templates beside this file: one file each, which loads nothing and reads on a phone and in the
dark. What a template is given is escaped, but for drawings, which it marks as safe."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader, StrictUndefined


@cache
def _templates(folder: Path | None) -> Environment:
    own = PackageLoader("fastff.report")
    return Environment(
        loader=own if folder is None else ChoiceLoader([FileSystemLoader(folder), own]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(template: str, *, templates: Path | None = None, **values: Any) -> str:
    """The page that a template makes of these values; templates: a folder with more of them, which may extend these.

    Raises jinja2.UndefinedError for a value that it misses."""
    return _templates(templates).get_template(template).render(values)
