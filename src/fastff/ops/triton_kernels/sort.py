"""Counting sort of rows by the decisions they took: stable, deterministic, three launches, no host synchronisation.

Several sorts run side by side: pass `p` groups the rows by the first `level` decisions in each of the trees
`p * joint ... p * joint + joint - 1`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastff.ops.triton_kernels.launch import launch, new
from fastff.ops.triton_kernels.plan import ceil_div, power_of_two

SORT_TILE = 64  # ranks within a tile compare all pairs: small tiles, more of them
SCANNED = 8  # most groups whose counts a program sums over the tiles: a sector of memory
FEW = 2048  # elements that one program looks through; for 4,096 three launches took 5 us less, backwards 34 (H200)
LOOKED_AT = 2**20  # by all programs together, where each looks through all elements


@dataclass(frozen=True)
class Groups:
    """Rows in group order.

    order (passes, rows) int32 row numbers; table (passes, 4, groups + 1) int32, exclusive sums over the groups of their
    rows, tiles (of `tile` rows), chunks (of `chunk` rows), and chunks of those groups that have more than one.
    groups is a power of two, at least 2; level, joint: decisions and trees that make a group's number.
    few: 0, or how many elements (a power of two, or beyond it) each program looks through for those of its own group,
    by `look_up`: they are not sorted before. order is then to be filled, and table the group of every element.
    """

    order: Tensor
    table: Tensor
    groups: int
    level: int
    joint: int
    tile: int
    chunk: int
    few: int = 0

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


def group_rows(leaf: Tensor, *, shift: int, level: int, joint: int, tile: int, chunk: int) -> Groups:
    """Group the rows of leaf (rows, trees) int64 by `leaf >> shift`, of which `level` bits count."""
    rows, trees = leaf.shape
    key = {"TREES": trees, "SHIFT": shift, "LEVEL": level, "JOINT": joint, "APART": False}
    return _grouped(leaf, rows, ceil_div(trees, joint), tile, chunk, key)


def group_pairs(leaf: Tensor, *, level: int, tile: int, blocks: int) -> Groups:
    """Group the elements of leaf (rows, slots) int64, of which `level` bits count, by their value. The passes are
    `blocks` of consecutive rows; order holds numbers of elements."""
    items, apart = leaf.numel(), ceil_div(leaf.shape[0], blocks) * leaf.shape[1]
    groups = max(2, 1 << level)
    if blocks > 1 or items > FEW or groups * power_of_two(items) > LOOKED_AT:
        key = {"TREES": 1, "SHIFT": 0, "LEVEL": level, "JOINT": 1, "APART": True}
        return _grouped(leaf, apart, blocks, tile, tile, key)
    return Groups(new(leaf, 1, items, dtype=torch.int32), leaf, groups, level, 1, tile, tile, power_of_two(items))


def _grouped(leaf: Tensor, rows: int, passes: int, tile: int, chunk: int, key: dict[str, Any]) -> Groups:
    """In three launches: counts of small tiles, their sums, places. rows: of a pass."""
    level, joint = key["LEVEL"], key["JOINT"]
    groups, tiles = max(2, 1 << (level * joint)), ceil_div(rows, SORT_TILE)
    counts = new(leaf, passes, tiles, groups, dtype=torch.int32)
    totals = new(leaf, passes, groups, dtype=torch.int32)
    order = new(leaf, passes, rows, dtype=torch.int32)
    table = new(leaf, passes, 4, groups + 1, dtype=torch.int32)
    key = {**key, "GROUPS": groups, "TILE": SORT_TILE}
    last = leaf.numel() // key["TREES"]
    launch(_count_kernel, (tiles, passes), leaf, counts, rows, last, tiles, **key)
    width = max(1, min(SCANNED, groups // 32))
    scan = {"WIDTH": width, "TILES": min(1024, power_of_two(tiles))}
    launch(_scan_kernel, (groups // width, passes), counts, totals, tiles, GROUPS=groups, **scan, num_warps=8)
    launch(_place_kernel, (tiles, passes), leaf, counts, totals, order, table, rows, last, tiles, tile, chunk, **key)
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
def _rows_of(tile, pass_number, rows, last, JOINT: tl.constexpr, TILE: tl.constexpr, APART: tl.constexpr):
    """Rows of a tile, which exist, and the first tree of their key. APART: passes are blocks of `rows` rows, of
    `last` in all; else trees."""
    row = tile * TILE + tl.arange(0, TILE)
    there = row < rows
    if APART:
        row += pass_number * rows
        return row, there & (row < last), 0
    return row, there, pass_number * JOINT


@triton.jit
def _count_kernel(
    leaf_ptr, counts_ptr,
    rows, last, tiles,
    TREES: tl.constexpr, SHIFT: tl.constexpr, LEVEL: tl.constexpr, JOINT: tl.constexpr, APART: tl.constexpr,
    GROUPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile, pass_number = tl.program_id(0), tl.program_id(1)
    row, mask, tree0 = _rows_of(tile, pass_number, rows, last, JOINT, TILE, APART)
    key = _key(leaf_ptr, row, mask, tree0, TREES, SHIFT, LEVEL, JOINT)
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
    rows, last, tiles, tile_rows, chunk_rows,
    TREES: tl.constexpr, SHIFT: tl.constexpr, LEVEL: tl.constexpr, JOINT: tl.constexpr, APART: tl.constexpr,
    GROUPS: tl.constexpr, TILE: tl.constexpr,
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
    row, mask, tree0 = _rows_of(tile, pass_number, rows, last, JOINT, TILE, APART)
    key = tl.where(mask, _key(leaf_ptr, row, mask, tree0, TREES, SHIFT, LEVEL, JOINT), -1)
    # The rank of a row among the equal keys before it in the tile: all pairs, which costs the same for any GROUPS.
    other, there, _ = _rows_of(tile, pass_number, rows, last, JOINT, TILE, APART)
    other_key = _key(leaf_ptr, other, there, tree0, TREES, SHIFT, LEVEL, JOINT)
    before = (other_key[None, :] == key[:, None]) & (tl.arange(0, TILE)[None, :] < place[:, None])
    rank = tl.sum(before.to(tl.int32), 1)
    first = tl.gather(tl.cumsum(total, 0) - total, tl.where(mask, key, 0), 0)
    offset = tl.load(counts_ptr + (pass_number * tiles + tile) * GROUPS + tl.where(mask, key, 0), mask=mask, other=0)
    tl.store(order_ptr + pass_number.to(tl.int64) * rows + first + offset + rank, row, mask=mask)


@triton.jit
def keys_of(leaf_ptr, items, ITEMS: tl.constexpr):
    """The group of every element, beyond the last element one that no group has."""
    item = tl.arange(0, ITEMS)
    return tl.load(leaf_ptr + item, mask=item < items, other=1 << 30).to(tl.int32)


@triton.jit
def look_up(key, order_ptr, group):
    """Fill in the places of a group in the order, and return the first and the one after the last. Every program of the
    group writes the same there."""
    mine = (key == group).to(tl.int32)
    begin = tl.sum((key < group).to(tl.int32), 0)
    tl.store(order_ptr + begin + tl.cumsum(mine, 0) - 1, tl.arange(0, key.shape[0]), mask=mine > 0)
    tl.debug_barrier()  # other threads of this program read them
    return begin, begin + tl.sum(mine, 0)


@triton.jit
def group_of(tile, key, GROUPS: tl.constexpr, TILE: tl.constexpr):
    """Group of a tile, GROUPS beyond the last tile, and its number among the tiles of the group."""
    tiles = (tl.histogram(key, GROUPS, mask=key < GROUPS) + TILE - 1) // TILE
    group = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    return group, tile - tl.sum(tl.where(tl.arange(0, GROUPS) < group, tiles, 0), 0)
