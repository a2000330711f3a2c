"""Two linear kernels on grouped rows, which serve forward and backward; nothing in them knows of activations or gates.

gather_matmul   x times the subtree of each group, of which every row keeps the entries on its path
scatter_matmul  entries on the path times the rows of a matrix: the transpose of `gather_matmul`
Rows of a group share their first decisions, so their ancestors' rows are shared too: a group multiplies by its
ancestors and by its subtree, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastff.config import TreeConfig
from fastff.ops.triton_kernels.common import locate, prefix_of, subtree_column
from fastff.ops.triton_kernels.launch import launch, new
from fastff.ops.triton_kernels.plan import Tiles, ceil_div, power_of_two
from fastff.ops.triton_kernels.sort import Groups, group_rows


@dataclass(frozen=True)
class Matrix:
    """Which rows of a weight matrix belong to a path, and where their entries lie in a list of path entries.

    nodes       whether the matrix begins with the 2**depth - 1 nodes (entry = level)
    leaf_first  row of the first leaf; leaf_rows: rows of a leaf; leaf_entry: entry of a leaf's first row
    tree_rows   rows of a tree; entries: length of the list of one row and tree
    """

    nodes: bool
    leaf_first: int
    leaf_rows: int
    leaf_entry: int
    tree_rows: int
    entries: int

    @classmethod
    def of_w_in(cls, config: TreeConfig, *, nodes: bool = True) -> Matrix:
        """nodes=False leaves the nodes out: without node_output and gate no gradient reaches them."""
        return cls(nodes and config.depth > 0, config.nodes, config.leaf_in_rows, config.depth, config.in_rows,
                   config.path_scores)  # fmt: skip

    @classmethod
    def of_w_out(cls, config: TreeConfig) -> Matrix:
        nodes = config.node_output and config.depth > 0
        first = config.depth if nodes else 0
        return cls(nodes, config.nodes if nodes else 0, config.leaf_width, first, config.out_rows, out_entries(config))

    @classmethod
    def of_b_out(cls, config: TreeConfig) -> Matrix:
        """b_out is a matrix of one row a leaf whose coefficient is the leaf's gate."""
        return cls(False, 0, 1, out_entries(config) - 1, config.leaves, out_entries(config))

    def shape(self) -> dict[str, Any]:
        """The compile-time arguments of a kernel."""
        return {
            "HAS_NODES": self.nodes,
            "LEAF_FIRST": self.leaf_first,
            "LEAF_ROWS": self.leaf_rows,
            "LEAF_ENTRY": self.leaf_entry,
            "TREE_ROWS": self.tree_rows,
            "ENTRIES": self.entries,
        }

    def columns(self, sub: int) -> int:
        """Rows of the matrix in a subtree with `sub` decisions left."""
        return int((2**sub - 1 if self.nodes else 0) + 2**sub * self.leaf_rows)


def out_entries(config: TreeConfig) -> int:
    """Coefficients of one row and tree: nodes if they are neurons, leaf neurons, and with b_out the leaf's gate."""
    return config.depth * config.node_output + config.leaf_width + (config.shape_of_b_out is not None)


def precision_of(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float32 as three TF32 products, which keep its precision, unless torch may use one.

    Asked in torch's newer way: the older `get_float32_matmul_precision` fails where somebody has set it in the newer.
    """
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def sort_leaves(leaf: Tensor, *, config: TreeConfig, level: int, joint: int, tiles: Tiles, chunk: int) -> Groups:
    """Group rows by the first `level` decisions in each of `joint` trees, from their leaves."""
    return group_rows(leaf, shift=config.depth - level, level=level, joint=joint, tile=tiles.rows, chunk=chunk)


def gather_matmul(
    x: Tensor,
    w: Tensor,
    leaf: Tensor,
    groups: Groups,
    out: Tensor,
    *,
    config: TreeConfig,
    matrix: Matrix,
    tiles: Tiles,
    bias: Tensor | None = None,
) -> None:
    """Fill out (rows, trees, entries) with the products of x and the rows of `w` that lie on each row's path."""
    columns, chunks = columns_of(matrix, config, groups, tiles)
    launch(
        _gather_matmul_kernel, (groups.tiles, ceil_div(config.trees, groups.joint), chunks),
        x, w, bias, leaf, out, *tables(groups), x.shape[0],
        D=x.shape[1], TREES=config.trees, DEPTH=config.depth, LEVEL=groups.level, JOINT=groups.joint,
        GROUPS=groups.groups, COLUMNS=columns, ANCESTORS=ancestors_of(matrix, groups), BM=tiles.rows, BK=tiles.inner,
        PRECISION=precision_of(x.dtype), **matrix.shape(), num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def scatter_matmul(
    entries: Tensor,
    w: Tensor,
    leaf: Tensor,
    groups: Groups,
    *,
    config: TreeConfig,
    matrix: Matrix,
    tiles: Tiles,
    into: Tensor | None = None,
) -> Tensor:
    """Sum of entries (rows, trees, entries) times the rows of `w` on each row's path: (rows, features of w).

    into: add to this tensor instead of returning a new one. Passes run one after another, each adding to the last.
    """
    columns, chunks = columns_of(matrix, config, groups, tiles)
    y = new(entries, entries.shape[0], w.shape[-1]) if into is None else into
    for pass_number in range(ceil_div(config.trees, groups.joint)):
        launch(
            _scatter_matmul_kernel, (groups.tiles,),
            entries, w, leaf, y, *tables(groups), entries.shape[0], pass_number,
            D=w.shape[-1], TREES=config.trees, DEPTH=config.depth, LEVEL=groups.level, JOINT=groups.joint,
            GROUPS=groups.groups, COLUMNS=columns, CHUNKS=chunks, ANCESTORS=ancestors_of(matrix, groups),
            ACCUMULATE=pass_number > 0 or into is not None, BM=tiles.rows, BN=tiles.outer,
            PRECISION=precision_of(w.dtype), **matrix.shape(), num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return y


def tables(groups: Groups | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if groups is None else (groups.order, groups.table)


def columns_of(matrix: Matrix, config: TreeConfig, groups: Groups, tiles: Tiles) -> tuple[int, int]:
    """Columns of one tree that a dot takes at once, a power of two (16 or more over all joint trees), and how often."""
    needed = matrix.columns(config.depth - groups.level)
    columns = max(16 // groups.joint, min(power_of_two(needed), max(1, tiles.columns // groups.joint)), 1)
    return columns, ceil_div(needed, columns)


def ancestors_of(matrix: Matrix, groups: Groups) -> int:
    """Width of the ancestors' dot, 0 when there are none."""
    count = groups.level * groups.joint if matrix.nodes else 0
    return max(16, power_of_two(count)) if count else 0


@triton.jit
def beyond(tile, pass_number, table_ptr, GROUPS: tl.constexpr):
    """Whether a tile lies beyond the last one of its pass: the launch grid is an upper bound."""
    return tile >= tl.load(table_ptr + pass_number * 4 * (GROUPS + 1) + GROUPS + 1 + GROUPS)


@triton.jit
def sorted_rows(
    tile, pass_number,
    order_ptr, table_ptr,
    rows,
    GROUPS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """(group, row numbers (BM,) int64, which exist) of a tile. Rows that do not exist are row 0: safe to load."""
    place = tl.arange(0, BM)
    if GROUPS == 0:
        group = tl.zeros((), tl.int32)
        row = (tile * BM + place).to(tl.int64)
        there = row < rows
    else:
        table = table_ptr + pass_number * 4 * (GROUPS + 1)
        group, begin, end = locate(tile, table, table + GROUPS + 1, GROUPS, BM)
        there = begin + place < end
        row = tl.load(order_ptr + pass_number.to(tl.int64) * rows + begin + place, mask=there, other=0).to(tl.int64)
    return group, tl.where(there, row, 0), there


@triton.jit
def tile_of(base, row, start, D: tl.constexpr, WIDTH: tl.constexpr):
    """Columns start ... start + WIDTH of rows `row`, zero beyond D: (len(row), WIDTH)."""
    d = start + tl.arange(0, WIDTH)
    at = base + row[:, None] * D + d[None, :]
    if D % WIDTH == 0:
        return tl.load(at)
    return tl.load(at, mask=(d < D)[None, :], other=0.0)


@triton.jit
def ancestor_column(
    a, group, pass_number, LEVEL: tl.constexpr, JOINT: tl.constexpr, TREES: tl.constexpr, TREE_ROWS: tl.constexpr
):
    """What ancestor column `a` is: (tree, row of all trees' matrix, path entry, exists)."""
    joint = tl.minimum(a // LEVEL, JOINT - 1)
    level = a % LEVEL
    prefix = prefix_of(group, joint, LEVEL, JOINT).to(tl.int64)
    row = ((1 << level) - 1).to(tl.int64) + (prefix >> (LEVEL - level))
    tree = pass_number * JOINT + joint
    exists = (a < LEVEL * JOINT) & (tree < TREES)
    return tree, tl.where(exists, tree.to(tl.int64) * TREE_ROWS + row, 0), level, exists


@triton.jit
def group_columns(
    chunk, group, pass_number,
    TREES: tl.constexpr, DEPTH: tl.constexpr, LEVEL: tl.constexpr, JOINT: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_NODES: tl.constexpr, LEAF_FIRST: tl.constexpr, LEAF_ROWS: tl.constexpr, LEAF_ENTRY: tl.constexpr,
    TREE_ROWS: tl.constexpr,
):  # fmt: skip
    """Chunk number `chunk` of COLUMNS columns of each of a group's subtrees, side by side: (number among the joint
    trees, tree, row of all trees' matrix, and entry, shift, place and existence as `subtree_column` gives them)."""
    c = tl.arange(0, COLUMNS * JOINT)
    joint = c // COLUMNS
    tree = pass_number * JOINT + joint
    prefix = prefix_of(group, joint, LEVEL, JOINT)
    place_row, entry, shift, place, exists = subtree_column(
        chunk * COLUMNS + c % COLUMNS, prefix, DEPTH, DEPTH - LEVEL, HAS_NODES, LEAF_FIRST, LEAF_ROWS, LEAF_ENTRY
    )
    exists = exists & (tree < TREES)
    w_row = tl.where(exists, tree.to(tl.int64) * TREE_ROWS + place_row, 0)
    return joint, tree, w_row, entry, shift, place, exists


@triton.jit
def path_mask(
    leaf_ptr, row, joint, pass_number, there, shift, place, TREES: tl.constexpr, SUB: tl.constexpr, JOINT: tl.constexpr
):
    """(len(row), len(joint)): whether each column, of tree number `joint` in this pass, lies on each row's path."""
    if SUB == 0:  # all columns of a lone leaf do
        return there[:, None] & (pass_number * JOINT + joint < TREES)[None, :]
    inside = tl.load(leaf_ptr + row * TREES + pass_number * JOINT, mask=there, other=0).to(tl.int32)[:, None]
    # One load a tree and a select: a gather by column would load every leaf once for each of its columns.
    for other in tl.static_range(1, JOINT):
        wanted = there & (pass_number * JOINT + other < TREES)
        leaf = tl.load(leaf_ptr + row * TREES + pass_number * JOINT + other, mask=wanted, other=0).to(tl.int32)
        inside = tl.where((joint == other)[None, :], leaf[:, None], inside)
    on_path = ((inside & ((1 << SUB) - 1)) >> shift[None, :]) == place[None, :]
    return on_path & there[:, None] & (pass_number * JOINT + joint < TREES)[None, :]


@triton.jit
def _gather_matmul_kernel(
    x_ptr, w_ptr, b_ptr, leaf_ptr, out_ptr, order_ptr, table_ptr,
    rows,
    D: tl.constexpr, TREES: tl.constexpr, DEPTH: tl.constexpr, LEVEL: tl.constexpr, JOINT: tl.constexpr,
    GROUPS: tl.constexpr, COLUMNS: tl.constexpr, ANCESTORS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, HAS_NODES: tl.constexpr, LEAF_FIRST: tl.constexpr, LEAF_ROWS: tl.constexpr,
    LEAF_ENTRY: tl.constexpr, TREE_ROWS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    tile, pass_number = tl.program_id(0), tl.program_id(1)
    if beyond(tile, pass_number, table_ptr, GROUPS):
        return
    group, row, there = sorted_rows(tile, pass_number, order_ptr, table_ptr, rows, GROUPS, BM)

    joint, tree, w_row, entry, shift, place, exists = group_columns(
        tl.program_id(2), group, pass_number, TREES, DEPTH, LEVEL, JOINT, COLUMNS,
        HAS_NODES, LEAF_FIRST, LEAF_ROWS, LEAF_ENTRY, TREE_ROWS,
    )  # fmt: skip
    acc = tl.zeros((BM, COLUMNS * JOINT), tl.float32)
    if ANCESTORS > 0:
        a = tl.arange(0, ANCESTORS)
        a_tree, a_row, a_entry, a_exists = ancestor_column(a, group, pass_number, LEVEL, JOINT, TREES, TREE_ROWS)
        a_acc = tl.zeros((BM, ANCESTORS), tl.float32)
    for start in range(0, D, BK):
        x = tile_of(x_ptr, row, start, D, BK)
        w = tile_of(w_ptr, w_row, start, D, BK)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
        if ANCESTORS > 0:
            w = tile_of(w_ptr, a_row, start, D, BK)
            a_acc = tl.dot(x, tl.trans(w), a_acc, input_precision=PRECISION)
    if b_ptr is not None:
        acc += tl.load(b_ptr + w_row).to(tl.float32)[None, :]

    on_path = (
        path_mask(leaf_ptr, row, joint, pass_number, there, shift, place, TREES, DEPTH - LEVEL, JOINT) & exists[None, :]
    )
    at = out_ptr + (row[:, None] * TREES + tree[None, :]) * ENTRIES + entry[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=on_path)
    if ANCESTORS > 0:
        at = out_ptr + (row[:, None] * TREES + a_tree[None, :]) * ENTRIES + a_entry[None, :]
        tl.store(at, a_acc.to(out_ptr.dtype.element_ty), mask=there[:, None] & a_exists[None, :])


@triton.jit
def _path_entries(
    entries_ptr, leaf_ptr,
    row, there, group, pass_number, chunk,
    TREES: tl.constexpr, DEPTH: tl.constexpr, LEVEL: tl.constexpr, JOINT: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_NODES: tl.constexpr, LEAF_FIRST: tl.constexpr, LEAF_ROWS: tl.constexpr, LEAF_ENTRY: tl.constexpr,
    TREE_ROWS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """A chunk of subtree columns: entries (len(row), columns), zero off each row's path, and the matrix row of each."""
    joint, tree, w_row, entry, shift, place, exists = group_columns(
        chunk, group, pass_number, TREES, DEPTH, LEVEL, JOINT, COLUMNS,
        HAS_NODES, LEAF_FIRST, LEAF_ROWS, LEAF_ENTRY, TREE_ROWS,
    )  # fmt: skip
    on_path = (
        path_mask(leaf_ptr, row, joint, pass_number, there, shift, place, TREES, DEPTH - LEVEL, JOINT) & exists[None, :]
    )
    at = entries_ptr + (row[:, None] * TREES + tree[None, :]) * ENTRIES + entry[None, :]
    return tl.load(at, mask=on_path, other=0.0), w_row


@triton.jit(do_not_specialize=["pass_number"])
def _scatter_matmul_kernel(
    entries_ptr, w_ptr, leaf_ptr, y_ptr, order_ptr, table_ptr,
    rows, pass_number,
    D: tl.constexpr, TREES: tl.constexpr, DEPTH: tl.constexpr, LEVEL: tl.constexpr, JOINT: tl.constexpr,
    GROUPS: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr, ANCESTORS: tl.constexpr,
    ACCUMULATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, HAS_NODES: tl.constexpr,
    LEAF_FIRST: tl.constexpr, LEAF_ROWS: tl.constexpr, LEAF_ENTRY: tl.constexpr, TREE_ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    pass_number = tl.zeros((), tl.int32) + pass_number
    if beyond(tile, pass_number, table_ptr, GROUPS):
        return
    group, row, there = sorted_rows(tile, pass_number, order_ptr, table_ptr, rows, GROUPS, BM)

    # What does not depend on the output columns is loaded once: ancestors' entries, and a lone chunk of the subtree.
    if ANCESTORS > 0:
        a = tl.arange(0, ANCESTORS)
        a_tree, a_row, a_entry, a_exists = ancestor_column(a, group, pass_number, LEVEL, JOINT, TREES, TREE_ROWS)
        a_at = entries_ptr + (row[:, None] * TREES + a_tree[None, :]) * ENTRIES + a_entry[None, :]
        above = tl.load(a_at, mask=there[:, None] & a_exists[None, :], other=0.0)
    if CHUNKS == 1:
        below, w_row = _path_entries(
            entries_ptr, leaf_ptr, row, there, group, pass_number, 0, TREES, DEPTH, LEVEL, JOINT, COLUMNS,
            HAS_NODES, LEAF_FIRST, LEAF_ROWS, LEAF_ENTRY, TREE_ROWS, ENTRIES,
        )  # fmt: skip

    for start in range(0, D, BN):
        d = start + tl.arange(0, BN)
        at = y_ptr + row[:, None] * D + d[None, :]
        mask = there[:, None] & (d < D)[None, :]
        acc = tl.load(at, mask=mask, other=0.0).to(tl.float32) if ACCUMULATE else tl.zeros((BM, BN), tl.float32)
        if ANCESTORS > 0:
            acc = tl.dot(above, tile_of(w_ptr, a_row, start, D, BN), acc, input_precision=PRECISION)
        if CHUNKS == 1:
            acc = tl.dot(below, tile_of(w_ptr, w_row, start, D, BN), acc, input_precision=PRECISION)
        else:
            for chunk in range(CHUNKS):
                part, part_row = _path_entries(
                    entries_ptr, leaf_ptr, row, there, group, pass_number, chunk, TREES, DEPTH, LEVEL, JOINT, COLUMNS,
                    HAS_NODES, LEAF_FIRST, LEAF_ROWS, LEAF_ENTRY, TREE_ROWS, ENTRIES,
                )  # fmt: skip
                acc = tl.dot(part, tile_of(w_ptr, part_row, start, D, BN), acc, input_precision=PRECISION)
        tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=mask)
