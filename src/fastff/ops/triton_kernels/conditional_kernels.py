"""The kernels of conditional products and what launches them. Shapes as in ops.conditional_reference.

All pairs of a row and one of its leaves are sorted by leaf, in blocks of rows whose x stays in the second-level cache;
where pairs are few, every program looks up those of its own leaf instead.
One kernel takes tiles of them from x to outputs, another from grad_y to gradients of x: every pair's output apart. What
a row's pairs gave is added in float32, in the order of its slots: sums have one order and need no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastff.ops.triton_kernels.common import activate, slope
from fastff.ops.triton_kernels.conditional_gradients import weight_gradients
from fastff.ops.triton_kernels.conditional_plan import Plan
from fastff.ops.triton_kernels.launch import apply, launch, new
from fastff.ops.triton_kernels.linear import beyond, precision_of, sorted_rows, tables, tile_of
from fastff.ops.triton_kernels.plan import ceil_div
from fastff.ops.triton_kernels.sort import Groups, group_of, group_pairs, keys_of, look_up
from fastff.ops.weights import Leaves

COMBINED = (8, 256)  # rows and features of a tile that adds up


def forward(
    x: Tensor,
    leaf: Tensor,
    gate: Tensor,
    leaves: Leaves,
    *,
    activation: str,
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    """y (rows, out_features), scores (rows, k, in_rows)."""
    w_in, b_in, w_out, b_out = leaves
    rows, slots = leaf.shape
    chunks = ceil_div(w_out.shape[1], plan.tiles.columns)
    y, scores = new(x, rows, w_out.shape[2]), new(x, rows, slots, w_in.shape[1])
    parts = _parts(y, slots * chunks)
    groups = _group(leaf, w_in.shape[0], plan)
    operands = (x, w_in, b_in, w_out, b_out, gate, scores, parts)
    _on_pairs(_forward_kernel, operands, leaf, leaves, groups, activation, plan)
    _combine(parts, y)
    return y, scores


def backward(
    grad_y: Tensor,
    x: Tensor,
    leaf: Tensor,
    gate: Tensor,
    leaves: Leaves,
    scores: Tensor,
    *,
    activation: str,
    plan: Plan,
) -> tuple[Tensor, ...]:
    """Gradients of x, gate, w_in, b_in, w_out, b_out; an empty tensor for an absent bias."""
    w_in, _, w_out, b_out = leaves
    rows, slots = leaf.shape
    width = w_out.shape[1]
    chunks = ceil_div(width, plan.tiles.columns)
    d_scores, coefficient = new(x, *scores.shape), new(x, rows, slots, width)
    grad_x, d_gate = new(x, *x.shape), new(gate, rows, slots)
    gate_parts = d_gate if chunks == 1 else new(x, rows, slots, chunks, dtype=torch.float32)
    parts = _parts(grad_x, slots * chunks)
    groups = _group(leaf, w_in.shape[0], plan)
    operands = (grad_y, w_in, w_out, b_out, gate, scores, d_scores, coefficient, gate_parts, parts)
    _on_pairs(_backward_kernel, operands, leaf, leaves, groups, activation, plan)
    _combine(parts, grad_x)
    if chunks > 1:
        apply(_add_parts_of_gates, d_gate, gate_parts)
    of_neurons = (d_scores, coefficient, gate)
    return grad_x, d_gate, *weight_gradients(of_neurons, x, grad_y, groups, leaves, plan)


def _parts(out: Tensor, count: int) -> Tensor:
    """What each of `count` parts adds to a row of `out`; `out` itself for one."""
    return out if count == 1 else new(out, out.shape[0], count, out.shape[1])


def _combine(parts: Tensor, out: Tensor) -> None:
    if parts is not out:
        height, width = COMBINED
        rows, features = out.shape
        launch(
            _combine_kernel, (ceil_div(rows, height), ceil_div(features, width)),
            parts, out, rows, D=features, COUNT=parts.shape[1], BM=height, BN=width, num_warps=4,
        )  # fmt: skip


def _add_parts_of_gates(d_gate: Tensor, parts: Tensor) -> None:
    torch.sum(parts, 2, out=d_gate) if d_gate.dtype == parts.dtype else d_gate.copy_(parts.sum(2))


def _group(leaf: Tensor, leaves: int, plan: Plan) -> Groups:
    """All pairs by leaf: sorted, block by block, or to be looked up if they are few."""
    return group_pairs(leaf, level=max(1, (leaves - 1).bit_length()), tile=plan.tiles.rows, blocks=plan.blocks)


def _on_pairs(
    kernel: object,
    operands: tuple[Tensor | None, ...],
    leaf: Tensor,
    leaves: Leaves,
    groups: Groups,
    activation: str,
    plan: Plan,
) -> None:
    """Launch a kernel on the pairs of every leaf, its neurons in chunks."""
    tiles, (_, width, out_features) = plan.tiles, leaves.w_out.shape
    blocks, apart = groups.order.shape
    inner, across, stages = tiles.inner, tiles.outer, tiles.stages
    if leaves.w_in.itemsize > 2:  # float32 is three products: smaller steps, or registers spill
        inner, across, stages = max(16, inner // 4), max(16, min(64, across)), min(3, stages)
    launch(
        kernel, (groups.tiles, blocks, ceil_div(width, tiles.columns)),
        *operands, *tables(groups), apart,
        D_IN=leaves.w_in.shape[2], D_OUT=out_features, SLOTS=leaf.shape[1], GROUPS=groups.groups, FEW=groups.few,
        LEAF_WIDTH=width, WIDTH=tiles.columns, ACTIVATION=activation, BM=tiles.rows, BK=inner, BN=across,
        PRECISION=precision_of(leaves.w_in.dtype), num_warps=tiles.warps, num_stages=stages,
    )  # fmt: skip


@triton.jit
def _combine_kernel(parts_ptr, out_ptr, rows, D: tl.constexpr, COUNT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    # The last rows first: what was written last is still in the cache.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BM + tl.arange(0, BM)
    d = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (row < rows)[:, None] & (d < D)[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for part in tl.static_range(COUNT):
        at = parts_ptr + (row * COUNT + part)[:, None] * D + d[None, :]
        total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row[:, None] * D + d[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pairs_of(order_ptr, table_ptr, apart, GROUPS: tl.constexpr, FEW: tl.constexpr, BM: tl.constexpr):
    """Leaf, numbers and existence of the pairs of this program's tile. FEW: the leaf is GROUPS beyond the last tile."""
    tile, block = tl.program_id(0), tl.program_id(1)
    if FEW > 0:
        key = keys_of(table_ptr, apart, FEW)
        leaf, number = group_of(tile, key, GROUPS, BM)
        begin, end = look_up(key, order_ptr, leaf)
        place = begin + number * BM + tl.arange(0, BM)
        there = place < end
        item = tl.load(order_ptr + place, mask=there, other=0).to(tl.int64)
    else:
        leaf, item, there = sorted_rows(tile, block, order_ptr, table_ptr, apart, GROUPS, BM)
    return leaf.to(tl.int64), item, there


@triton.jit
def _chunk(item, there, leaf, SLOTS: tl.constexpr, LEAF_WIDTH: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of the pairs, neurons of this program's chunk, which exist, and which of both do."""
    neuron = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    exists = neuron < LEAF_WIDTH
    return item // SLOTS, neuron, exists, there[:, None] & exists[None, :]


@triton.jit
def _rows_of(base, first, c, exists, start, D: tl.constexpr, BN: tl.constexpr):
    """Columns start ... start + BN of rows first + c, zero where there are none."""
    d = start + tl.arange(0, BN)
    mask = exists[:, None] & (d < D)[None, :]
    return tl.load(base + (first + c)[:, None] * D + d[None, :], mask=mask, other=0.0)


@triton.jit
def _store_part(acc, parts_ptr, item, there, start, D: tl.constexpr, BN: tl.constexpr):
    d = start + tl.arange(0, BN)
    part = item * tl.num_programs(2) + tl.program_id(2)
    at = parts_ptr + part[:, None] * D + d[None, :]
    tl.store(at, acc.to(parts_ptr.dtype.element_ty), mask=there[:, None] & (d < D)[None, :])


@triton.jit
def _forward_kernel(
    x_ptr, w_in_ptr, b_in_ptr, w_out_ptr, b_out_ptr, gate_ptr, scores_ptr, parts_ptr, order_ptr, table_ptr,
    apart,
    D_IN: tl.constexpr, D_OUT: tl.constexpr, SLOTS: tl.constexpr, GROUPS: tl.constexpr, FEW: tl.constexpr,
    LEAF_WIDTH: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores, activation, gate and this chunk of neurons' part of the output of pairs that have one leaf."""
    if FEW == 0:
        if beyond(tl.program_id(0), tl.program_id(1), table_ptr, GROUPS):
            return
    leaf, item, there = _pairs_of(order_ptr, table_ptr, apart, GROUPS, FEW, BM)
    if FEW > 0:
        if leaf == GROUPS:
            return
    row, neuron, exists, kept = _chunk(item, there, leaf, SLOTS, LEAF_WIDTH, WIDTH)
    swiglu: tl.constexpr = ACTIVATION == "swiglu"
    in_rows: tl.constexpr = LEAF_WIDTH * 2 if swiglu else LEAF_WIDTH
    in_row = leaf * in_rows + tl.where(exists, neuron, 0)
    score = tl.zeros((BM, WIDTH), tl.float32)
    factor = tl.zeros((BM, WIDTH), tl.float32)
    for start in range(0, D_IN, BK):
        x = tile_of(x_ptr, row, start, D_IN, BK)
        score = tl.dot(x, tl.trans(tile_of(w_in_ptr, in_row, start, D_IN, BK)), score, input_precision=PRECISION)
        if swiglu:
            w = tl.trans(tile_of(w_in_ptr, in_row + LEAF_WIDTH, start, D_IN, BK))
            factor = tl.dot(x, w, factor, input_precision=PRECISION)
    if b_in_ptr is not None:
        score += tl.load(b_in_ptr + in_row).to(tl.float32)[None, :]
        if swiglu:
            factor += tl.load(b_in_ptr + in_row + LEAF_WIDTH).to(tl.float32)[None, :]
    dtype = parts_ptr.dtype.element_ty
    at = scores_ptr + item[:, None] * in_rows + neuron[None, :]
    tl.store(at, score.to(dtype), mask=kept)
    value = activate(score, ACTIVATION)
    if swiglu:
        tl.store(at + LEAF_WIDTH, factor.to(dtype), mask=kept)
        value *= factor
    gate = tl.load(gate_ptr + item, mask=there, other=0.0)
    entry = tl.where(kept, value * gate.to(tl.float32)[:, None], 0.0).to(dtype)
    for start in range(0, D_OUT, BN):
        acc = tl.zeros((BM, BN), tl.float32)
        w = _rows_of(w_out_ptr, leaf * LEAF_WIDTH, neuron, exists, start, D_OUT, BN)
        acc = tl.dot(entry, w, acc, input_precision=PRECISION)
        if b_out_ptr is not None:
            if tl.program_id(2) == 0:
                d = start + tl.arange(0, BN)
                bias = tl.load(b_out_ptr + leaf * D_OUT + d, mask=d < D_OUT, other=0.0)
                acc += gate.to(tl.float32)[:, None] * bias.to(tl.float32)[None, :]
        _store_part(acc, parts_ptr, item, there, start, D_OUT, BN)


@triton.jit
def _backward_kernel(
    grad_y_ptr, w_in_ptr, w_out_ptr, b_out_ptr, gate_ptr, scores_ptr, d_scores_ptr, coefficient_ptr, d_gate_ptr,
    parts_ptr, order_ptr, table_ptr,
    apart,
    D_IN: tl.constexpr, D_OUT: tl.constexpr, SLOTS: tl.constexpr, GROUPS: tl.constexpr, FEW: tl.constexpr,
    LEAF_WIDTH: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same pairs backwards: d scores, the forward's coefficients, this chunk's part of d gate and of d x."""
    if FEW == 0:
        if beyond(tl.program_id(0), tl.program_id(1), table_ptr, GROUPS):
            return
    leaf, item, there = _pairs_of(order_ptr, table_ptr, apart, GROUPS, FEW, BM)
    if FEW > 0:
        if leaf == GROUPS:
            return
    row, neuron, exists, kept = _chunk(item, there, leaf, SLOTS, LEAF_WIDTH, WIDTH)
    swiglu: tl.constexpr = ACTIVATION == "swiglu"
    in_rows: tl.constexpr = LEAF_WIDTH * 2 if swiglu else LEAF_WIDTH
    chunk, chunks = tl.program_id(2), tl.num_programs(2)
    out_row = leaf * LEAF_WIDTH + tl.where(exists, neuron, 0)
    d_value = tl.zeros((BM, WIDTH), tl.float32)
    d_gate = tl.zeros((BM,), tl.float32)
    for start in range(0, D_OUT, BK):
        grad = tile_of(grad_y_ptr, row, start, D_OUT, BK)
        w = tl.trans(tile_of(w_out_ptr, out_row, start, D_OUT, BK))
        d_value = tl.dot(grad, w, d_value, input_precision=PRECISION)
        if b_out_ptr is not None:
            d = start + tl.arange(0, BK)
            bias = tl.load(b_out_ptr + leaf * D_OUT + d, mask=d < D_OUT, other=0.0).to(tl.float32)
            d_gate += tl.where(chunk == 0, tl.sum(grad.to(tl.float32) * bias[None, :], 1), 0.0)
    dtype = coefficient_ptr.dtype.element_ty
    place = item[:, None] * in_rows + neuron[None, :]
    score = tl.load(scores_ptr + place, mask=kept, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + item, mask=there, other=0.0).to(tl.float32)[:, None]
    value = activate(score, ACTIVATION)
    d_score = d_value * gate * slope(score, ACTIVATION)
    if swiglu:
        d_factor = tl.where(kept, d_value * gate * value, 0.0).to(dtype)
        factor = tl.load(scores_ptr + place + LEAF_WIDTH, mask=kept, other=0.0).to(tl.float32)
        tl.store(d_scores_ptr + place + LEAF_WIDTH, d_factor, mask=kept)
        d_score *= factor
        value *= factor
    d_scores = tl.where(kept, d_score, 0.0).to(dtype)
    tl.store(d_scores_ptr + place, d_scores, mask=kept)
    tl.store(coefficient_ptr + item[:, None] * LEAF_WIDTH + neuron[None, :], (value * gate).to(dtype), mask=kept)
    d_gate += tl.sum(tl.where(kept, value * d_value, 0.0), 1)
    tl.store(d_gate_ptr + item * chunks + chunk, d_gate.to(d_gate_ptr.dtype.element_ty), mask=there)
    for start in range(0, D_IN, BN):
        acc = tl.zeros((BM, BN), tl.float32)
        w = _rows_of(w_in_ptr, leaf * in_rows, neuron, exists, start, D_IN, BN)
        acc = tl.dot(d_scores, w, acc, input_precision=PRECISION)
        if swiglu:
            w = _rows_of(w_in_ptr, leaf * in_rows + LEAF_WIDTH, neuron, exists, start, D_IN, BN)
            acc = tl.dot(d_factor, w, acc, input_precision=PRECISION)
        _store_part(acc, parts_ptr, item, there, start, D_IN, BN)
