"""Few rows: one program descends for one row in one tree, several levels fetched ahead, then gathers the outputs.

Nothing is shared between rows, so this form serves every configuration and any number of rows; it is the fastest
while latency, not bandwidth, is the limit. `_descend_kernel` leaves scores, coefficients (gate times activation) and
the leaf; `_collect_kernel` sums coefficients times rows of w_out. With one tree both can run in one launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastff.config import TreeConfig
from fastff.ops.triton_kernels.common import activate, level_of, tanh
from fastff.ops.triton_kernels.launch import launch, new
from fastff.ops.triton_kernels.plan import PerTokenPlan, ceil_div, tau_of
from fastff.ops.weights import Weights


def forward(
    x: Tensor, weights: Weights, *, config: TreeConfig, plan: PerTokenPlan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, leaf, margin, scores of contiguous x (rows, in_features); shapes as in ops.reference."""
    w_in, b_in, w_out, b_out = weights
    rows, trees = x.shape[0], config.trees
    y = new(x, rows, config.out_features)
    leaf = new(x, rows, trees, dtype=torch.int64)
    margin = new(x, rows)
    scores = new(x, rows, trees, config.path_scores)
    node_entries = config.depth if config.node_output else 0
    entries = node_entries + config.leaf_width + 1
    coefficient = new(x, rows, trees, entries, dtype=torch.float32)
    margins = new(x, rows, trees, dtype=torch.float32)
    shape = {
        "D_OUT": config.out_features,
        "TREES": trees,
        "DEPTH": config.depth,
        "NODE_ENTRIES": node_entries,
        "LEAF_WIDTH": config.leaf_width,
        "ENTRIES": entries,
        "BE": plan.block_entries,
        "BN": plan.block_out,
    }
    fused = plan.fused and trees == 1 and config.leaf_in_rows == 1 and entries - 1 <= plan.block_entries
    out = (w_out, b_out, coefficient, margins, leaf, y, margin)
    launch(
        _descend_kernel,
        (rows, trees),
        x,
        w_in,
        b_in,
        scores,
        *out,
        tau_of(config),
        D_IN=config.in_features,
        LEAF_ROWS=config.leaf_in_rows,
        SCORES=config.path_scores,
        ACTIVATION=config.activation,
        GATED=config.gate is not None,
        AHEAD=plan.ahead,
        BJ=plan.block_leaf,
        BD=plan.block_in,
        FUSED=fused,
        **shape,
        num_warps=plan.warps,
    )
    if not fused:
        blocks = ceil_div(config.out_features, plan.block_out)
        launch(_collect_kernel, (rows * blocks,), *out, BLOCKS=blocks, **shape, num_warps=4)
    return y, leaf, margin, scores


@triton.jit
def dots(x_ptr, w_ptr, row, mask, D_IN: tl.constexpr, BD: tl.constexpr, N: tl.constexpr):
    """Products of x with the rows `row` (N,) of w where mask, zero elsewhere."""
    total = tl.zeros((N, BD), tl.float32)
    # x is loaded once for each row of w, in w's own layout: a broadcast would exchange it through shared memory, and
    # the barrier of that exchange would keep the next step's loads from being in flight.
    x_row = x_ptr + (row[:, None] - row[:, None])
    for start in tl.static_range(0, D_IN, BD):
        d = (start + tl.arange(0, BD))[None, :]
        if start + BD <= D_IN:
            x = tl.load(x_row + d)
            w = tl.load(w_ptr + row[:, None] * D_IN + d, mask=mask[:, None], other=0.0)
        else:
            x = tl.load(x_row + d, mask=d < D_IN, other=0.0)
            w = tl.load(w_ptr + row[:, None] * D_IN + d, mask=mask[:, None] & (d < D_IN), other=0.0)
        total += w.to(tl.float32) * x.to(tl.float32)
    return tl.sum(total, 1)


@triton.jit
def w_out_row(e, tree, leaf, DEPTH: tl.constexpr, NODE_ENTRIES: tl.constexpr, LEAF_WIDTH: tl.constexpr):
    """Row of w_out, all trees in one, of path entry e of a row at `leaf` of `tree`."""
    nodes: tl.constexpr = ((1 << DEPTH) - 1) if NODE_ENTRIES > 0 else 0
    level = tl.where(e < NODE_ENTRIES, e, 0)
    node_row = (tl.full(e.shape, 1, tl.int64) << level) - 1 + (leaf >> (DEPTH - level))
    leaf_row = nodes + leaf * LEAF_WIDTH + e - NODE_ENTRIES
    return tree * (nodes + (1 << DEPTH) * LEAF_WIDTH) + tl.where(e < NODE_ENTRIES, node_row, leaf_row)


@triton.jit
def weighted_rows(w_ptr, value, w_row, there, n, D_OUT: tl.constexpr):
    """value (entries,) times columns n of the rows w_row of w, not yet summed: (entries, len(n))."""
    mask = there[:, None] & (n < D_OUT)[None, :]
    return value[:, None] * tl.load(w_ptr + w_row[:, None] * D_OUT + n[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _descend_kernel(
    x_ptr, w_ptr, b_ptr, scores_ptr, w_out_ptr, b_out_ptr, coefficient_ptr, margins_ptr, leaf_ptr, y_ptr, margin_ptr,
    tau,
    D_IN: tl.constexpr, D_OUT: tl.constexpr, TREES: tl.constexpr, DEPTH: tl.constexpr, NODE_ENTRIES: tl.constexpr,
    LEAF_WIDTH: tl.constexpr, LEAF_ROWS: tl.constexpr, ENTRIES: tl.constexpr, SCORES: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, AHEAD: tl.constexpr, BJ: tl.constexpr, BE: tl.constexpr,
    BD: tl.constexpr, BN: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    row, tree = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    item = row * TREES + tree
    nodes: tl.constexpr = (1 << DEPTH) - 1
    # A leaf of one row is one more heap level: it is fetched with the nodes above it.
    single: tl.constexpr = LEAF_ROWS == 1
    levels: tl.constexpr = DEPTH + 1 if single else DEPTH
    tree_rows: tl.constexpr = nodes + (1 << DEPTH) * LEAF_ROWS
    x_row = x_ptr + row * D_IN
    w_tree = w_ptr + tree * tree_rows * D_IN
    scores_item = scores_ptr + item * SCORES
    coefficient_item = coefficient_ptr + item * ENTRIES

    # Fused, the coefficients stay in registers.
    e = tl.arange(0, BE)
    path = tl.zeros((BE,), tl.float32)
    N: tl.constexpr = 1 if AHEAD == 1 else 1 << AHEAD
    n = tl.arange(0, N)
    below = level_of(n, AHEAD)
    prefix = tl.zeros((), tl.int64)
    gate = tl.full((), 1.0, tl.float32)
    margin = tl.full((), float("inf"), tl.float32)
    for first in range(0, levels, AHEAD):
        there = (n < (1 << AHEAD) - 1) & (first + below < levels)
        heap = (tl.full((N,), 1, tl.int64) << (first + below)) - 1 + (prefix << below) + (n + 1 - (1 << below))
        heap = tl.where(there, heap, 0)
        block = dots(x_row, w_tree, heap, there, D_IN, BD, N)
        if b_ptr is not None:
            block += tl.load(b_ptr + tree * tree_rows + heap, mask=there, other=0.0).to(tl.float32)
        local = 0
        for step in tl.static_range(AHEAD):
            level = first + step
            decisions = level < DEPTH
            score = tl.sum(tl.where(n == local, block, 0.0), 0)
            tl.store(scores_item + level, score.to(scores_ptr.dtype.element_ty), mask=level < levels)
            if NODE_ENTRIES > 0 or single:
                entry = tl.where(decisions, level, NODE_ENTRIES)
                wanted = (level < levels) if NODE_ENTRIES > 0 else (level < levels) & (level == DEPTH)
                value = gate * activate(score, ACTIVATION)
                if FUSED:
                    path = tl.where((e == entry) & wanted, value, path)
                else:
                    tl.store(coefficient_item + entry, value, mask=wanted)
            size = tl.abs(score)
            if GATED:
                gate = tl.where(decisions, gate * tanh(size / tau), gate)
            margin = tl.where(decisions & ((size < margin) | (size != size)), size, margin)
            right = ((score > 0) & decisions).to(tl.int32)
            prefix = tl.where(decisions, 2 * prefix + right, prefix)
            local = 2 * local + 1 + right
    if not single:
        for start in range(0, LEAF_WIDTH, BJ):
            j = start + tl.arange(0, BJ)
            there = j < LEAF_WIDTH
            leaf_row = nodes + prefix * LEAF_ROWS + j
            score = dots(x_row, w_tree, leaf_row, there, D_IN, BD, BJ)
            if b_ptr is not None:
                score += tl.load(b_ptr + tree * tree_rows + leaf_row, mask=there, other=0.0).to(tl.float32)
            tl.store(scores_item + DEPTH + j, score.to(scores_ptr.dtype.element_ty), mask=there)
            value = activate(score, ACTIVATION)
            if LEAF_ROWS > LEAF_WIDTH:
                factor = dots(x_row, w_tree, leaf_row + LEAF_WIDTH, there, D_IN, BD, BJ)
                if b_ptr is not None:
                    at = b_ptr + tree * tree_rows + leaf_row + LEAF_WIDTH
                    factor += tl.load(at, mask=there, other=0.0).to(tl.float32)
                tl.store(scores_item + DEPTH + LEAF_WIDTH + j, factor.to(scores_ptr.dtype.element_ty), mask=there)
                value *= factor
            tl.store(coefficient_item + NODE_ENTRIES + j, gate * value, mask=there)
    tl.store(leaf_ptr + item, prefix)
    if FUSED:
        tl.store(margin_ptr + row, margin.to(margin_ptr.dtype.element_ty))
        there = e < NODE_ENTRIES + LEAF_WIDTH
        w_row = w_out_row(e, tree, prefix, DEPTH, NODE_ENTRIES, LEAF_WIDTH)
        for start in tl.static_range(0, D_OUT, BN):
            d = start + tl.arange(0, BN)
            y = tl.sum(weighted_rows(w_out_ptr, path, w_row, there, d, D_OUT), 0)
            if b_out_ptr is not None:
                y += gate * tl.load(b_out_ptr + prefix * D_OUT + d, mask=d < D_OUT, other=0.0).to(tl.float32)
            tl.store(y_ptr + row * D_OUT + d, y.to(y_ptr.dtype.element_ty), mask=d < D_OUT)
    else:
        tl.store(coefficient_item + NODE_ENTRIES + LEAF_WIDTH, gate)
        tl.store(margins_ptr + item, margin)


@triton.jit
def _collect_kernel(
    w_ptr, b_ptr, coefficient_ptr, margins_ptr, leaf_ptr, y_ptr, margin_ptr,
    D_OUT: tl.constexpr, TREES: tl.constexpr, DEPTH: tl.constexpr, NODE_ENTRIES: tl.constexpr,
    LEAF_WIDTH: tl.constexpr, ENTRIES: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A block of y's columns for one row: the sum over trees and path entries of coefficient times row of w_out."""
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    n = block * BN + tl.arange(0, BN)
    total = tl.zeros((BE, BN), tl.float32)
    bias = tl.zeros((BN,), tl.float32)
    for tree in range(TREES):
        item = row * TREES + tree
        wide_tree = tl.zeros((), tl.int64) + tree
        leaf = tl.load(leaf_ptr + item)
        for start in tl.static_range(0, NODE_ENTRIES + LEAF_WIDTH, BE):
            e = start + tl.arange(0, BE)
            there = e < NODE_ENTRIES + LEAF_WIDTH
            value = tl.load(coefficient_ptr + item * ENTRIES + e, mask=there, other=0.0)
            w_row = w_out_row(e, wide_tree, leaf, DEPTH, NODE_ENTRIES, LEAF_WIDTH)
            total += weighted_rows(w_ptr, value, w_row, there, n, D_OUT)
        if b_ptr is not None:
            gate = tl.load(coefficient_ptr + item * ENTRIES + NODE_ENTRIES + LEAF_WIDTH)
            b_row = wide_tree * (1 << DEPTH) + leaf
            bias += gate * tl.load(b_ptr + b_row * D_OUT + n, mask=n < D_OUT, other=0.0).to(tl.float32)
    y = tl.sum(total, 0) + bias
    tl.store(y_ptr + row * D_OUT + n, y.to(y_ptr.dtype.element_ty), mask=n < D_OUT)
    if block == 0:
        margin = tl.full((), float("inf"), tl.float32)
        for tree in range(TREES):
            size = tl.load(margins_ptr + row * TREES + tree)
            margin = tl.where((size < margin) | (size != size), size, margin)
        tl.store(margin_ptr + row, margin.to(margin_ptr.dtype.element_ty))
