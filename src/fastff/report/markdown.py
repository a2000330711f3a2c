"""Markdown as text: tables, and the places in a page that hold generated text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table without a final newline. None is an empty cell. Raises ValueError for a row of another length."""
    lines = [_line(head), "|" + "---|" * len(head)]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"a row has {len(row)} cells, the table {len(head)} columns: {row!r}")
        lines.append(_line(row))
    return "\n".join(lines)


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join('' if cell is None else str(cell) for cell in cells)} |"


def replace_marked(text: str, name: str, body: str) -> str:
    """A page with `body` between `<!-- NAME -->` and `<!-- /NAME -->`.

    Raises ValueError unless there is exactly one such place.
    """
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    text, found = pattern.subn(lambda match: f"{match[1]}{body}\n{match[2]}", text)
    if found != 1:
        raise ValueError(f"{found} places are marked {name}, expected 1")
    return text
