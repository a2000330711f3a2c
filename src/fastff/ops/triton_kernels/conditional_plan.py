"""Tiles of the conditional products, by rows, leaves and widths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastff.ops.triton_kernels.plan import Tiles, ceil_div, power_of_two

MOST_COLUMNS = 64  # neurons of a leaf that one program takes: their products stay in registers
PROGRAMS = 528  # enough for a weight gradient to fill a GPU: four for each of 132 multiprocessors

Form = Literal["slots", "scan", "pairs"]


@dataclass(frozen=True)
class Plan:
    """tiles: of the kernels that take rows to neurons; scatter: of the one that takes neurons to features (its rows are
    those of `tiles`); outer: of the weight gradients, whose `inner` is rows; splits: parts into which the rows of a
    leaf are cut there. In the form "pairs" `tiles` serves the whole forward and the gradient of x; "scan" is that form
    where leaves look for their pairs."""

    tiles: Tiles
    scatter: Tiles
    outer: Tiles
    splits: int = 1
    form: Form = "slots"

    @property
    def scan(self) -> bool:
        """Whether every leaf's program looks for its own pairs."""
        return self.form == "scan"


def plan(rows: int, slots: int, leaves: int, width: int, features: int, form: Form = "slots") -> Plan:
    """Tiles as high as a leaf has rows in one slot, if all leaves are used alike."""
    columns = max(16, min(MOST_COLUMNS, power_of_two(width)))
    if form != "slots":
        return _plan_of_pairs(rows * slots, leaves, columns, features, form)
    height = max(16, min(64, power_of_two(ceil_div(rows, leaves))))
    across = ceil_div(features, 128)
    return Plan(
        Tiles(rows=height, columns=columns, inner=64, outer=0, warps=4, stages=4),
        Tiles(rows=height, columns=MOST_COLUMNS, inner=0, outer=128, warps=4, stages=1),
        Tiles(rows=0, columns=MOST_COLUMNS, inner=64, outer=128, warps=4, stages=3),
        splits=max(1, min(16, PROGRAMS // (leaves * across), ceil_div(rows, leaves * 128))),
    )


def _plan_of_pairs(pairs: int, leaves: int, columns: int, features: int, form: Form) -> Plan:
    height = max(16, min(64, power_of_two(ceil_div(3 * pairs, 2 * leaves))))  # most leaves in one tile
    across = ceil_div(features, 128)
    tiles = Tiles(rows=height, columns=columns, inner=64 if height == 64 else 128, outer=128, warps=4, stages=3)
    outer = Tiles(rows=0, columns=MOST_COLUMNS, inner=min(64, height), outer=128, warps=4, stages=3)
    splits = max(1, min(16, PROGRAMS // (leaves * across), ceil_div(pairs, leaves * 128)))
    return Plan(tiles, tiles, outer, splits=splits, form=form)
