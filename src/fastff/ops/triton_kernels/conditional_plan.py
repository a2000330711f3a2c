"""Tiles of the conditional products, by rows, leaves and widths."""

from __future__ import annotations

from dataclasses import dataclass

from fastff.ops.triton_kernels.plan import Tiles, ceil_div, power_of_two

MOST_COLUMNS = 64  # neurons of a leaf that one program takes: their products stay in registers
PROGRAMS = 528  # enough for a weight gradient to fill a GPU: four for each of 132 multiprocessors
BLOCK = 2**14  # rows whose x stays in a second-level cache while all their leaves read it
FEW = 2**15  # pairs of which a GPU's programs hold all at once: steps along features are long then, to wait less often


@dataclass(frozen=True)
class Plan:
    """tiles: of the kernels that take pairs from rows to rows; outer: of the weight gradients, whose `inner` is pairs;
    chunk: most pairs of a leaf that one program of those sums; blocks: of rows, taken one after another."""

    tiles: Tiles
    outer: Tiles
    chunk: int
    blocks: int = 1


def plan(rows: int, slots: int, leaves: int, width: int, features: int, *, backward: bool = False) -> Plan:
    """Tiles as high as a leaf has pairs, if all leaves are used alike.

    Measured on an H200 with 96 leaves of 32 and 64 of 48: at 65,536 rows tiles of 128 rows, 8 warps, or more blocks
    are level or slower by 3 to 15 %; at 512 rows tiles of 32 rows are slower by 10 to 18 %."""
    pairs, columns = rows * slots, max(16, min(MOST_COLUMNS, power_of_two(width)))
    height = max(16, min(64, power_of_two(ceil_div(pairs, leaves))))
    inner = 64 if height == 64 and pairs > FEW else 128
    outer, stages = _outputs(height, inner, columns, backward)
    across = ceil_div(features, 128) * ceil_div(3 * width, MOST_COLUMNS)
    # Leaves of half as many pairs again as the mean are summed by one program: no sums of parts for most of them.
    chunk = max(256, min(ceil_div(3 * pairs, 2 * leaves), ceil_div(pairs * across, PROGRAMS)))
    return Plan(
        Tiles(rows=height, columns=columns, inner=inner, outer=outer, warps=4, stages=stages),
        Tiles(rows=0, columns=MOST_COLUMNS, inner=min(64, 2 * height), outer=128, warps=4, stages=3),
        chunk=ceil_div(chunk, 64) * 64,
        blocks=max(1, rows // BLOCK),
    )


def _outputs(height: int, inner: int, columns: int, backward: bool) -> tuple[int, int]:
    """Features of outputs at a time, and steps in flight. Many pairs: a program's sums take the registers that more
    programs could have. With 64 features instead of 128 leaves of 48 took 6 % less, leaves of 32 took 2 % more;
    backwards, with a fourth step too, leaves of 32 and 48 took 3 and 2 % less, of 24 and 12 the same. Few pairs wait
    for memory, and ask for more at once: 0 to 3 % less, backwards nothing."""
    if inner == 64:
        return (64, 4) if backward else (64 if columns > 32 else 128, 3)
    return (256, 4) if height < 64 and not backward else (128, 3)
