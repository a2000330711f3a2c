"""Many rows of layers with wide leaves, grouped until all rows of a group share their leaves: one kernel a pass.

Leaf scores, their activation and gate, and the output in one go: nothing but the scores, which the backward needs,
travels through memory, and no product is made that is thrown away.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastff.config import TreeConfig
from fastff.ops.triton_kernels.common import activate, prefix_of, tanh
from fastff.ops.triton_kernels.launch import launch, new
from fastff.ops.triton_kernels.linear import (
    Matrix,
    ancestor_column,
    ancestors_of,
    beyond,
    precision_of,
    sorted_rows,
    tables,
    tile_of,
)
from fastff.ops.triton_kernels.plan import Tiles, ceil_div, leaf_columns, tau_of
from fastff.ops.triton_kernels.sort import Groups
from fastff.ops.weights import Weights


def leaves(
    x: Tensor,
    weights: Weights,
    scores: Tensor,
    margins: Tensor,
    groups: Groups,
    *,
    config: TreeConfig,
    tiles: Tiles,
) -> Tensor:
    """y (rows, out_features); fills the leaves' part of scores (rows, trees, path_scores), and margins (rows,).

    groups: by all decisions of `groups.joint` trees. Passes run one after another, each adding to the last.
    """
    y = new(x, x.shape[0], config.out_features)
    outputs = Matrix.of_w_out(config)
    for pass_number in range(ceil_div(config.trees, groups.joint)):
        launch(
            _leaves_kernel, (groups.tiles,),
            x, *weights, scores, margins, y, *tables(groups), x.shape[0], pass_number, tau_of(config),
            D_IN=config.in_features, D_OUT=config.out_features, TREES=config.trees, DEPTH=config.depth,
            JOINT=groups.joint, GROUPS=groups.groups, LEAF_WIDTH=config.leaf_width,
            WIDTH=leaf_columns(config, groups.joint) // groups.joint, NODES=config.nodes, LEAF_ROWS=config.leaf_in_rows,
            IN_ROWS=config.in_rows, OUT_FIRST=outputs.leaf_first, OUT_ROWS=config.out_rows,
            ANCESTORS=ancestors_of(outputs, groups), SCORES=config.path_scores, ACTIVATION=config.activation,
            GATED=config.gate is not None, ACCUMULATE=pass_number > 0, BM=tiles.rows, BK=tiles.inner, BN=tiles.outer,
            PRECISION=precision_of(x.dtype), num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["pass_number"])
def _leaves_kernel(
    x_ptr, w_in_ptr, b_in_ptr, w_out_ptr, b_out_ptr, scores_ptr, margins_ptr, y_ptr, order_ptr, table_ptr,
    rows, pass_number, tau,
    D_IN: tl.constexpr, D_OUT: tl.constexpr, TREES: tl.constexpr, DEPTH: tl.constexpr, JOINT: tl.constexpr,
    GROUPS: tl.constexpr, LEAF_WIDTH: tl.constexpr, WIDTH: tl.constexpr, NODES: tl.constexpr, LEAF_ROWS: tl.constexpr,
    IN_ROWS: tl.constexpr, OUT_FIRST: tl.constexpr, OUT_ROWS: tl.constexpr, ANCESTORS: tl.constexpr,
    SCORES: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, ACCUMULATE: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows that share their leaves in JOINT trees; WIDTH columns for the LEAF_WIDTH neurons of each."""
    tile = tl.program_id(0)
    pass_number = tl.zeros((), tl.int32) + pass_number
    if beyond(tile, pass_number, table_ptr, GROUPS):
        return
    group, row, there = sorted_rows(tile, pass_number, order_ptr, table_ptr, rows, GROUPS, BM)

    c = tl.arange(0, WIDTH * JOINT)
    joint, neuron = c // WIDTH, c % WIDTH
    tree = pass_number * JOINT + joint
    exists = (neuron < LEAF_WIDTH) & (tree < TREES)
    leaf = prefix_of(group, joint, DEPTH, JOINT).to(tl.int64)
    in_row = tl.where(exists, tree.to(tl.int64) * IN_ROWS + NODES + leaf * LEAF_ROWS + neuron, 0)
    out_row = tl.where(exists, tree.to(tl.int64) * OUT_ROWS + OUT_FIRST + leaf * LEAF_WIDTH + neuron, 0)
    swiglu: tl.constexpr = ACTIVATION == "swiglu"
    factor_row = tl.where(exists, in_row + LEAF_WIDTH, 0)
    score = tl.zeros((BM, WIDTH * JOINT), tl.float32)
    if swiglu:
        factor = tl.zeros((BM, WIDTH * JOINT), tl.float32)
    for start in range(0, D_IN, BK):
        x = tile_of(x_ptr, row, start, D_IN, BK)
        score = tl.dot(x, tl.trans(tile_of(w_in_ptr, in_row, start, D_IN, BK)), score, input_precision=PRECISION)
        if swiglu:
            w = tl.trans(tile_of(w_in_ptr, factor_row, start, D_IN, BK))
            factor = tl.dot(x, w, factor, input_precision=PRECISION)
    if b_in_ptr is not None:
        score += tl.load(b_in_ptr + in_row).to(tl.float32)[None, :]
        if swiglu:
            factor += tl.load(b_in_ptr + factor_row).to(tl.float32)[None, :]

    dtype = y_ptr.dtype.element_ty
    kept = there[:, None] & exists[None, :]
    score_at = scores_ptr + (row[:, None] * TREES + tree[None, :]) * SCORES + DEPTH + neuron[None, :]
    tl.store(score_at, score.to(dtype), mask=kept)
    value = activate(score, ACTIVATION)
    if swiglu:
        tl.store(score_at + LEAF_WIDTH, factor.to(dtype), mask=kept)
        value *= factor

    # The decisions that led here: margins, gates, and the nodes' own neurons.
    if ANCESTORS > 0:
        a = tl.arange(0, ANCESTORS)
        _a_tree, a_row, _a_entry, a_exists = ancestor_column(a, group, pass_number, DEPTH, JOINT, TREES, OUT_ROWS)
        above = tl.zeros((BM, ANCESTORS), tl.float32)
    if b_out_ptr is not None:
        j = tl.arange(0, 16)
        b_tree = pass_number * JOINT + j
        b_leaf = prefix_of(group, tl.minimum(j, JOINT - 1), DEPTH, JOINT).to(tl.int64)
        b_exists = (j < JOINT) & (b_tree < TREES)
        b_row = tl.where(b_exists, b_tree.to(tl.int64) * (1 << DEPTH) + b_leaf, 0)
        gates = tl.zeros((BM, 16), tl.float32)
    margin = tl.full((BM,), float("inf"), tl.float32)
    if ACCUMULATE:
        margin = tl.load(margins_ptr + row, mask=there, other=0.0).to(tl.float32)
    for other in tl.static_range(JOINT):
        item = row * TREES + pass_number * JOINT + other
        wanted = there & (pass_number * JOINT + other < TREES)
        gate = tl.full((BM,), 1.0, tl.float32)
        for level in tl.static_range(DEPTH):
            node = tl.load(scores_ptr + item * SCORES + level, mask=wanted, other=float("inf")).to(tl.float32)
            if ANCESTORS > 0:
                here = tl.arange(0, ANCESTORS) == other * DEPTH + level
                above = tl.where(here[None, :] & wanted[:, None], (gate * activate(node, ACTIVATION))[:, None], above)
            size = tl.abs(node)
            margin = tl.where((size < margin) | (size != size), size, margin)
            if GATED:
                gate *= tanh(size / tau)
        if GATED:
            value = tl.where((joint == other)[None, :], value * gate[:, None], value)
        if b_out_ptr is not None:
            gates = tl.where((j == other)[None, :] & wanted[:, None], gate[:, None], gates)

    tl.store(margins_ptr + row, margin.to(dtype), mask=there)
    values = tl.where(exists[None, :], value, 0.0).to(dtype)
    if ANCESTORS > 0:
        above_values = tl.where(a_exists[None, :], above, 0.0).to(dtype)
    if b_out_ptr is not None:
        leaf_gates = gates.to(dtype)
    for start in range(0, D_OUT, BN):
        d = start + tl.arange(0, BN)
        at = y_ptr + row[:, None] * D_OUT + d[None, :]
        mask = there[:, None] & (d < D_OUT)[None, :]
        acc = tl.load(at, mask=mask, other=0.0).to(tl.float32) if ACCUMULATE else tl.zeros((BM, BN), tl.float32)
        acc = tl.dot(values, tile_of(w_out_ptr, out_row, start, D_OUT, BN), acc, input_precision=PRECISION)
        if ANCESTORS > 0:
            acc = tl.dot(above_values, tile_of(w_out_ptr, a_row, start, D_OUT, BN), acc, input_precision=PRECISION)
        if b_out_ptr is not None:
            acc = tl.dot(leaf_gates, tile_of(b_out_ptr, b_row, start, D_OUT, BN), acc, input_precision=PRECISION)
        tl.store(at, acc.to(dtype), mask=mask)
