"""Counting sort of rows by the decisions they took: stable, deterministic, three launches, no host synchronisation.

Several sorts run side by side: pass `p` groups the rows by the first `level` decisions in each of the trees
`p * joint ... p * joint + joint - 1`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastff.ops.triton_kernels.launch import launch, new
from fastff.ops.triton_kernels.plan import ceil_div, power_of_two

SORT_TILE = 64  # ranks within a tile compare all pairs: small tiles, more of them
SCANNED = 8  # most groups whose counts a program sums over the tiles: a sector of memory


@dataclass(frozen=True)
class Groups:
    """Rows in group order.

    order (passes, rows) int32 row numbers; table (passes, 4, groups + 1) int32, exclusive sums over the groups of their
    rows, tiles (of `tile` rows), chunks (of `chunk` rows), and chunks of those groups that have more than one.
    groups is a power of two, at least 2; level, joint: decisions and trees that make a group's number.
    """

    order: Tensor
    table: Tensor
    groups: int
    level: int
    joint: int
    tile: int
    chunk: int

    @property
    def tiles(self) -> int:
        """Upper bound of tiles in a pass: a static launch grid."""
        return self._blocks(self.tile) + self._used

    @property
    def chunks(self) -> int:
        """Upper bound of chunks in a pass."""
        return self._blocks(self.chunk) + self._used

    @property
    def slots(self) -> int:
        """Upper bound of chunks in a pass that belong to a group with more than one."""
        return 2 * self._blocks(self.chunk)

    def _blocks(self, size: int) -> int:
        return ceil_div(self.order.shape[1], size)

    @property
    def _used(self) -> int:
        return min(1 << (self.level * self.joint), self.order.shape[1])


def group_rows(
    leaf: Tensor, *, shift: int, level: int, joint: int, tile: int, chunk: int, apart: bool = False
) -> Groups:
    """Group the rows of leaf (rows, trees) int64 by `leaf >> shift`, of which `level` bits count. apart: its elements,
    each as a row of one tree."""
    rows, trees = (leaf.numel(), 1) if apart else leaf.shape
    passes, tiles = ceil_div(trees, joint), ceil_div(rows, SORT_TILE)
    groups = max(2, 1 << (level * joint))
    counts = new(leaf, passes, tiles, groups, dtype=torch.int32)
    totals = new(leaf, passes, groups, dtype=torch.int32)
    order = new(leaf, passes, rows, dtype=torch.int32)
    table = new(leaf, passes, 4, groups + 1, dtype=torch.int32)
    key = {"TREES": trees, "SHIFT": shift, "LEVEL": level, "JOINT": joint, "GROUPS": groups, "TILE": SORT_TILE}
    launch(_count_kernel, (tiles, passes), leaf, counts, rows, tiles, **key)
    width = max(1, min(SCANNED, groups // 32))
    scan = {"WIDTH": width, "TILES": min(1024, power_of_two(tiles))}
    launch(_scan_kernel, (groups // width, passes), counts, totals, tiles, GROUPS=groups, **scan, num_warps=8)
    launch(_place_kernel, (tiles, passes), leaf, counts, totals, order, table, rows, tiles, tile, chunk, **key)
    return Groups(order, table, groups, level, joint, tile, chunk)


@triton.jit
def _key(
    leaf_ptr, row, mask, tree0, TREES: tl.constexpr, SHIFT: tl.constexpr, LEVEL: tl.constexpr, JOINT: tl.constexpr
):
    key = tl.zeros_like(row)
    for tree in tl.static_range(JOINT):
        there = mask & (tree0 + tree < TREES)
        leaf = tl.load(leaf_ptr + row.to(tl.int64) * TREES + tree0 + tree, mask=there, other=0) >> SHIFT
        key = (key << LEVEL) | leaf.to(tl.int32)
    return key


@triton.jit
def _count_kernel(
    leaf_ptr, counts_ptr,
    rows, tiles,
    TREES: tl.constexpr, SHIFT: tl.constexpr, LEVEL: tl.constexpr, JOINT: tl.constexpr, GROUPS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    tile, pass_number = tl.program_id(0), tl.program_id(1)
    row = tile * TILE + tl.arange(0, TILE)
    mask = row < rows
    key = _key(leaf_ptr, row, mask, pass_number * JOINT, TREES, SHIFT, LEVEL, JOINT)
    groups = tl.arange(0, GROUPS)
    count = tl.histogram(key, GROUPS, mask=mask)
    tl.store(counts_ptr + (pass_number * tiles + tile) * GROUPS + groups, count)


@triton.jit
def _scan_kernel(counts_ptr, totals_ptr, tiles, GROUPS: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr):
    pass_number = tl.program_id(1)
    group = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.int32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        at = counts_ptr + (pass_number * tiles + tile)[:, None] * GROUPS + group[None, :]
        mask = (tile < tiles)[:, None]
        count = tl.load(at, mask=mask, other=0)
        tl.store(at, total[None, :] + tl.cumsum(count, 0) - count, mask=mask)
        total += tl.sum(count, 0)
    tl.store(totals_ptr + pass_number * GROUPS + group, total)


@triton.jit
def _store_sums(table_ptr, which, count, GROUPS: tl.constexpr):
    groups = tl.arange(0, GROUPS)
    tl.store(table_ptr + which * (GROUPS + 1) + groups, tl.cumsum(count, 0) - count)
    tl.store(table_ptr + which * (GROUPS + 1) + GROUPS, tl.sum(count, 0))


@triton.jit
def _place_kernel(
    leaf_ptr, counts_ptr, totals_ptr, order_ptr, table_ptr,
    rows, tiles, tile_rows, chunk_rows,
    TREES: tl.constexpr, SHIFT: tl.constexpr, LEVEL: tl.constexpr, JOINT: tl.constexpr, GROUPS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    tile, pass_number = tl.program_id(0), tl.program_id(1)
    groups = tl.arange(0, GROUPS)
    total = tl.load(totals_ptr + pass_number * GROUPS + groups)
    if tile == 0:
        table = table_ptr + pass_number * 4 * (GROUPS + 1)
        chunk = (total + chunk_rows - 1) // chunk_rows
        _store_sums(table, 0, total, GROUPS)
        _store_sums(table, 1, (total + tile_rows - 1) // tile_rows, GROUPS)
        _store_sums(table, 2, chunk, GROUPS)
        _store_sums(table, 3, tl.where(chunk > 1, chunk, 0), GROUPS)

    place = tl.arange(0, TILE)
    row = tile * TILE + place
    mask = row < rows
    key = _key(leaf_ptr, row, mask, pass_number * JOINT, TREES, SHIFT, LEVEL, JOINT)
    key = tl.where(mask, key, -1)
    # The rank of a row among the equal keys before it in the tile: all pairs, which costs the same for any GROUPS.
    other = tile * TILE + tl.arange(0, TILE)
    other_key = _key(leaf_ptr, other, other < rows, pass_number * JOINT, TREES, SHIFT, LEVEL, JOINT)
    before = (other_key[None, :] == key[:, None]) & (tl.arange(0, TILE)[None, :] < place[:, None])
    rank = tl.sum(before.to(tl.int32), 1)
    first = tl.gather(tl.cumsum(total, 0) - total, tl.where(mask, key, 0), 0)
    offset = tl.load(counts_ptr + (pass_number * tiles + tile) * GROUPS + tl.where(mask, key, 0), mask=mask, other=0)
    tl.store(order_ptr + pass_number.to(tl.int64) * rows + first + offset + rank, row, mask=mask)
