"""Gradients at conditional cost: `gather_matmul`, an elementwise step, `scatter_matmul`, and a grouped outer product.

d coefficient = gather_matmul(grad_y, w_out);  d score from it, the activation and the gates;
grad_x = scatter_matmul(d score, w_in);  grad_w_in = outer(d score, x);  grad_w_out = outer(coefficient, grad_y).
Sums run over sorted rows in a fixed order, in float32: the result does not depend on scheduling.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastff.config import TreeConfig
from fastff.ops.triton_kernels.common import activate, locate, slope, subtree_column, tanh
from fastff.ops.triton_kernels.grouped import VALUES_TILE, values_shape
from fastff.ops.triton_kernels.launch import apply, launch, new
from fastff.ops.triton_kernels.linear import (
    Matrix,
    columns_of,
    gather_matmul,
    out_entries,
    path_mask,
    precision_of,
    scatter_matmul,
    sort_leaves,
)
from fastff.ops.triton_kernels.plan import BackwardPlan, ceil_div, power_of_two, tau_of
from fastff.ops.triton_kernels.sort import Groups
from fastff.ops.weights import Weights


def backward(
    grad_y: Tensor,
    x: Tensor,
    weights: Weights,
    leaf: Tensor,
    scores: Tensor,
    *,
    config: TreeConfig,
    plan: BackwardPlan,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w_in, b_in, w_out, b_out (empty without the bias), in the dtype of x."""
    w_in, b_in, w_out, b_out = weights
    joint = sort_leaves(leaf, config=config, level=plan.level, joint=plan.joint, tiles=plan.tiles, chunk=plan.chunk)
    single = joint
    if (plan.level, plan.joint) != (plan.outer_level, 1):
        single = sort_leaves(leaf, config=config, level=plan.outer_level, joint=1, tiles=plan.tiles, chunk=plan.chunk)
    out, into = Matrix.of_w_out(config), Matrix.of_w_in(config, nodes=config.node_output or config.gate is not None)
    d_coefficient = new(x, *leaf.shape, out_entries(config), dtype=torch.float32)
    gather_matmul(grad_y, w_out, leaf, joint, d_coefficient, config=config, matrix=out, tiles=plan.tiles)
    if b_out is not None:
        leaves = Matrix.of_b_out(config)
        gather_matmul(grad_y, b_out, leaf, joint, d_coefficient, config=config, matrix=leaves, tiles=plan.tiles)
    d_scores, coefficient = _values_backward(scores, d_coefficient, config=config)

    grad_x = scatter_matmul(d_scores, w_in, leaf, joint, config=config, matrix=into, tiles=plan.tiles)
    grad_w_in = _outer(d_scores, x, leaf, single, w_in, config=config, matrix=into, plan=plan)
    grad_w_out = _outer(coefficient, grad_y, leaf, single, w_out, config=config, matrix=out, plan=plan)
    grad_b_in, grad_b_out = new(x, 0), new(x, 0)
    if b_in is not None:
        ones = new(x, x.shape[0], 1)
        apply(_fill_with_one, ones)
        grad_b_in = _outer(d_scores, ones, leaf, single, b_in, config=config, matrix=into, plan=plan)
    if b_out is not None:
        matrix = Matrix.of_b_out(config)
        grad_b_out = _outer(coefficient, grad_y, leaf, single, b_out, config=config, matrix=matrix, plan=plan)
    return grad_x, grad_w_in, grad_b_in, grad_w_out, grad_b_out


def _values_backward(scores: Tensor, d_coefficient: Tensor, *, config: TreeConfig) -> tuple[Tensor, Tensor]:
    """d scores (rows, trees, path_scores) and the forward's coefficients (rows, trees, out_entries)."""
    rows, trees, _ = scores.shape
    d_scores = new(scores, *scores.shape)
    coefficient = new(scores, rows, trees, out_entries(config))
    gated = config.gate is not None
    gates = new(scores, rows * trees, config.depth, dtype=torch.float32) if gated else None
    grid = (ceil_div(rows * trees, VALUES_TILE),)
    operands = (scores, d_coefficient, d_scores, coefficient, gates)
    launch(_values_backward_kernel, grid, *operands, rows * trees, tau_of(config), **values_shape(config), num_warps=2)
    return d_scores, coefficient


def _outer(
    entries: Tensor,
    x: Tensor,
    leaf: Tensor,
    groups: Groups,
    like: Tensor,
    *,
    config: TreeConfig,
    matrix: Matrix,
    plan: BackwardPlan,
) -> Tensor:
    """Sum over rows of entries times x, for every row of the matrix: the gradient of a weight shaped as `like`."""
    grad = new(like, *like.shape)
    if config.depth and not matrix.nodes and matrix.leaf_first:
        apply(functools.partial(_clear_rows, matrix.leaf_first), grad)  # nodes that no gradient reaches
    width, tiles = x.shape[1], plan.outer_tiles
    block = min(tiles.outer, max(16, power_of_two(width)))
    columns, chunks = columns_of(matrix, config, groups, tiles)
    level = groups.level if matrix.nodes else 0
    above = max(16, power_of_two(level)) if level else 0
    partial = new(x, config.trees, groups.slots, chunks * columns, width, dtype=torch.float32)
    partial_above = new(x, config.trees, groups.chunks, level, width, dtype=torch.float32) if level else None
    across = ceil_div(width, block)
    shape = {
        "D": width, "TREES": config.trees, "DEPTH": config.depth, "LEVEL": groups.level, "GROUPS": groups.groups,
        "COLUMNS": columns, "CHUNKS": chunks, "BN": block, **matrix.shape(),
    }  # fmt: skip
    launch(
        _outer_kernel, (groups.chunks, across * chunks, config.trees),
        entries, x, leaf, grad, partial, partial_above, groups.order, groups.table, x.shape[0], groups.chunks,
        groups.slots, CHUNK=groups.chunk, ANCESTORS=above, BR=tiles.inner, TURNED=plan.outer_turned,
        PRECISION=precision_of(x.dtype), **shape, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    launch(
        _gather_subtrees_kernel, (groups.groups, across * chunks, config.trees),
        grad, partial, groups.table, groups.slots, **shape, num_warps=4,
    )  # fmt: skip
    if level:
        launch(
            _gather_ancestors_kernel, (2**level - 1, across, config.trees),
            grad, partial_above, groups.table, groups.chunks, D=width, LEVEL=level, GROUPS=groups.groups,
            TREE_ROWS=matrix.tree_rows, BN=block, num_warps=4,
        )  # fmt: skip
    return grad


def _clear_rows(count: int, grad: Tensor) -> None:
    grad[:, :count].zero_()


def _fill_with_one(ones: Tensor) -> None:
    ones.fill_(1)


@triton.jit
def _values_backward_kernel(
    scores_ptr, d_coefficient_ptr, d_scores_ptr, coefficient_ptr, gates_ptr,
    items, tau,
    DEPTH: tl.constexpr, NODE_OUTPUT: tl.constexpr, LEAF_WIDTH: tl.constexpr, SCORES: tl.constexpr,
    ENTRIES: tl.constexpr, HAS_B_OUT: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, TILE: tl.constexpr,
    BJ: tl.constexpr,
):  # fmt: skip
    """With c_l the product of the gates above level l and q_l what level l adds to the loss by its coefficient without
    the gate: loss = sum_l c_l q_l, so d gate_l = c_l * h_{l+1}, with h_l = q_l + gate_l * h_{l+1} from the leaf up."""
    item = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there = item < items
    scores = scores_ptr + item * SCORES
    d_scores = d_scores_ptr + item * SCORES
    out = coefficient_ptr + item * ENTRIES
    d_out = d_coefficient_ptr + item * ENTRIES
    gate = tl.full((TILE,), 1.0, tl.float32)
    if GATED:
        for level in tl.static_range(DEPTH):
            tl.store(gates_ptr + item * DEPTH + level, gate, mask=there)
            gate *= tanh(tl.abs(tl.load(scores + level, mask=there, other=0.0).to(tl.float32)) / tau)

    first: tl.constexpr = DEPTH if NODE_OUTPUT else 0
    rest = tl.zeros((TILE,), tl.float32)
    for start in range(0, LEAF_WIDTH, BJ):
        j = start + tl.arange(0, BJ)
        mask = there[:, None] & (j < LEAF_WIDTH)[None, :]
        score = tl.load(scores[:, None] + DEPTH + j[None, :], mask=mask, other=0.0).to(tl.float32)
        d_value = tl.load(d_out[:, None] + first + j[None, :], mask=mask, other=0.0)
        value = activate(score, ACTIVATION)
        d_score = gate[:, None] * d_value * slope(score, ACTIVATION)
        if ACTIVATION == "swiglu":
            factor = tl.load(scores[:, None] + DEPTH + LEAF_WIDTH + j[None, :], mask=mask, other=0.0).to(tl.float32)
            d_factor = gate[:, None] * d_value * value
            at = d_scores[:, None] + DEPTH + LEAF_WIDTH + j[None, :]
            tl.store(at, d_factor.to(d_scores_ptr.dtype.element_ty), mask=mask)
            d_score *= factor
            value *= factor
        tl.store(d_scores[:, None] + DEPTH + j[None, :], d_score.to(d_scores_ptr.dtype.element_ty), mask=mask)
        kept = (gate[:, None] * value).to(coefficient_ptr.dtype.element_ty)
        tl.store(out[:, None] + first + j[None, :], kept, mask=mask)
        rest += tl.sum(tl.where(mask, d_value * value, 0.0), 1)
    if HAS_B_OUT:
        rest += tl.load(d_out + ENTRIES - 1, mask=there, other=0.0)
        tl.store(out + ENTRIES - 1, gate.to(coefficient_ptr.dtype.element_ty), mask=there)

    for step in tl.static_range(DEPTH):
        level = DEPTH - 1 - step
        node_score = tl.load(scores + level, mask=there, other=0.0).to(tl.float32)
        if GATED:
            gate = tl.load(gates_ptr + item * DEPTH + level, mask=there, other=0.0)
        d_node = tl.zeros((TILE,), tl.float32)
        if GATED:
            decision = tanh(tl.abs(node_score) / tau)
            sign = tl.where(node_score > 0, 1.0, tl.where(node_score < 0, -1.0, 0.0))
            d_node += gate * rest * (1.0 - decision * decision) / tau * sign
            rest *= decision
        if NODE_OUTPUT:
            d_out_value = tl.load(d_out + level, mask=there, other=0.0)
            node_value = activate(node_score, ACTIVATION)
            d_node += gate * d_out_value * slope(node_score, ACTIVATION)
            rest += d_out_value * node_value
            tl.store(out + level, (gate * node_value).to(coefficient_ptr.dtype.element_ty), mask=there)
        tl.store(d_scores + level, d_node.to(d_scores_ptr.dtype.element_ty), mask=there)


@triton.jit
def _outer_kernel(
    entries_ptr, x_ptr, leaf_ptr, grad_ptr, partial_ptr, above_ptr, order_ptr, table_ptr,
    rows, max_chunks, slots,
    D: tl.constexpr, TREES: tl.constexpr, DEPTH: tl.constexpr, LEVEL: tl.constexpr, GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, ANCESTORS: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr, HAS_NODES: tl.constexpr,
    LEAF_FIRST: tl.constexpr, LEAF_ROWS: tl.constexpr, LEAF_ENTRY: tl.constexpr, TREE_ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """A chunk of one group's rows times BN features. The only chunk of a group writes its subtree's gradient at once;
    several leave partial sums. The ancestors, shared with other groups, always get partial sums.

    TURNED: the product is made transposed, for matrix units that take at least 64 rows: features are as many."""
    chunk, tree = tl.program_id(0), tl.program_id(2)
    part = tl.program_id(1) % CHUNKS
    n = (tl.program_id(1) // CHUNKS) * BN + tl.arange(0, BN)
    table = table_ptr + tree * 4 * (GROUPS + 1)
    if chunk >= tl.load(table + 2 * (GROUPS + 1) + GROUPS):
        return
    group, begin, end = locate(chunk, table, table + 2 * (GROUPS + 1), GROUPS, CHUNK)
    end = tl.minimum(end, begin + CHUNK)

    SUB: tl.constexpr = DEPTH - LEVEL
    c = part * COLUMNS + tl.arange(0, COLUMNS)
    place_row, entry, shift, place, exists = subtree_column(
        c, group, DEPTH, SUB, HAS_NODES, LEAF_FIRST, LEAF_ROWS, LEAF_ENTRY
    )
    acc = tl.zeros((BN, COLUMNS) if TURNED else (COLUMNS, BN), tl.float32)
    if ANCESTORS > 0:
        a = tl.arange(0, ANCESTORS)
        a_acc = tl.zeros((ANCESTORS, BN), tl.float32)
    for start in range(begin, end, BR):
        at = start + tl.arange(0, BR)
        there = at < end
        row = tl.load(order_ptr + tree.to(tl.int64) * rows + at, mask=there, other=0).to(tl.int64)
        x_at = x_ptr + row[:, None] * D + n[None, :]
        x = tl.load(x_at, mask=there[:, None] & (n < D)[None, :], other=0.0)
        on_path = path_mask(leaf_ptr, row, c * 0, tree, there, shift, place, TREES, SUB, 1) & exists[None, :]
        item = (row * TREES + tree) * ENTRIES
        value = tl.load(entries_ptr + item[:, None] + entry[None, :], mask=on_path, other=0.0)
        if TURNED:
            acc = tl.dot(tl.trans(x), value, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(tl.trans(value), x, acc, input_precision=PRECISION)
        if ANCESTORS > 0:
            a_mask = there[:, None] & (a < LEVEL)[None, :]
            a_value = tl.load(entries_ptr + item[:, None] + a[None, :], mask=a_mask, other=0.0)
            a_acc = tl.dot(tl.trans(a_value), x, a_acc, input_precision=PRECISION)

    inside = (n < D)[None, :]
    if TURNED:
        acc = tl.trans(acc)
    first = tl.load(table + 2 * (GROUPS + 1) + group)
    if tl.load(table + 2 * (GROUPS + 1) + group + 1) - first == 1:
        grad_at = grad_ptr + (tree.to(tl.int64) * TREE_ROWS + place_row)[:, None] * D + n[None, :]
        tl.store(grad_at, acc.to(grad_ptr.dtype.element_ty), mask=exists[:, None] & inside)
    else:
        slot = tree.to(tl.int64) * slots + tl.load(table + 3 * (GROUPS + 1) + group) + chunk - first
        partial_at = partial_ptr + (slot * COLUMNS * CHUNKS + c)[:, None] * D + n[None, :]
        tl.store(partial_at, acc, mask=exists[:, None] & inside)
    if ANCESTORS > 0:
        if part == 0:
            above_slot = tree.to(tl.int64) * max_chunks + chunk
            above_at = above_ptr + (above_slot * LEVEL + a)[:, None] * D + n[None, :]
            tl.store(above_at, a_acc, mask=(a < LEVEL)[:, None] & inside)


@triton.jit
def _gather_subtrees_kernel(
    grad_ptr, partial_ptr, table_ptr,
    slots,
    D: tl.constexpr, TREES: tl.constexpr, DEPTH: tl.constexpr, LEVEL: tl.constexpr, GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNKS: tl.constexpr, BN: tl.constexpr, HAS_NODES: tl.constexpr, LEAF_FIRST: tl.constexpr,
    LEAF_ROWS: tl.constexpr, LEAF_ENTRY: tl.constexpr, TREE_ROWS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Subtrees of groups without rows become zero, those of groups with several chunks the sum of their parts."""
    group, tree = tl.program_id(0), tl.program_id(2)
    table = table_ptr + tree * 4 * (GROUPS + 1)
    chunks = tl.load(table + 2 * (GROUPS + 1) + group + 1) - tl.load(table + 2 * (GROUPS + 1) + group)
    if (chunks == 1) | (group >= (1 << LEVEL)):
        return
    part = tl.program_id(1) % CHUNKS
    n = (tl.program_id(1) // CHUNKS) * BN + tl.arange(0, BN)
    c = part * COLUMNS + tl.arange(0, COLUMNS)
    row, _entry, _shift, _place, exists = subtree_column(
        c, group, DEPTH, DEPTH - LEVEL, HAS_NODES, LEAF_FIRST, LEAF_ROWS, LEAF_ENTRY
    )
    mask = exists[:, None] & (n < D)[None, :]
    slot = tree.to(tl.int64) * slots + tl.load(table + 3 * (GROUPS + 1) + group)
    total = tl.zeros((COLUMNS, BN), tl.float32)
    for chunk in range(chunks):
        partial_at = partial_ptr + ((slot + chunk) * COLUMNS * CHUNKS + c)[:, None] * D + n[None, :]
        total += tl.load(partial_at, mask=mask, other=0.0)
    at = grad_ptr + (tree.to(tl.int64) * TREE_ROWS + row)[:, None] * D + n[None, :]
    tl.store(at, total.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gather_ancestors_kernel(
    grad_ptr, above_ptr, table_ptr,
    max_chunks,
    D: tl.constexpr, LEVEL: tl.constexpr, GROUPS: tl.constexpr, TREE_ROWS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A node above the groups: the sum over the chunks of all groups below it, which are neighbours."""
    node, tree = tl.program_id(0), tl.program_id(2)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    level = 0
    for bound in tl.static_range(1, LEVEL):
        level += (node + 1 >= (1 << bound)).to(tl.int32)
    place = node + 1 - (1 << level)
    table = table_ptr + tree * 4 * (GROUPS + 1) + 2 * (GROUPS + 1)
    first = tl.load(table + (place << (LEVEL - level)))
    last = tl.load(table + ((place + 1) << (LEVEL - level)))
    total = tl.zeros((16, BN), tl.float32)
    for start in range(first, last, 16):
        chunk = start + tl.arange(0, 16)
        slot = (tree.to(tl.int64) * max_chunks + chunk) * LEVEL + level
        total += tl.load(
            above_ptr + slot[:, None] * D + n[None, :], mask=(chunk < last)[:, None] & (n < D)[None, :], other=0.0
        )
    at = grad_ptr + (tree.to(tl.int64) * TREE_ROWS + node) * D + n
    tl.store(at, tl.sum(total, 0).to(grad_ptr.dtype.element_ty), mask=n < D)
