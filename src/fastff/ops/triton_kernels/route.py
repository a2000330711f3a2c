"""A block of levels below the groups' common turns: one product scores its nodes, then every row follows its turns.

`route` does that for all trees at once and leaves scores and leaves behind; its last block, where leaves are single
rows, scores them too and turns scores into coefficients. `paths` is that last block and the output in one kernel, tree
by tree: nothing but the scores, which the backward needs, travels through memory.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastff.ops.triton_kernels.common import activate, level_of, prefix_of, tanh
from fastff.ops.triton_kernels.launch import launch, new
from fastff.ops.triton_kernels.linear import (
    ancestor_column,
    beyond,
    out_entries,
    precision_of,
    sorted_rows,
    tables,
    tile_of,
)
from fastff.ops.triton_kernels.plan import Stage, Tiles, ceil_div, power_of_two
from fastff.ops.triton_kernels.sort import Groups
from fastff.tree import TreeConfig


def route(
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
    launch(
        _route_kernel, (_tiles(x, groups, tiles), ceil_div(config.trees, stage.joint)),
        x, w_in, b_in, leaf, scores, coefficient, margins, *tables(groups), x.shape[0], config.tau,
        OUT_ENTRIES=out_entries(config), OUT_WIDTH=power_of_two(out_entries(config)), LAST=coefficient is not None,
        HAS_B_OUT=config.shape_of_b_out is not None, **_shape(x, groups, config, stage, tiles),
    )  # fmt: skip


def paths(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    leaf: Tensor,
    scores: Tensor,
    margins: Tensor,
    groups: Groups | None,
    *,
    config: TreeConfig,
    stage: Stage,
    tiles: Tiles,
) -> Tensor:
    """y (rows, out_features) by the last stage, which scores leaves of one row; fills leaf, its part of scores, and
    margins (rows,). Passes over `stage.joint` trees run one after another, each adding to the last."""
    y = new(x, x.shape[0], config.out_features)
    for turn in range(ceil_div(config.trees, stage.joint)):
        launch(
            _paths_kernel, (_tiles(x, groups, tiles),),
            x, w_in, b_in, w_out, b_out, leaf, scores, margins, y, *tables(groups), x.shape[0], turn, config.tau,
            D_OUT=config.out_features, NODES=config.nodes, OUT_ROWS=config.out_rows, BN=tiles.outer,
            ABOVE=max(16, power_of_two(stage.level * stage.joint)) if stage.level else 0, ACCUMULATE=turn > 0,
            **_shape(x, groups, config, stage, tiles),
        )  # fmt: skip
    return y


def _tiles(x: Tensor, groups: Groups | None, tiles: Tiles) -> int:
    return ceil_div(x.shape[0], tiles.rows) if groups is None else groups.tiles


def _shape(x: Tensor, groups: Groups | None, config: TreeConfig, stage: Stage, tiles: Tiles) -> dict[str, Any]:
    """Compile-time arguments of both kernels. SPAN: columns of a tree's block; STEPS: room for its levels."""
    return {
        "D_IN": config.in_features, "TREES": config.trees, "TREE_ROWS": config.in_rows, "ENTRIES": config.path_scores,
        "DEPTH": config.depth, "LEVEL": stage.level, "LEVELS": stage.levels, "JOINT": stage.joint,
        "SPAN": max(2**stage.levels, ceil_div(16, stage.joint)), "STEPS": power_of_two(stage.levels),
        "GROUPS": 0 if groups is None else groups.groups, "NODE_OUTPUT": config.node_output,
        "ACTIVATION": config.activation, "GATED": config.gate is not None, "BM": tiles.rows, "BK": tiles.inner,
        "PRECISION": precision_of(x.dtype), "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip


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
    """Scores (len(row), JOINT * SPAN) of a block of levels, trees side by side, each in heap order, and of each column
    the tree, the row of the tree, and whether it exists; the places beyond a block's 2**LEVELS - 1 do not: they hold
    scores of row 0 that are never looked at."""
    c = tl.arange(0, JOINT * SPAN)
    n = c % SPAN
    tree = turn * JOINT + c // SPAN
    exists = (n < (1 << LEVELS) - 1) & (tree < TREES)
    prefix = prefix_of(group, c // SPAN, LEVEL, JOINT).to(tl.int64)
    level = level_of(tl.where(exists, n, 0), LEVELS)
    heap = ((1 << (LEVEL + level)) - 1).to(tl.int64) + (prefix << level) + (n + 1 - (1 << level))
    w_row = tl.where(exists, tree.to(tl.int64) * TREE_ROWS + heap, 0)
    acc = tl.zeros((row.shape[0], JOINT * SPAN), tl.float32)
    for start in range(0, D_IN, BK):
        x = tile_of(x_ptr, row, start, D_IN, BK)
        w = tile_of(w_ptr, w_row, start, D_IN, BK)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    if b_ptr is not None:
        acc += tl.load(b_ptr + w_row).to(tl.float32)[None, :]
    return acc, tree, heap, exists


@triton.jit
def _walk(
    blocks,
    first,
    values,
    gate,
    margin,
    tau,
    dtype: tl.constexpr,
    DEPTH: tl.constexpr,
    LEVEL: tl.constexpr,
    LEVELS: tl.constexpr,
    STEPS: tl.constexpr,
    LAST: tl.constexpr,
    IN_PLACE: tl.constexpr,
    NODE_OUTPUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
):
    """Follow a tree's turns through its block, which begins at column `first`: (place reached, scores (rows, STEPS),
    values, gate, margin). LAST: values takes the coefficients, by path entry, or IN_PLACE by column of the block.

    The score at the current node is the only one selected, so the others cannot disturb it. Tree by tree, in the layout
    the product left its result in: a reshape would send it through shared memory. What a row leaves behind is gathered
    in small tiles and stored at once: rows lie far apart, so every store of its own costs a sector."""
    columns = tl.arange(0, blocks.shape[1])
    s = tl.arange(0, STEPS)
    if LAST:
        c = tl.arange(0, values.shape[1])
    scores = tl.zeros((blocks.shape[0], STEPS), tl.float32)
    local = tl.zeros((blocks.shape[0],), tl.int32)
    for step in tl.static_range(LEVELS):
        here = columns[None, :] == (first + local)[:, None]
        score = tl.sum(tl.where(here, blocks, 0.0), 1)
        scores = tl.where((s == step)[None, :], score[:, None], scores)
        if LAST and (NODE_OUTPUT or LEVEL + step == DEPTH):
            value = gate * activate(score, ACTIVATION)
            place = here if IN_PLACE else (c == (LEVEL + step) * NODE_OUTPUT)[None, :]
            values = tl.where(place, value[:, None], values)
        if LEVEL + step < DEPTH:
            if LAST:
                size = tl.abs(score.to(dtype).to(tl.float32))
                margin = tl.where((size < margin) | (size != size), size, margin)
                if GATED:
                    gate *= tanh(tl.abs(score) / tau)
            local = 2 * local + 1 + (score > 0).to(tl.int32)
    return local, scores, values, gate, margin


@triton.jit
def _store_path(
    leaf_ptr,
    scores_ptr,
    item,
    wanted,
    group,
    joint,
    local,
    scores,
    ENTRIES: tl.constexpr,
    DEPTH: tl.constexpr,
    LEVEL: tl.constexpr,
    LEVELS: tl.constexpr,
    JOINT: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The scores of a block's levels, and the turns taken so far."""
    s = tl.arange(0, STEPS)
    at = scores_ptr + item[:, None] * ENTRIES + LEVEL + s[None, :]
    tl.store(at, scores.to(scores_ptr.dtype.element_ty), mask=wanted[:, None] & (s < LEVELS)[None, :])
    turns: tl.constexpr = LEVELS if LEVEL + LEVELS <= DEPTH else DEPTH - LEVEL
    above = prefix_of(group, joint, LEVEL, JOINT).to(tl.int64)
    tl.store(leaf_ptr + item, (above << turns) + local - ((1 << turns) - 1), mask=wanted)


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
        if beyond(tile, turn, table_ptr, GROUPS):
            return
    group, row, there = sorted_rows(tile, turn, order_ptr, table_ptr, rows, GROUPS, BM)
    blocks, _tree, _heap, _exists = _block_scores(
        x_ptr, w_ptr, b_ptr, row, group, turn, D_IN, TREES, TREE_ROWS, LEVEL, LEVELS, JOINT, SPAN, BK, PRECISION
    )

    dtype: tl.constexpr = scores_ptr.dtype.element_ty
    if LAST:
        c = tl.arange(0, OUT_WIDTH)
    for joint in range(JOINT):
        tree = turn * JOINT + joint
        wanted = there & (tree < TREES)
        item = row * TREES + tree
        gate = tl.full((BM,), 1.0, tl.float32)
        margin = tl.full((BM,), float("inf"), tl.float32)
        values = tl.zeros((BM, OUT_WIDTH), tl.float32)
        if LAST:
            for level in tl.static_range(LEVEL):
                before = tl.load(scores_ptr + item * ENTRIES + level, mask=wanted, other=0.0).to(tl.float32)
                if NODE_OUTPUT:
                    values = tl.where((c == level)[None, :], (gate * activate(before, ACTIVATION))[:, None], values)
                size = tl.abs(before)
                margin = tl.where((size < margin) | (size != size), size, margin)
                if GATED:
                    gate *= tanh(size / tau)
        local, scores, values, gate, margin = _walk(
            blocks, joint * SPAN, values, gate, margin, tau, dtype, DEPTH, LEVEL, LEVELS, STEPS,
            LAST, False, NODE_OUTPUT, ACTIVATION, GATED,
        )  # fmt: skip
        _store_path(
            leaf_ptr, scores_ptr, item, wanted, group, joint, local, scores, ENTRIES, DEPTH, LEVEL, LEVELS, JOINT, STEPS
        )
        if LAST:
            tl.store(margins_ptr + item, margin.to(dtype), mask=wanted)
            if HAS_B_OUT:
                values = tl.where((c == OUT_ENTRIES - 1)[None, :], gate[:, None], values)
            at = coefficient_ptr + item[:, None] * OUT_ENTRIES + c[None, :]
            tl.store(at, values.to(dtype), mask=wanted[:, None] & (c < OUT_ENTRIES)[None, :])


@triton.jit(do_not_specialize=["turn"])
def _paths_kernel(
    x_ptr,
    w_in_ptr,
    b_in_ptr,
    w_out_ptr,
    b_out_ptr,
    leaf_ptr,
    scores_ptr,
    margins_ptr,
    y_ptr,
    order_ptr,
    table_ptr,
    rows,
    turn,
    tau,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    TREES: tl.constexpr,
    TREE_ROWS: tl.constexpr,
    OUT_ROWS: tl.constexpr,
    NODES: tl.constexpr,
    ENTRIES: tl.constexpr,
    STEPS: tl.constexpr,
    DEPTH: tl.constexpr,
    LEVEL: tl.constexpr,
    LEVELS: tl.constexpr,
    JOINT: tl.constexpr,
    SPAN: tl.constexpr,
    GROUPS: tl.constexpr,
    ABOVE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    NODE_OUTPUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The last levels of JOINT trees and the output of their paths. Coefficients stay in the columns of the block,
    whose rows of w_out they multiply: zero off the path."""
    tile = tl.program_id(0)
    turn = tl.zeros((), tl.int32) + turn
    if GROUPS > 0:
        if beyond(tile, turn, table_ptr, GROUPS):
            return
    group, row, there = sorted_rows(tile, turn, order_ptr, table_ptr, rows, GROUPS, BM)
    blocks, block_tree, heap, exists = _block_scores(
        x_ptr, w_in_ptr, b_in_ptr, row, group, turn, D_IN, TREES, TREE_ROWS, LEVEL, LEVELS, JOINT, SPAN, BK, PRECISION
    )

    dtype: tl.constexpr = y_ptr.dtype.element_ty
    columns = tl.arange(0, JOINT * SPAN)
    values = tl.zeros((BM, JOINT * SPAN), tl.float32)
    gates = tl.zeros((BM, JOINT * SPAN), tl.float32)
    margin = tl.full((BM,), float("inf"), tl.float32)
    if ACCUMULATE:
        margin = tl.load(margins_ptr + row, mask=there, other=0.0).to(tl.float32)
    # The scores above as one tile: taken one by one they cost 60 registers.
    if ABOVE > 0:
        a = tl.arange(0, ABOVE)
        a_tree, a_row, level, a_exists = ancestor_column(a, group, turn, LEVEL, JOINT, TREES, OUT_ROWS)
        before_at = scores_ptr + (row[:, None] * TREES + a_tree[None, :]) * ENTRIES + level[None, :]
        a_mask = there[:, None] & a_exists[None, :]
        before = tl.load(before_at, mask=a_mask, other=0.0).to(tl.float32)
        sizes = tl.where(a_mask, tl.abs(before), float("inf"))
        least_above = tl.min(sizes, 1)
        no_number = tl.max((sizes != sizes).to(tl.int32), 1) > 0
        margin = tl.where(no_number, float("nan"), tl.where(least_above < margin, least_above, margin))
        if NODE_OUTPUT:
            above = activate(before, ACTIVATION)
        if GATED:
            turns = tanh(sizes / tau)
            gates_above = tl.zeros((BM, ABOVE), tl.float32)
    for joint in range(JOINT):
        tree = turn * JOINT + joint
        wanted = there & (tree < TREES)
        item = row * TREES + tree
        gate = tl.full((BM,), 1.0, tl.float32)
        least = margin
        if GATED and ABOVE > 0:
            for step in tl.static_range(LEVEL):
                here = (a == joint * LEVEL + step)[None, :]
                gates_above = tl.where(here, gate[:, None], gates_above)
                gate *= tl.sum(tl.where(here, turns, 0.0), 1)
        local, scores, values, gate, least = _walk(
            blocks, joint * SPAN, values, gate, least, tau, dtype, DEPTH, LEVEL, LEVELS, STEPS,
            True, True, NODE_OUTPUT, ACTIVATION, GATED,
        )  # fmt: skip
        margin = tl.where(wanted, least, margin)
        _store_path(
            leaf_ptr, scores_ptr, item, wanted, group, joint, local, scores, ENTRIES, DEPTH, LEVEL, LEVELS, JOINT, STEPS
        )
        if b_out_ptr is not None:
            gates = tl.where(columns[None, :] == (joint * SPAN + local)[:, None], gate[:, None], gates)
    tl.store(margins_ptr + row, margin.to(dtype), mask=there)

    counts = exists if NODE_OUTPUT else exists & (heap >= NODES)
    first: tl.constexpr = 0 if NODE_OUTPUT else NODES
    out_row = tl.where(counts, block_tree.to(tl.int64) * OUT_ROWS + heap - first, 0)
    below = tl.where(counts[None, :], values, 0.0).to(dtype)
    if NODE_OUTPUT and ABOVE > 0:
        if GATED:
            above *= gates_above
        above_values = tl.where(a_exists[None, :], above, 0.0).to(dtype)
    if b_out_ptr is not None:
        is_leaf = exists & (heap >= NODES)
        b_row = tl.where(is_leaf, block_tree.to(tl.int64) * (NODES + 1) + heap - NODES, 0)
        leaf_gates = tl.where(is_leaf[None, :], gates, 0.0).to(dtype)
    for start in range(0, D_OUT, BN):
        d = start + tl.arange(0, BN)
        at = y_ptr + row[:, None] * D_OUT + d[None, :]
        mask = there[:, None] & (d < D_OUT)[None, :]
        acc = tl.load(at, mask=mask, other=0.0).to(tl.float32) if ACCUMULATE else tl.zeros((BM, BN), tl.float32)
        acc = tl.dot(below, tile_of(w_out_ptr, out_row, start, D_OUT, BN), acc, input_precision=PRECISION)
        if NODE_OUTPUT and ABOVE > 0:
            acc = tl.dot(above_values, tile_of(w_out_ptr, a_row, start, D_OUT, BN), acc, input_precision=PRECISION)
        if b_out_ptr is not None:
            acc = tl.dot(leaf_gates, tile_of(b_out_ptr, b_row, start, D_OUT, BN), acc, input_precision=PRECISION)
        tl.store(at, acc.to(dtype), mask=mask)
