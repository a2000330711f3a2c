"""A handful of rows: every node of a block of levels is scored at once, by a program of its own.

A descent by one program waits for memory once a block and draws on one multiprocessor's bandwidth. Here the nodes of a
block, up to 63, are read by as many programs, most of them in vain, and the next launch follows the decisions: a row
costs one launch a block and one for the output. One tree, leaves of one row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastff.config import TreeConfig
from fastff.ops.triton_kernels.common import activate, level_of, tanh
from fastff.ops.triton_kernels.launch import launch, new
from fastff.ops.triton_kernels.per_token import dots, w_out_row, weighted_rows
from fastff.ops.triton_kernels.plan import SpeculativePlan, ceil_div, power_of_two, tau_of
from fastff.ops.weights import Weights


def forward(
    x: Tensor, weights: Weights, *, config: TreeConfig, plan: SpeculativePlan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, leaf, margin, scores of contiguous x (rows, in_features), for one tree whose leaves are single rows."""
    w_in, b_in, w_out, b_out = weights
    rows, levels = x.shape[0], config.depth + 1
    y = new(x, rows, config.out_features)
    leaf = new(x, rows, 1, dtype=torch.int64)
    margin = new(x, rows)
    scores = new(x, rows, 1, levels)
    blocks = ceil_div(levels, plan.levels)
    seen = new(x, blocks, rows, 2**plan.levels, dtype=torch.float32)
    prefixes = new(x, blocks, rows, dtype=torch.int64)
    for block in range(blocks):
        count = 2 ** min(plan.levels, levels - block * plan.levels) - 1
        launch(
            _speculative_kernel, (rows, count),
            x, w_in, b_in, seen, prefixes, rows, BLOCK=block, D_IN=config.in_features, LEVELS=plan.levels,
            BD=plan.block_in, num_warps=plan.warps,
        )  # fmt: skip
    across = ceil_div(config.out_features, plan.block_out)
    launch(
        _settle_kernel, (rows, across),
        seen, prefixes, w_out, b_out, scores, leaf, margin, y, rows, tau_of(config), BLOCKS=blocks, LEVELS=plan.levels,
        D_OUT=config.out_features, DEPTH=config.depth, NODE_ENTRIES=config.depth if config.node_output else 0,
        ACTIVATION=config.activation, GATED=config.gate is not None, BE=power_of_two(levels),
        BN=plan.block_out, num_warps=4,
    )  # fmt: skip
    return y, leaf, margin, scores


@triton.jit
def _decide(seen_ptr, prefix, LEVELS: tl.constexpr, DECISIONS: tl.constexpr):
    """Prefix after DECISIONS decisions through a block whose scores, in heap order, lie at seen_ptr."""
    n = tl.arange(0, 1 << LEVELS)
    right = tl.load(seen_ptr + n, mask=n < (1 << DECISIONS) - 1, other=0.0) > 0
    # All decisions in one word: following them is then scalar arithmetic, without a reduction a level.
    word = tl.sum(tl.where(right, tl.full(n.shape, 1, tl.int64) << n, 0), 0)
    local = tl.zeros((), tl.int64)
    for _step in tl.static_range(DECISIONS):
        decision = (word >> local) & 1
        local = 2 * local + 1 + decision
        prefix = 2 * prefix + decision
    return prefix


@triton.jit
def _speculative_kernel(
    x_ptr, w_ptr, b_ptr, seen_ptr, prefixes_ptr,
    rows,
    BLOCK: tl.constexpr, D_IN: tl.constexpr, LEVELS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Score of one node of block BLOCK for one row; the first program of a row also leaves the block's prefix."""
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    prefix = tl.zeros((), tl.int64)
    if BLOCK > 0:
        before = (BLOCK - 1) * rows + row
        prefix = _decide(seen_ptr + (before << LEVELS), tl.load(prefixes_ptr + before), LEVELS, LEVELS)
    below = level_of(n, LEVELS)
    heap = (tl.full((), 1, tl.int64) << (BLOCK * LEVELS + below)) - 1 + (prefix << below) + (n + 1 - (1 << below))
    one = tl.zeros((1,), tl.int64)
    score = tl.sum(dots(x_ptr + row * D_IN, w_ptr, heap + one, one == 0, D_IN, BD, 1), 0)
    if b_ptr is not None:
        score += tl.load(b_ptr + heap).to(tl.float32)
    tl.store(seen_ptr + ((BLOCK * rows + row) << LEVELS) + n, score)
    if n == 0:
        tl.store(prefixes_ptr + BLOCK * rows + row, prefix)


@triton.jit
def _product(a, b):
    return a * b


@triton.jit
def _settle_kernel(
    seen_ptr, prefixes_ptr, w_ptr, b_ptr, scores_ptr, leaf_ptr, margin_ptr, y_ptr,
    rows, tau,
    BLOCKS: tl.constexpr, LEVELS: tl.constexpr, D_OUT: tl.constexpr, DEPTH: tl.constexpr, NODE_ENTRIES: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Columns of y for one row; the row's first program also writes its scores, leaf and margin."""
    row = tl.program_id(0).to(tl.int64)
    last = (BLOCKS - 1) * rows + row
    decisions: tl.constexpr = DEPTH - (BLOCKS - 1) * LEVELS
    leaf = _decide(seen_ptr + (last << LEVELS), tl.load(prefixes_ptr + last), LEVELS, decisions)

    level = tl.arange(0, BE)
    there = level <= DEPTH
    level = tl.where(there, level, DEPTH)
    inside = level % LEVELS
    place = (leaf >> (DEPTH - level)) & ((1 << inside) - 1)
    at = seen_ptr + (((level // LEVELS) * rows + row) << LEVELS) + (1 << inside) - 1 + place
    score = tl.load(at)
    size = tl.abs(score)
    decided = level < DEPTH
    value = activate(score, ACTIVATION)
    gate = tl.full((), 1.0, tl.float32)
    if GATED:
        factor = tl.where(decided, tanh(size / tau), 1.0)
        above = (level[None, :] < level[:, None]) & there[None, :]
        value *= tl.reduce(tl.where(above, factor[None, :], 1.0), 1, _product)
        gate = tl.reduce(tl.where(there, factor, 1.0), 0, _product)
    if tl.program_id(1) == 0:
        tl.store(scores_ptr + row * (DEPTH + 1) + level, score.to(scores_ptr.dtype.element_ty), mask=there)
        tl.store(leaf_ptr + row, leaf)
        bad = tl.sum((decided & (size != size)).to(tl.int32), 0) > 0
        least = tl.min(tl.where(decided & (size == size), size, float("inf")), 0)
        tl.store(margin_ptr + row, tl.where(bad, float("nan"), least).to(margin_ptr.dtype.element_ty))

    n = tl.program_id(1) * BN + tl.arange(0, BN)
    entry = level if NODE_ENTRIES > 0 else level * 0
    wanted = there if NODE_ENTRIES > 0 else there & (level == DEPTH)
    w_row = w_out_row(entry, 0, leaf, DEPTH, NODE_ENTRIES, 1)
    y = tl.sum(weighted_rows(w_ptr, value, w_row, wanted, n, D_OUT), 0)
    if b_ptr is not None:
        y += gate * tl.load(b_ptr + leaf * D_OUT + n, mask=n < D_OUT, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * D_OUT + n, y.to(y_ptr.dtype.element_ty), mask=n < D_OUT)
