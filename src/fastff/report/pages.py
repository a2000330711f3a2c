"""Pages from the Jinja2 templates beside this file: one file each, which loads nothing and reads on a phone and in the
dark. What a template is given is escaped, but for drawings, which it marks as safe."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("fastff.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(template: str, **values: Any) -> str:
    """The page that a template makes of these values. Raises jinja2.UndefinedError for a value that it misses."""
    return _templates().get_template(template).render(values)
