"""Many rows: trees cut into blocks of levels, rows sorted between blocks, every product a tensor-core GEMM.

Three linear kernels serve forward and backward; nothing in them knows of activations or gates:
_route_kernel   x times a block of nodes, then the turns inside the block: scores and leaf
pick            x times the subtree of each group, of which every row keeps the entries on its path
spread          entries on the path times the rows of a matrix: the transpose of `pick`
Rows of a group share their first turns, so their ancestors' rows are shared too: a group multiplies by its ancestors
and by its subtree, and nothing else. `_values_kernel` turns scores into coefficients.

Weights must be finite: a row multiplies the neighbours of its path by zero, and zero times infinity is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastff.ops.triton_kernels.common import activate, level_of, locate, prefix_of, subtree_column, tanh
from fastff.ops.triton_kernels.plan import BlockedPlan, Stage, Tiles
from fastff.ops.triton_kernels.sort import Groups, group_rows
from fastff.tree import TreeConfig


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
        """Rows of the matrix in a subtree with `sub` turns left."""
        return int((2**sub - 1 if self.nodes else 0) + 2**sub * self.leaf_rows)


def out_entries(config: TreeConfig) -> int:
    """Coefficients of one row and tree: nodes if they are neurons, leaf neurons, and with b_out the leaf's gate."""
    return config.depth * config.node_output + config.leaf_width + (config.shape_of_b_out is not None)


def precision_of(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float32 as three TF32 products, which keep its precision, unless torch may use one."""
    return "tf32x3" if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32"


def forward(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    config: TreeConfig,
    plan: BlockedPlan,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, leaf, margin, scores of contiguous x (rows, in_features); shapes as in ops.reference."""
    rows, trees = x.shape[0], config.trees
    leaf = torch.empty(rows, trees, dtype=torch.int64, device=x.device)
    scores = x.new_empty(rows, trees, config.path_scores)
    coefficient = scores.new_empty(rows, trees, out_entries(config))
    margins = scores.new_empty(rows, trees)
    groups = None
    for stage in plan.stages:
        if stage.level:
            groups = group_rows(leaf, shift=0, level=stage.level, joint=stage.joint, tile=plan.tiles.rows, chunk=1)
        last = (coefficient, margins) if plan.leaf_routed and stage == plan.stages[-1] else (None, None)
        _route(x, w_in, b_in, leaf, scores, groups, config=config, stage=stage, tiles=plan.tiles,
               coefficient=last[0], margins=last[1])  # fmt: skip
    if not plan.stages:
        leaf.zero_()
    if groups is None or (groups.level, groups.joint) != (plan.level, plan.joint):
        groups = sort_leaves(leaf, config=config, level=plan.level, joint=plan.joint, tiles=plan.tiles, chunk=1)
    if not plan.leaf_routed:
        leaves = Matrix.of_w_in(config, nodes=False)
        pick(x, w_in, leaf, groups, scores, config=config, matrix=leaves, tiles=plan.tiles, bias=b_in)
        _values(scores, coefficient, margins, config=config)

    y = spread(coefficient, w_out, leaf, groups, config=config, matrix=Matrix.of_w_out(config), tiles=plan.tiles)
    if b_out is not None:
        leaf_bias = Matrix.of_b_out(config)
        spread(coefficient, b_out, leaf, groups, config=config, matrix=leaf_bias, tiles=plan.tiles, into=y)
    return y, leaf, margins.view(rows) if trees == 1 else margins.amin(1), scores


def sort_leaves(leaf: Tensor, *, config: TreeConfig, level: int, joint: int, tiles: Tiles, chunk: int) -> Groups:
    """Group rows by the first `level` turns in each of `joint` trees, from their leaves."""
    return group_rows(leaf, shift=config.depth - level, level=level, joint=joint, tile=tiles.rows, chunk=chunk)


def _route(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    leaf: Tensor,
    scores: Tensor,
    groups: Groups | None,
    *,
    config: TreeConfig,
    stage: Stage,
    tiles: Tiles,
    coefficient: Tensor | None = None,
    margins: Tensor | None = None,
) -> None:
    """One stage of routing; with `coefficient` and `margins` the last one, which scores the leaves and fills both."""
    grid = (-(-x.shape[0] // tiles.rows) if groups is None else groups.tiles, -(-config.trees // stage.joint))
    _route_kernel[grid](
        x, w_in, b_in, leaf, scores, coefficient, margins, *_tables(groups), x.shape[0], config.tau,
        D_IN=config.in_features, TREES=config.trees, TREE_ROWS=config.in_rows, ENTRIES=config.path_scores,
        OUT_ENTRIES=out_entries(config), OUT_WIDTH=triton.next_power_of_2(out_entries(config)),
        STEPS=triton.next_power_of_2(stage.levels), DEPTH=config.depth, LEVEL=stage.level, LEVELS=stage.levels,
        JOINT=stage.joint, SPAN=max(2**stage.levels, -(-16 // stage.joint)),
        GROUPS=0 if groups is None else groups.groups, LAST=coefficient is not None, NODE_OUTPUT=config.node_output,
        HAS_B_OUT=config.shape_of_b_out is not None, ACTIVATION=config.activation, GATED=config.gate is not None,
        BM=tiles.rows, BK=tiles.inner, PRECISION=precision_of(x.dtype), num_warps=tiles.warps,
        num_stages=tiles.stages,
    )  # fmt: skip


def pick(
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
    columns, chunks = _columns(matrix, config, groups, tiles)
    _pick_kernel[(groups.tiles, triton.cdiv(config.trees, groups.joint), chunks)](
        x, w, bias, leaf, out, *_tables(groups), x.shape[0],
        D=x.shape[1], TREES=config.trees, DEPTH=config.depth, LEVEL=groups.level, JOINT=groups.joint,
        GROUPS=groups.groups, COLUMNS=columns, ANCESTORS=_ancestors(matrix, groups), BM=tiles.rows, BK=tiles.inner,
        PRECISION=precision_of(x.dtype), **matrix.shape(), num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def spread(
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
    columns, chunks = _columns(matrix, config, groups, tiles)
    y = entries.new_empty(entries.shape[0], w.shape[-1]) if into is None else into
    for turn in range(triton.cdiv(config.trees, groups.joint)):
        _spread_kernel[(groups.tiles,)](
            entries, w, leaf, y, *_tables(groups), entries.shape[0], turn,
            D=w.shape[-1], TREES=config.trees, DEPTH=config.depth, LEVEL=groups.level, JOINT=groups.joint,
            GROUPS=groups.groups, COLUMNS=columns, CHUNKS=chunks, ANCESTORS=_ancestors(matrix, groups),
            ACCUMULATE=turn > 0 or into is not None, BM=tiles.rows, BN=tiles.outer, PRECISION=precision_of(w.dtype),
            **matrix.shape(), num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return y


def _values(scores: Tensor, coefficient: Tensor, margins: Tensor, *, config: TreeConfig) -> None:
    """Fill coefficient (rows, trees, out_entries) and margins (rows, trees) from path scores."""
    items = margins.numel()
    grid = (-(-items // VALUES_TILE),)
    _values_kernel[grid](scores, coefficient, margins, items, config.tau, **values_shape(config), num_warps=2)


VALUES_TILE = 64


def values_shape(config: TreeConfig) -> dict[str, Any]:
    """The compile-time arguments of the elementwise kernels."""
    return {
        "DEPTH": config.depth,
        "NODE_OUTPUT": config.node_output,
        "LEAF_WIDTH": config.leaf_width,
        "SCORES": config.path_scores,
        "ENTRIES": out_entries(config),
        "HAS_B_OUT": config.shape_of_b_out is not None,
        "ACTIVATION": config.activation,
        "GATED": config.gate is not None,
        "TILE": VALUES_TILE,
        "BJ": min(32, triton.next_power_of_2(config.leaf_width)),
    }


def _tables(groups: Groups | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if groups is None else (groups.order, groups.table)


def _columns(matrix: Matrix, config: TreeConfig, groups: Groups, tiles: Tiles) -> tuple[int, int]:
    """Columns of one tree that a dot takes at once, a power of two (16 or more over all joint trees), and how often."""
    needed = matrix.columns(config.depth - groups.level)
    columns = max(16 // groups.joint, min(triton.next_power_of_2(needed), max(1, tiles.columns // groups.joint)), 1)
    return columns, triton.cdiv(needed, columns)


def _ancestors(matrix: Matrix, groups: Groups) -> int:
    """Width of the ancestors' dot, 0 when there are none."""
    count = groups.level * groups.joint if matrix.nodes else 0
    return max(16, triton.next_power_of_2(count)) if count else 0


@triton.jit
def _sorted_rows(
    tile,
    turn,
    order_ptr,
    table_ptr,
    rows,
    GROUPS: tl.constexpr,
    BM: tl.constexpr,
):
    """(group, row numbers (BM,) int64, which exist) of a tile. Rows that do not exist are row 0: safe to load."""
    place = tl.arange(0, BM)
    if GROUPS == 0:
        group = tl.zeros((), tl.int32)
        row = (tile * BM + place).to(tl.int64)
        there = row < rows
    else:
        table = table_ptr + turn * 4 * (GROUPS + 1)
        group, begin, end = locate(tile, table, table + GROUPS + 1, GROUPS, BM)
        there = begin + place < end
        row = tl.load(order_ptr + turn.to(tl.int64) * rows + begin + place, mask=there, other=0).to(tl.int64)
    return group, tl.where(there, row, 0), there


@triton.jit
def _tile_of(base, row, start, D: tl.constexpr, WIDTH: tl.constexpr):
    """Columns start ... start + WIDTH of rows `row`, zero beyond D: (len(row), WIDTH)."""
    d = start + tl.arange(0, WIDTH)
    at = base + row[:, None] * D + d[None, :]
    if D % WIDTH == 0:
        return tl.load(at)
    return tl.load(at, mask=(d < D)[None, :], other=0.0)


@triton.jit
def _block_scores(
    x_ptr,
    w_ptr,
    b_ptr,
    row,
    group,
    turn,
    D_IN: tl.constexpr,
    TREES: tl.constexpr,
    TREE_ROWS: tl.constexpr,
    LEVEL: tl.constexpr,
    LEVELS: tl.constexpr,
    JOINT: tl.constexpr,
    SPAN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores (len(row), JOINT * SPAN) of a block of levels, trees side by side, each in heap order, and the row of the
    tree of each column; places beyond a block's 2**LEVELS - 1 hold scores of row 0 that are never looked at."""
    c = tl.arange(0, JOINT * SPAN)
    n = c % SPAN
    tree = turn * JOINT + c // SPAN
    exists = (n < (1 << LEVELS) - 1) & (tree < TREES)
    prefix = prefix_of(group, c // SPAN, LEVEL, JOINT).to(tl.int64)
    level = level_of(tl.where(exists, n, 0), LEVELS)
    heap = ((1 << (LEVEL + level)) - 1).to(tl.int64) + (prefix << level) + (n + 1 - (1 << level))
    node = tl.where(exists, heap, 0)
    w_row = tl.where(exists, tree.to(tl.int64) * TREE_ROWS + heap, 0)
    acc = tl.zeros((row.shape[0], JOINT * SPAN), tl.float32)
    for start in range(0, D_IN, BK):
        x = _tile_of(x_ptr, row, start, D_IN, BK)
        w = _tile_of(w_ptr, w_row, start, D_IN, BK)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    if b_ptr is not None:
        acc += tl.load(b_ptr + w_row).to(tl.float32)[None, :]
    return acc, node


@triton.jit
def _route_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    leaf_ptr,
    scores_ptr,
    coefficient_ptr,
    margins_ptr,
    order_ptr,
    table_ptr,
    rows,
    tau,
    D_IN: tl.constexpr,
    TREES: tl.constexpr,
    TREE_ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    OUT_ENTRIES: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
    DEPTH: tl.constexpr,
    LEVEL: tl.constexpr,
    LEVELS: tl.constexpr,
    JOINT: tl.constexpr,
    SPAN: tl.constexpr,
    GROUPS: tl.constexpr,
    LAST: tl.constexpr,
    NODE_OUTPUT: tl.constexpr,
    HAS_B_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Levels LEVEL ... LEVEL + LEVELS - 1 of JOINT trees; the leaf level counts when a leaf is a single row.

    LAST: leaves are among them, so all scores are known and their coefficients and margins are written too."""
    tile, turn = tl.program_id(0), tl.program_id(1)
    if GROUPS > 0:
        if tile >= tl.load(table_ptr + turn * 4 * (GROUPS + 1) + GROUPS + 1 + GROUPS):
            return
    group, row, there = _sorted_rows(tile, turn, order_ptr, table_ptr, rows, GROUPS, BM)
    blocks, _node = _block_scores(
        x_ptr, w_ptr, b_ptr, row, group, turn, D_IN, TREES, TREE_ROWS, LEVEL, LEVELS, JOINT, SPAN, BK, PRECISION
    )

    # Walk: the score at the current node is the only one selected, so the others cannot disturb it. Tree by tree, in
    # the layout the product left its result in: a reshape would send it through shared memory. What a row leaves behind
    # is gathered in small tiles and stored at once: rows lie far apart, so every store of its own costs a sector.
    columns = tl.arange(0, JOINT * SPAN)
    turns: tl.constexpr = LEVELS if LEVEL + LEVELS <= DEPTH else DEPTH - LEVEL
    dtype = scores_ptr.dtype.element_ty
    s = tl.arange(0, STEPS)
    if LAST:
        c = tl.arange(0, OUT_WIDTH)
    for joint in range(JOINT):
        tree = turn * JOINT + joint
        wanted = there & (tree < TREES)
        item = row * TREES + tree
        gate = tl.full((BM,), 1.0, tl.float32)
        margin = tl.full((BM,), float("inf"), tl.float32)
        scores = tl.zeros((BM, STEPS), tl.float32)
        if LAST:
            values = tl.zeros((BM, OUT_WIDTH), tl.float32)
            for level in tl.static_range(LEVEL):
                before = tl.load(scores_ptr + item * ENTRIES + level, mask=wanted, other=0.0).to(tl.float32)
                if NODE_OUTPUT:
                    values = tl.where((c == level)[None, :], (gate * activate(before, ACTIVATION))[:, None], values)
                size = tl.abs(before)
                margin = tl.where((size < margin) | (size != size), size, margin)
                if GATED:
                    gate *= tanh(size / tau)
        local = tl.zeros((BM,), tl.int32)
        for step in tl.static_range(LEVELS):
            here = columns[None, :] == (joint * SPAN + local)[:, None]
            score = tl.sum(tl.where(here, blocks, 0.0), 1)
            scores = tl.where((s == step)[None, :], score[:, None], scores)
            if LAST and (NODE_OUTPUT or LEVEL + step == DEPTH):
                value = gate * activate(score, ACTIVATION)
                values = tl.where((c == (LEVEL + step) * NODE_OUTPUT)[None, :], value[:, None], values)
            if LEVEL + step < DEPTH:
                if LAST:
                    size = tl.abs(score.to(dtype).to(tl.float32))
                    margin = tl.where((size < margin) | (size != size), size, margin)
                    if GATED:
                        gate *= tanh(tl.abs(score) / tau)
                local = 2 * local + 1 + (score > 0).to(tl.int32)
        at = scores_ptr + item[:, None] * ENTRIES + LEVEL + s[None, :]
        tl.store(at, scores.to(dtype), mask=wanted[:, None] & (s < LEVELS)[None, :])
        above = prefix_of(group, joint, LEVEL, JOINT).to(tl.int64)
        tl.store(leaf_ptr + item, (above << turns) + local - ((1 << turns) - 1), mask=wanted)
        if LAST:
            tl.store(margins_ptr + item, margin.to(dtype), mask=wanted)
            if HAS_B_OUT:
                values = tl.where((c == OUT_ENTRIES - 1)[None, :], gate[:, None], values)
            at = coefficient_ptr + item[:, None] * OUT_ENTRIES + c[None, :]
            tl.store(at, values.to(dtype), mask=wanted[:, None] & (c < OUT_ENTRIES)[None, :])


@triton.jit
def ancestor_column(a, group, turn, LEVEL: tl.constexpr, JOINT: tl.constexpr, TREES: tl.constexpr):
    """What ancestor column `a` is: (tree, row of the tree, path entry, exists)."""
    joint = tl.minimum(a // LEVEL, JOINT - 1)
    level = a % LEVEL
    prefix = prefix_of(group, joint, LEVEL, JOINT).to(tl.int64)
    row = ((1 << level) - 1).to(tl.int64) + (prefix >> (LEVEL - level))
    tree = turn * JOINT + joint
    return tree, row, level, (a < LEVEL * JOINT) & (tree < TREES)


@triton.jit
def path_mask(
    leaf_ptr, row, joint, turn, there, shift, place, TREES: tl.constexpr, SUB: tl.constexpr, JOINT: tl.constexpr
):
    """(len(row), len(joint)): whether each column, of tree number `joint` in this turn, lies on each row's path."""
    if SUB == 0:  # all columns of a lone leaf do
        return there[:, None] & (turn * JOINT + joint < TREES)[None, :]
    inside = tl.load(leaf_ptr + row * TREES + turn * JOINT, mask=there, other=0).to(tl.int32)[:, None]
    # One load a tree and a select: a gather by column would load every leaf once for each of its columns.
    for other in tl.static_range(1, JOINT):
        wanted = there & (turn * JOINT + other < TREES)
        leaf = tl.load(leaf_ptr + row * TREES + turn * JOINT + other, mask=wanted, other=0).to(tl.int32)
        inside = tl.where((joint == other)[None, :], leaf[:, None], inside)
    on_path = ((inside & ((1 << SUB) - 1)) >> shift[None, :]) == place[None, :]
    return on_path & there[:, None] & (turn * JOINT + joint < TREES)[None, :]


@triton.jit
def _pick_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    leaf_ptr,
    out_ptr,
    order_ptr,
    table_ptr,
    rows,
    D: tl.constexpr,
    TREES: tl.constexpr,
    DEPTH: tl.constexpr,
    LEVEL: tl.constexpr,
    JOINT: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ANCESTORS: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_NODES: tl.constexpr,
    LEAF_FIRST: tl.constexpr,
    LEAF_ROWS: tl.constexpr,
    LEAF_ENTRY: tl.constexpr,
    TREE_ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    tile, turn = tl.program_id(0), tl.program_id(1)
    if tile >= tl.load(table_ptr + turn * 4 * (GROUPS + 1) + GROUPS + 1 + GROUPS):
        return
    group, row, there = _sorted_rows(tile, turn, order_ptr, table_ptr, rows, GROUPS, BM)

    c = tl.arange(0, COLUMNS * JOINT)
    joint = c // COLUMNS
    tree = turn * JOINT + joint
    prefix = prefix_of(group, joint, LEVEL, JOINT)
    column = tl.program_id(2) * COLUMNS + c % COLUMNS
    SUB: tl.constexpr = DEPTH - LEVEL
    place_row, entry, shift, place, exists = subtree_column(
        column, prefix, DEPTH, SUB, HAS_NODES, LEAF_FIRST, LEAF_ROWS, LEAF_ENTRY
    )
    exists = exists & (tree < TREES)
    w_row = tl.where(exists, tree.to(tl.int64) * TREE_ROWS + place_row, 0)
    acc = tl.zeros((BM, COLUMNS * JOINT), tl.float32)
    if ANCESTORS > 0:
        a_tree, a_row, a_entry, a_exists = ancestor_column(tl.arange(0, ANCESTORS), group, turn, LEVEL, JOINT, TREES)
        a_row = tl.where(a_exists, a_tree.to(tl.int64) * TREE_ROWS + a_row, 0)
        a_acc = tl.zeros((BM, ANCESTORS), tl.float32)
    for start in range(0, D, BK):
        x = _tile_of(x_ptr, row, start, D, BK)
        w = _tile_of(w_ptr, w_row, start, D, BK)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
        if ANCESTORS > 0:
            w = _tile_of(w_ptr, a_row, start, D, BK)
            a_acc = tl.dot(x, tl.trans(w), a_acc, input_precision=PRECISION)
    if b_ptr is not None:
        acc += tl.load(b_ptr + w_row).to(tl.float32)[None, :]

    on_path = path_mask(leaf_ptr, row, joint, turn, there, shift, place, TREES, SUB, JOINT) & exists[None, :]
    at = out_ptr + (row[:, None] * TREES + tree[None, :]) * ENTRIES + entry[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=on_path)
    if ANCESTORS > 0:
        at = out_ptr + (row[:, None] * TREES + a_tree[None, :]) * ENTRIES + a_entry[None, :]
        tl.store(at, a_acc.to(out_ptr.dtype.element_ty), mask=there[:, None] & a_exists[None, :])


@triton.jit
def _path_entries(
    entries_ptr,
    leaf_ptr,
    row,
    there,
    group,
    turn,
    chunk,
    TREES: tl.constexpr,
    DEPTH: tl.constexpr,
    LEVEL: tl.constexpr,
    JOINT: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_NODES: tl.constexpr,
    LEAF_FIRST: tl.constexpr,
    LEAF_ROWS: tl.constexpr,
    LEAF_ENTRY: tl.constexpr,
    TREE_ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """A chunk of subtree columns: entries (len(row), columns), zero off each row's path, and the matrix row of each."""
    c = tl.arange(0, COLUMNS * JOINT)
    joint = c // COLUMNS
    tree = turn * JOINT + joint
    SUB: tl.constexpr = DEPTH - LEVEL
    place_row, entry, shift, place, exists = subtree_column(
        chunk * COLUMNS + c % COLUMNS,
        prefix_of(group, joint, LEVEL, JOINT),
        DEPTH,
        SUB,
        HAS_NODES,
        LEAF_FIRST,
        LEAF_ROWS,
        LEAF_ENTRY,
    )
    exists = exists & (tree < TREES)
    w_row = tl.where(exists, tree.to(tl.int64) * TREE_ROWS + place_row, 0)
    on_path = path_mask(leaf_ptr, row, joint, turn, there, shift, place, TREES, SUB, JOINT) & exists[None, :]
    at = entries_ptr + (row[:, None] * TREES + tree[None, :]) * ENTRIES + entry[None, :]
    return tl.load(at, mask=on_path, other=0.0), w_row


@triton.jit
def _spread_kernel(
    entries_ptr,
    w_ptr,
    leaf_ptr,
    y_ptr,
    order_ptr,
    table_ptr,
    rows,
    turn,
    D: tl.constexpr,
    TREES: tl.constexpr,
    DEPTH: tl.constexpr,
    LEVEL: tl.constexpr,
    JOINT: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
    ANCESTORS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_NODES: tl.constexpr,
    LEAF_FIRST: tl.constexpr,
    LEAF_ROWS: tl.constexpr,
    LEAF_ENTRY: tl.constexpr,
    TREE_ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    tile = tl.program_id(0)
    turn = tl.zeros((), tl.int32) + turn
    if tile >= tl.load(table_ptr + turn * 4 * (GROUPS + 1) + GROUPS + 1 + GROUPS):
        return
    group, row, there = _sorted_rows(tile, turn, order_ptr, table_ptr, rows, GROUPS, BM)

    # What does not depend on the output columns is loaded once: ancestors' entries, and a lone chunk of the subtree.
    if ANCESTORS > 0:
        a_tree, a_row, a_entry, a_exists = ancestor_column(tl.arange(0, ANCESTORS), group, turn, LEVEL, JOINT, TREES)
        a_row = tl.where(a_exists, a_tree.to(tl.int64) * TREE_ROWS + a_row, 0)
        a_at = entries_ptr + (row[:, None] * TREES + a_tree[None, :]) * ENTRIES + a_entry[None, :]
        above = tl.load(a_at, mask=there[:, None] & a_exists[None, :], other=0.0)
    if CHUNKS == 1:
        below, w_row = _path_entries(
            entries_ptr, leaf_ptr, row, there, group, turn, 0, TREES, DEPTH, LEVEL, JOINT, COLUMNS,
            HAS_NODES, LEAF_FIRST, LEAF_ROWS, LEAF_ENTRY, TREE_ROWS, ENTRIES,
        )  # fmt: skip

    for start in range(0, D, BN):
        d = start + tl.arange(0, BN)
        at = y_ptr + row[:, None] * D + d[None, :]
        mask = there[:, None] & (d < D)[None, :]
        acc = tl.load(at, mask=mask, other=0.0).to(tl.float32) if ACCUMULATE else tl.zeros((BM, BN), tl.float32)
        if ANCESTORS > 0:
            acc = tl.dot(above, _tile_of(w_ptr, a_row, start, D, BN), acc, input_precision=PRECISION)
        if CHUNKS == 1:
            acc = tl.dot(below, _tile_of(w_ptr, w_row, start, D, BN), acc, input_precision=PRECISION)
        else:
            for chunk in range(CHUNKS):
                part, part_row = _path_entries(
                    entries_ptr, leaf_ptr, row, there, group, turn, chunk, TREES, DEPTH, LEVEL, JOINT, COLUMNS,
                    HAS_NODES, LEAF_FIRST, LEAF_ROWS, LEAF_ENTRY, TREE_ROWS, ENTRIES,
                )  # fmt: skip
                acc = tl.dot(part, _tile_of(w_ptr, part_row, start, D, BN), acc, input_precision=PRECISION)
        tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _values_kernel(
    scores_ptr,
    coefficient_ptr,
    margins_ptr,
    items,
    tau,
    DEPTH: tl.constexpr,
    NODE_OUTPUT: tl.constexpr,
    LEAF_WIDTH: tl.constexpr,
    SCORES: tl.constexpr,
    ENTRIES: tl.constexpr,
    HAS_B_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    TILE: tl.constexpr,
    BJ: tl.constexpr,
):
    """One item is one row in one tree."""
    item = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there = item < items
    scores = scores_ptr + item * SCORES
    out = coefficient_ptr + item * ENTRIES
    gate = tl.full((TILE,), 1.0, tl.float32)
    margin = tl.full((TILE,), float("inf"), tl.float32)
    for level in tl.static_range(DEPTH):
        score = tl.load(scores + level, mask=there, other=0.0).to(tl.float32)
        if NODE_OUTPUT:
            value = gate * activate(score, ACTIVATION)
            tl.store(out + level, value.to(coefficient_ptr.dtype.element_ty), mask=there)
        size = tl.abs(score)
        margin = tl.where((size < margin) | (size != size), size, margin)
        if GATED:
            gate *= tanh(size / tau)
    tl.store(margins_ptr + item, margin.to(margins_ptr.dtype.element_ty), mask=there)
    first: tl.constexpr = DEPTH if NODE_OUTPUT else 0
    for start in range(0, LEAF_WIDTH, BJ):
        j = start + tl.arange(0, BJ)
        mask = there[:, None] & (j < LEAF_WIDTH)[None, :]
        leaf_score = tl.load(scores[:, None] + DEPTH + j[None, :], mask=mask, other=0.0).to(tl.float32)
        leaf_value = activate(leaf_score, ACTIVATION)
        if ACTIVATION == "swiglu":
            leaf_value *= tl.load(scores[:, None] + DEPTH + LEAF_WIDTH + j[None, :], mask=mask, other=0.0).to(
                tl.float32
            )
        leaf_value *= gate[:, None]
        tl.store(out[:, None] + first + j[None, :], leaf_value.to(coefficient_ptr.dtype.element_ty), mask=mask)
    if HAS_B_OUT:
        tl.store(out + ENTRIES - 1, gate.to(coefficient_ptr.dtype.element_ty), mask=there)
