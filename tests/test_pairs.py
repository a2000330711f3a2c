"""Cases that cover every pair of values."""

from __future__ import annotations

from itertools import combinations, product

from pairs import pairs


def test_every_pair_is_met_once_or_more_by_few_rows() -> None:
    sizes = [5, 6, 2, 3]
    rows = pairs(sizes)
    assert len(rows) <= 34
    for a, b in combinations(range(4), 2):
        assert {(row[a], row[b]) for row in rows} == set(product(range(sizes[a]), range(sizes[b])))
