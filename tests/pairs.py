"""Parameters of which every pair of values meets in some case: a fault that needs two of them shows, at the cost of few
cases where a full product would take hundreds."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest

FIXTURES = ("isa", "dot_isa", "threads")  # that take their value from the case


def every_pair(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """`pytest.mark.parametrize` over the named axes, each a list of values: every value, and every pair of two."""
    values = {name: list(of_axis) for name, of_axis in axes.items()}
    rows = [
        pytest.param(*(values[name][i] for name, i in zip(values, row, strict=True)), id=_label(values, row))
        for row in pairs([len(of_axis) for of_axis in values.values()])
    ]
    return pytest.mark.parametrize(list(values), rows, indirect=[name for name in values if name in FIXTURES])


def pairs(sizes: list[int]) -> list[tuple[int, ...]]:
    """Rows of indices below `sizes` in which every two indices of every two columns meet."""
    columns = range(len(sizes))
    missing = {
        ((a, i), (b, j)): None
        for a, b in combinations(columns, 2)
        for i, j in product(range(sizes[a]), range(sizes[b]))
    }
    if len(sizes) == 1:
        return [(i,) for i in range(sizes[0])]
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for column in columns:
            if column not in row:
                row[column] = max(range(sizes[column]), key=lambda i, c=column: _gain(missing, row, c, i))
        rows.append(tuple(row[column] for column in columns))
        for pair in combinations(sorted(row.items()), 2):
            missing.pop(pair, None)
    return rows


def _gain(missing: dict[Any, None], row: dict[int, int], column: int, index: int) -> int:
    """Pairs that this index would add to a row."""
    return sum(tuple(sorted((item, (column, index)))) in missing for item in row.items())


def _label(values: dict[str, list[Any]], row: tuple[int, ...]) -> str:
    # A function's str() holds its address, which differs between the workers of a suite.
    chosen = [values[name][i] for name, i in zip(values, row, strict=True)]
    return "-".join(str(getattr(value, "__name__", value)) for value in chosen)
