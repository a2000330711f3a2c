"""Docstrings of this project explain parameters in two aligned columns; the site shows them as a list (griffe)."""

from __future__ import annotations

import re
from typing import Any

import griffe

COLUMN = re.compile(r"^(?P<name>[A-Za-z_][\w, ]*?) {2,}(?P<text>\S.*)$")


def as_list(text: str) -> str:
    """Lines such as `depth       decisions from root to leaf`, with what continues them, as items of a list."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        match = COLUMN.match(line)
        if match:
            if lines and lines[-1] and not inside:
                lines.append("")
            lines.append(f"- `{match['name']}`: {match['text']}")
        elif inside and line.startswith("  "):
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line)
        inside = bool(match) or (inside and line.startswith("  "))
    return "\n".join(lines)


class Columns(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_list(obj.docstring.value)
