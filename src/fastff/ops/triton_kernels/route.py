"""A block of levels below the groups' common decisions: one product scores its nodes, then every row descends in it.

Scores and leaves stay behind; the last block, where leaves are single rows, scores them too and makes scores into
coefficients.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastff.config import TreeConfig
from fastff.ops.triton_kernels.common import activate, level_of, prefix_of, tanh
from fastff.ops.triton_kernels.launch import launch
from fastff.ops.triton_kernels.linear import beyond, out_entries, precision_of, sorted_rows, tables, tile_of
from fastff.ops.triton_kernels.plan import Stage, Tiles, ceil_div, power_of_two, tau_of
from fastff.ops.triton_kernels.sort import Groups
from fastff.ops.weights import Weights


def route(
    x: Tensor,
    weights: Weights,
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
    row_tiles = ceil_div(x.shape[0], tiles.rows) if groups is None else groups.tiles
    launch(
        _route_kernel, (row_tiles, ceil_div(config.trees, stage.joint)),
        x, weights.w_in, weights.b_in, leaf, scores, coefficient, margins, *tables(groups), x.shape[0], tau_of(config),
        D_IN=config.in_features, TREES=config.trees, TREE_ROWS=config.in_rows, ENTRIES=config.path_scores,
        OUT_ENTRIES=out_entries(config), OUT_WIDTH=power_of_two(out_entries(config)),
        STEPS=power_of_two(stage.levels), DEPTH=config.depth, LEVEL=stage.level, LEVELS=stage.levels,
        JOINT=stage.joint, SPAN=max(2**stage.levels, ceil_div(16, stage.joint)),
        GROUPS=0 if groups is None else groups.groups, LAST=coefficient is not None, NODE_OUTPUT=config.node_output,
        HAS_B_OUT=config.shape_of_b_out is not None, ACTIVATION=config.activation, GATED=config.gate is not None,
        BM=tiles.rows, BK=tiles.inner, PRECISION=precision_of(x.dtype), num_warps=tiles.warps,
        num_stages=tiles.stages,
    )  # fmt: skip


@triton.jit
def _block_scores(
    x_ptr, w_ptr, b_ptr,
    row, group, pass_number,
    D_IN: tl.constexpr, TREES: tl.constexpr, TREE_ROWS: tl.constexpr, LEVEL: tl.constexpr, LEVELS: tl.constexpr,
    JOINT: tl.constexpr, SPAN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores (len(row), JOINT * SPAN) of a block of levels, trees side by side, each in heap order; places beyond a
    block's 2**LEVELS - 1 hold scores of row 0 that are never looked at."""
    c = tl.arange(0, JOINT * SPAN)
    n = c % SPAN
    tree = pass_number * JOINT + c // SPAN
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
    return acc


@triton.jit
def _walk(
    blocks, first, values, gate, margin, tau,
    dtype: tl.constexpr, DEPTH: tl.constexpr, LEVEL: tl.constexpr, LEVELS: tl.constexpr, STEPS: tl.constexpr,
    LAST: tl.constexpr, NODE_OUTPUT: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Follow a tree's decisions through its block, which begins at column `first`: (place reached, scores
    (rows, STEPS), values, gate, margin). LAST: values takes the coefficients, by path entry.

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
            values = tl.where((c == (LEVEL + step) * NODE_OUTPUT)[None, :], value[:, None], values)
        if LEVEL + step < DEPTH:
            if LAST:
                size = tl.abs(score.to(dtype).to(tl.float32))
                margin = tl.where((size < margin) | (size != size), size, margin)
                if GATED:
                    gate *= tanh(tl.abs(score) / tau)
            local = 2 * local + 1 + (score > 0).to(tl.int32)
    return local, scores, values, gate, margin


@triton.jit
def _route_kernel(
    x_ptr, w_ptr, b_ptr, leaf_ptr, scores_ptr, coefficient_ptr, margins_ptr, order_ptr, table_ptr,
    rows, tau,
    D_IN: tl.constexpr, TREES: tl.constexpr, TREE_ROWS: tl.constexpr, ENTRIES: tl.constexpr,
    OUT_ENTRIES: tl.constexpr, OUT_WIDTH: tl.constexpr, STEPS: tl.constexpr, DEPTH: tl.constexpr, LEVEL: tl.constexpr,
    LEVELS: tl.constexpr, JOINT: tl.constexpr, SPAN: tl.constexpr, GROUPS: tl.constexpr, LAST: tl.constexpr,
    NODE_OUTPUT: tl.constexpr, HAS_B_OUT: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Levels LEVEL ... LEVEL + LEVELS - 1 of JOINT trees; the leaf level counts when a leaf is a single row.

    LAST: leaves are among them, so all scores are known and their coefficients and margins are written too."""
    tile, pass_number = tl.program_id(0), tl.program_id(1)
    if GROUPS > 0:
        if beyond(tile, pass_number, table_ptr, GROUPS):
            return
    group, row, there = sorted_rows(tile, pass_number, order_ptr, table_ptr, rows, GROUPS, BM)
    blocks = _block_scores(
        x_ptr, w_ptr, b_ptr, row, group, pass_number, D_IN, TREES, TREE_ROWS, LEVEL, LEVELS, JOINT, SPAN, BK, PRECISION
    )

    dtype: tl.constexpr = scores_ptr.dtype.element_ty
    decisions: tl.constexpr = LEVELS if LEVEL + LEVELS <= DEPTH else DEPTH - LEVEL
    s = tl.arange(0, STEPS)
    if LAST:
        c = tl.arange(0, OUT_WIDTH)
    for joint in range(JOINT):
        tree = pass_number * JOINT + joint
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
            LAST, NODE_OUTPUT, ACTIVATION, GATED,
        )  # fmt: skip
        at = scores_ptr + item[:, None] * ENTRIES + LEVEL + s[None, :]
        tl.store(at, scores.to(dtype), mask=wanted[:, None] & (s < LEVELS)[None, :])
        above = prefix_of(group, joint, LEVEL, JOINT).to(tl.int64)
        tl.store(leaf_ptr + item, (above << decisions) + local - ((1 << decisions) - 1), mask=wanted)
        if LAST:
            tl.store(margins_ptr + item, margin.to(dtype), mask=wanted)
            if HAS_B_OUT:
                values = tl.where((c == OUT_ENTRIES - 1)[None, :], gate[:, None], values)
            at = coefficient_ptr + item[:, None] * OUT_ENTRIES + c[None, :]
            tl.store(at, values.to(dtype), mask=wanted[:, None] & (c < OUT_ENTRIES)[None, :])
