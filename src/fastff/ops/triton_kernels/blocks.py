"""Many rows: trees cut into blocks of levels, rows sorted between blocks, every product a tensor-core GEMM.

`_route_kernel` multiplies x by a block of nodes and takes the turns inside it: scores and leaf. Then either the two
linear kernels of linear.py, with `_values_kernel` between them to turn scores into coefficients; or, where groups
share their leaves, one kernel that does all three (leaves.py).

Weights must be finite: a row multiplies the neighbours of its path by zero, and zero times infinity is NaN.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastff.ops.triton_kernels.common import activate, level_of, prefix_of, tanh
from fastff.ops.triton_kernels.launch import apply, launch, new
from fastff.ops.triton_kernels.leaves import leaves
from fastff.ops.triton_kernels.linear import (
    Matrix,
    out_entries,
    pick,
    precision_of,
    sort_leaves,
    sorted_rows,
    spread,
    tables,
    tile_of,
)
from fastff.ops.triton_kernels.plan import BlockedPlan, Stage, Tiles, ceil_div, power_of_two
from fastff.ops.triton_kernels.sort import Groups, group_rows
from fastff.tree import TreeConfig


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
    leaf = new(x, rows, trees, dtype=torch.int64)
    scores = new(x, rows, trees, config.path_scores)
    apart = trees > 1 and not plan.one_pass
    margins = new(x, rows, trees) if apart else new(x, rows)
    coefficient = None if plan.one_pass else new(x, rows, trees, out_entries(config))
    groups = None
    for stage in plan.stages:
        if stage.level:
            groups = group_rows(leaf, shift=0, level=stage.level, joint=stage.joint, tile=plan.tiles.rows, chunk=1)
        last = (coefficient, margins) if plan.leaf_routed and stage == plan.stages[-1] else (None, None)
        _route(x, w_in, b_in, leaf, scores, groups, config=config, stage=stage, tiles=plan.tiles,
               coefficient=last[0], margins=last[1])  # fmt: skip
    if not plan.stages:
        apply(Tensor.zero_, leaf)
    if groups is None or (groups.level, groups.joint) != (plan.level, plan.joint):
        groups = sort_leaves(leaf, config=config, level=plan.level, joint=plan.joint, tiles=plan.tiles, chunk=1)
    if coefficient is None:
        y = leaves(x, w_in, b_in, w_out, b_out, scores, margins, groups, config=config, tiles=plan.tiles)
    else:
        if not plan.leaf_routed:
            matrix = Matrix.of_w_in(config, nodes=False)
            pick(x, w_in, leaf, groups, scores, config=config, matrix=matrix, tiles=plan.tiles, bias=b_in)
            _values(scores, coefficient, margins, config=config)
        y = spread(coefficient, w_out, leaf, groups, config=config, matrix=Matrix.of_w_out(config), tiles=plan.tiles)
        if b_out is not None:
            matrix = Matrix.of_b_out(config)
            spread(coefficient, b_out, leaf, groups, config=config, matrix=matrix, tiles=plan.tiles, into=y)
    margin = margins
    if apart:
        margin = new(x, rows)
        apply(_least, margins, margin)
    return y, leaf, margin, scores


def _least(margins: Tensor, margin: Tensor) -> None:
    torch.amin(margins, 1, out=margin)


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
    grid = (ceil_div(x.shape[0], tiles.rows) if groups is None else groups.tiles, ceil_div(config.trees, stage.joint))
    launch(
        _route_kernel, grid,
        x, w_in, b_in, leaf, scores, coefficient, margins, *tables(groups), x.shape[0], config.tau,
        D_IN=config.in_features, TREES=config.trees, TREE_ROWS=config.in_rows, ENTRIES=config.path_scores,
        OUT_ENTRIES=out_entries(config), OUT_WIDTH=power_of_two(out_entries(config)),
        STEPS=power_of_two(stage.levels), DEPTH=config.depth, LEVEL=stage.level, LEVELS=stage.levels,
        JOINT=stage.joint, SPAN=max(2**stage.levels, ceil_div(16, stage.joint)),
        GROUPS=0 if groups is None else groups.groups, LAST=coefficient is not None, NODE_OUTPUT=config.node_output,
        HAS_B_OUT=config.shape_of_b_out is not None, ACTIVATION=config.activation, GATED=config.gate is not None,
        BM=tiles.rows, BK=tiles.inner, PRECISION=precision_of(x.dtype), num_warps=tiles.warps,
        num_stages=tiles.stages,
    )  # fmt: skip


def _values(scores: Tensor, coefficient: Tensor, margins: Tensor, *, config: TreeConfig) -> None:
    """Fill coefficient (rows, trees, out_entries) and margins (rows, trees) from path scores."""
    items = margins.numel()
    grid = (ceil_div(items, VALUES_TILE),)
    launch(_values_kernel, grid, scores, coefficient, margins, items, config.tau, **values_shape(config), num_warps=2)


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
        "BJ": min(32, power_of_two(config.leaf_width)),
    }


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
        x = tile_of(x_ptr, row, start, D_IN, BK)
        w = tile_of(w_ptr, w_row, start, D_IN, BK)
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
    group, row, there = sorted_rows(tile, turn, order_ptr, table_ptr, rows, GROUPS, BM)
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
