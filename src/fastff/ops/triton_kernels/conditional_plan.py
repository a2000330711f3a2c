"""Tiles of the conditional products, by rows, leaves and widths."""

from __future__ import annotations

from dataclasses import dataclass

from fastff.ops.triton_kernels.plan import Tiles, ceil_div, power_of_two

MOST_COLUMNS = 64  # neurons of a leaf that one program takes: their products stay in registers
PROGRAMS = 528  # enough for a weight gradient to fill a GPU: four for each of 132 multiprocessors


@dataclass(frozen=True)
class Plan:
    """tiles: of the kernels that take rows to neurons; spread: of the one that takes neurons to features (its rows are
    those of `tiles`); outer: of the weight gradients, whose `inner` is rows; splits: parts into which the rows of a
    leaf are cut there."""

    tiles: Tiles
    spread: Tiles
    outer: Tiles
    splits: int = 1


def plan(rows: int, leaves: int, width: int, features: int) -> Plan:
    """Tiles as high as a leaf has rows in one slot, if all leaves are used alike."""
    columns = max(16, min(MOST_COLUMNS, power_of_two(width)))
    height = max(16, min(64, power_of_two(ceil_div(rows, leaves))))
    across = ceil_div(features, 128)
    return Plan(
        Tiles(rows=height, columns=columns, inner=64, outer=0, warps=4, stages=4),
        Tiles(rows=height, columns=MOST_COLUMNS, inner=0, outer=128, warps=4, stages=1),
        Tiles(rows=0, columns=MOST_COLUMNS, inner=64, outer=128, warps=4, stages=3),
        splits=max(1, min(16, PROGRAMS // (leaves * across), ceil_div(rows, leaves * 128))),
    )
