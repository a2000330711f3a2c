"""The kernels of conditional products and what launches them. Shapes as in ops.conditional_reference.

score    x times the rows of w_in of each row's leaves, then activation and gate (forward)
pull     grad_y times the rows of w_out, then the derivative of activation and gate (backward)
scatter  entries of the leaves' neurons times the rows of a matrix, added over the slots: y, and grad_x
outer    entries times rows of x or grad_y, summed over the rows of a leaf: gradients of the weights
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastff.ops.triton_kernels.common import activate, slope
from fastff.ops.triton_kernels.conditional_plan import Plan
from fastff.ops.triton_kernels.launch import apply, launch, new
from fastff.ops.triton_kernels.linear import beyond, precision_of, sorted_rows, tables, tile_of
from fastff.ops.triton_kernels.plan import ceil_div, power_of_two
from fastff.ops.triton_kernels.sort import Groups, group_rows
from fastff.ops.weights import Leaves


def forward(
    x: Tensor, leaf: Tensor, gate: Tensor, leaves: Leaves, *, activation: str, plan: Plan
) -> tuple[Tensor, Tensor]:
    """y (rows, out_features), scores (rows, k, in_rows)."""
    w_in, b_in, w_out, b_out = leaves
    rows, slots = leaf.shape
    width = w_out.shape[1]
    groups = _group(leaf, w_in.shape[0], plan)
    y, scores = new(x, rows, w_out.shape[2]), new(x, rows, slots, w_in.shape[1])
    coefficient = new(x, rows, slots, width)
    _on_tiles(
        _score_kernel, (x, w_in, b_in, gate, scores, coefficient), groups,
        activation=activation, width=width, features=w_in.shape[2], plan=plan,
    )  # fmt: skip
    _scatter_matmul(coefficient, w_out, groups, y, plan, add=False)
    if b_out is not None:
        _scatter_matmul(gate, b_out, groups, y, plan, add=True)
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
    count, width, _ = w_out.shape
    groups = _group(leaf, count, plan)
    d_scores, coefficient = new(x, *scores.shape), new(x, rows, slots, width)
    parts = new(x, rows, slots, ceil_div(width, plan.tiles.columns), dtype=torch.float32)
    d_gate, grad_x = new(gate, rows, slots), new(x, *x.shape)
    _on_tiles(
        _pull_kernel, (grad_y, w_out, b_out, gate, scores, d_scores, coefficient, parts), groups,
        activation=activation, width=width, features=w_out.shape[2], plan=plan,
    )  # fmt: skip
    _scatter_matmul(d_scores, w_in, groups, grad_x, plan, add=False)
    apply(add_parts_of_gates, d_gate, parts)
    of_neurons = (d_scores, coefficient, gate)
    return grad_x, d_gate, *weight_gradients(of_neurons, x, grad_y, groups, leaves, plan)


def _group(leaf: Tensor, leaves: int, plan: Plan) -> Groups:
    """In every slot, the rows sorted by leaf."""
    level = max(1, (leaves - 1).bit_length())
    return group_rows(leaf, shift=0, level=level, joint=1, tile=plan.tiles.rows, chunk=plan.tiles.rows)


def weight_gradients(
    of_neurons: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    grad_y: Tensor,
    groups: Groups,
    leaves: Leaves,
    plan: Plan,
    *,
    share: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of w_in, b_in, w_out, b_out; an empty tensor for an absent bias.

    of_neurons: d scores (rows, k, in_rows), the forward's coefficients (rows, k, width), gate (rows, k). share: see
    `_outer`."""
    d_scores, coefficient, gate = of_neurons
    w_in, b_in, w_out, b_out = leaves
    grad_w_in = _outer(d_scores, x, groups, new(w_in, *w_in.shape), plan, share=share)
    grad_w_out = _outer(coefficient, grad_y, groups, new(w_out, *w_out.shape), plan, share=share)
    grad_b_in, grad_b_out = new(x, 0), new(x, 0)
    if b_in is not None:
        ones = new(x, x.shape[0], 1)
        apply(_fill_with_one, ones)
        grad_b_in = _outer(d_scores, ones, groups, new(b_in, *b_in.shape), plan, share=share)
    if b_out is not None:
        grad_b_out = _outer(gate, grad_y, groups, new(b_out, *b_out.shape), plan, share=share)
    return grad_w_in, grad_b_in, grad_w_out, grad_b_out


def _fill_with_one(ones: Tensor) -> None:
    ones.fill_(1)


def add_parts_of_gates(d_gate: Tensor, parts: Tensor) -> None:
    torch.sum(parts, 2, out=d_gate) if d_gate.dtype == parts.dtype else d_gate.copy_(parts.sum(2))


def _on_tiles(
    kernel: object,
    operands: tuple[Tensor | None, ...],
    groups: Groups,
    *,
    activation: str,
    width: int,
    features: int,
    plan: Plan,
) -> None:
    """Launch a kernel that takes tiles of rows to the neurons of their leaf, over all slots."""
    tiles = plan.tiles
    launch(
        kernel, (groups.tiles, groups.order.shape[0], ceil_div(width, tiles.columns)),
        *operands, *tables(groups), groups.order.shape[1],
        D=features, SLOTS=groups.order.shape[0], GROUPS=groups.groups, LEAF_WIDTH=width, WIDTH=tiles.columns,
        ACTIVATION=activation, BM=tiles.rows, BK=tiles.inner, PRECISION=precision_of(_dtype_of(operands)),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def _dtype_of(operands: tuple[Tensor | None, ...]) -> torch.dtype:
    """The dtype that all operands share: that of the first."""
    assert operands[0] is not None
    return operands[0].dtype


def _scatter_matmul(entries: Tensor, weight: Tensor, groups: Groups, out: Tensor, plan: Plan, *, add: bool) -> None:
    """out[row] = sum over the slots of entries (rows, k, [columns]) times the leaf's rows of weight (leaves, [columns],
    features). Slots run one after another: sums have one order. add: to what `out` holds."""
    features, leaves = out.shape[1], weight.shape[0]
    count = weight.numel() // (leaves * features)
    tiles, (slots, rows) = plan.scatter, groups.order.shape
    columns = max(16, min(tiles.columns, power_of_two(count)))
    for slot in range(slots):
        for first in range(0, count, columns):
            launch(
                _scatter_matmul_kernel, (ceil_div(features, tiles.outer), groups.tiles),
                entries, weight, out, *tables(groups), rows, slot, first,
                D=features, SLOTS=groups.order.shape[0], GROUPS=groups.groups, COUNT=count, COLUMNS=columns,
                ADD=add or slot > 0 or first > 0, BM=plan.tiles.rows, BN=tiles.outer,
                PRECISION=precision_of(weight.dtype), num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip


def _outer(entries: Tensor, x: Tensor, groups: Groups, grad: Tensor, plan: Plan, *, share: int = 1) -> Tensor:
    """grad[leaf, c] = the sum of entries (rows, k, [columns]) times x over the rows and slots of each leaf.

    share: groups hold pairs, so many of one row of x; 1: rows, in several slots."""
    leaves, features = grad.shape[0], x.shape[1]
    count = grad.numel() // (leaves * features)
    tiles, (slots, rows) = plan.outer, groups.order.shape
    columns, wide = max(16, min(tiles.columns, power_of_two(count))), max(16, min(tiles.outer, power_of_two(features)))
    parts = grad if plan.splits == 1 else new(grad, plan.splits, *grad.shape, dtype=torch.float32)
    launch(
        _outer_kernel, (leaves, ceil_div(features, wide) * ceil_div(count, columns), plan.splits),
        entries, x, parts, *tables(groups), rows, leaves,
        SLOTS=slots, SHARE=share, GROUPS=groups.groups, COUNT=count, D=features,
        SPLITS=plan.splits, CHUNKS=ceil_div(count, columns), COLUMNS=columns, BN=wide, BR=tiles.inner,
        PRECISION=precision_of(x.dtype), num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if plan.splits > 1:
        apply(_add_parts, grad, parts)
    return grad


def _add_parts(grad: Tensor, parts: Tensor) -> None:
    grad.copy_(parts.sum(0))


@triton.jit
def _place_of(
    order_ptr, table_ptr,
    rows,
    GROUPS: tl.constexpr, LEAF_WIDTH: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """What a program works on: leaf, slot, rows and which are there, neurons of this chunk, which pairs of both are."""
    slot = tl.program_id(1)
    leaf, row, there = sorted_rows(tl.program_id(0), slot, order_ptr, table_ptr, rows, GROUPS, BM)
    neuron = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    kept = there[:, None] & (neuron < LEAF_WIDTH)[None, :]
    return leaf.to(tl.int64), slot, row, there, neuron, kept


@triton.jit
def _score_kernel(
    x_ptr, w_in_ptr, b_in_ptr, gate_ptr, scores_ptr, coefficient_ptr, order_ptr, table_ptr,
    rows,
    D: tl.constexpr, SLOTS: tl.constexpr, GROUPS: tl.constexpr, LEAF_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores and coefficients (gate times activation) of one tile of rows that have one leaf in this slot."""
    if beyond(tl.program_id(0), tl.program_id(1), table_ptr, GROUPS):
        return
    leaf, slot, row, there, neuron, kept = _place_of(order_ptr, table_ptr, rows, GROUPS, LEAF_WIDTH, WIDTH, BM)
    swiglu: tl.constexpr = ACTIVATION == "swiglu"
    in_rows: tl.constexpr = LEAF_WIDTH * 2 if swiglu else LEAF_WIDTH
    in_row = leaf * in_rows + tl.where(neuron < LEAF_WIDTH, neuron, 0)
    score = tl.zeros((BM, WIDTH), tl.float32)
    if swiglu:
        factor = tl.zeros((BM, WIDTH), tl.float32)
    for start in range(0, D, BK):
        x = tile_of(x_ptr, row, start, D, BK)
        score = tl.dot(x, tl.trans(tile_of(w_in_ptr, in_row, start, D, BK)), score, input_precision=PRECISION)
        if swiglu:
            w = tl.trans(tile_of(w_in_ptr, in_row + LEAF_WIDTH, start, D, BK))
            factor = tl.dot(x, w, factor, input_precision=PRECISION)
    if b_in_ptr is not None:
        score += tl.load(b_in_ptr + in_row).to(tl.float32)[None, :]
        if swiglu:
            factor += tl.load(b_in_ptr + in_row + LEAF_WIDTH).to(tl.float32)[None, :]
    dtype = coefficient_ptr.dtype.element_ty
    item = row * SLOTS + slot
    at = scores_ptr + item[:, None] * in_rows + neuron[None, :]
    tl.store(at, score.to(dtype), mask=kept)
    value = activate(score, ACTIVATION)
    if swiglu:
        tl.store(at + LEAF_WIDTH, factor.to(dtype), mask=kept)
        value *= factor
    value *= tl.load(gate_ptr + item, mask=there, other=0.0).to(tl.float32)[:, None]
    tl.store(coefficient_ptr + item[:, None] * LEAF_WIDTH + neuron[None, :], value.to(dtype), mask=kept)


@triton.jit
def _pull_kernel(
    grad_y_ptr, w_out_ptr, b_out_ptr, gate_ptr, scores_ptr, d_scores_ptr, coefficient_ptr, parts_ptr, order_ptr,
    table_ptr,
    rows,
    D: tl.constexpr, SLOTS: tl.constexpr, GROUPS: tl.constexpr, LEAF_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same tile backwards: d scores, the forward's coefficients, and this chunk of neurons' part of d gate."""
    if beyond(tl.program_id(0), tl.program_id(1), table_ptr, GROUPS):
        return
    leaf, slot, row, there, neuron, kept = _place_of(order_ptr, table_ptr, rows, GROUPS, LEAF_WIDTH, WIDTH, BM)
    swiglu: tl.constexpr = ACTIVATION == "swiglu"
    in_rows: tl.constexpr = LEAF_WIDTH * 2 if swiglu else LEAF_WIDTH
    chunk, chunks = tl.program_id(2), tl.num_programs(2)
    out_row = leaf * LEAF_WIDTH + tl.where(neuron < LEAF_WIDTH, neuron, 0)
    d_value = tl.zeros((BM, WIDTH), tl.float32)
    d_gate = tl.zeros((BM,), tl.float32)
    for start in range(0, D, BK):
        grad = tile_of(grad_y_ptr, row, start, D, BK)
        w = tl.trans(tile_of(w_out_ptr, out_row, start, D, BK))
        d_value = tl.dot(grad, w, d_value, input_precision=PRECISION)
        if b_out_ptr is not None:
            d = start + tl.arange(0, BK)
            bias = tl.load(b_out_ptr + leaf * D + d, mask=d < D, other=0.0).to(tl.float32)
            d_gate += tl.where(chunk == 0, tl.sum(grad.to(tl.float32) * bias[None, :], 1), 0.0)
    dtype = coefficient_ptr.dtype.element_ty
    item = row * SLOTS + slot
    place = item[:, None] * in_rows + neuron[None, :]
    score = tl.load(scores_ptr + place, mask=kept, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + item, mask=there, other=0.0).to(tl.float32)[:, None]
    value = activate(score, ACTIVATION)
    d_score = d_value * gate * slope(score, ACTIVATION)
    if swiglu:
        factor = tl.load(scores_ptr + place + LEAF_WIDTH, mask=kept, other=0.0).to(tl.float32)
        tl.store(d_scores_ptr + place + LEAF_WIDTH, (d_value * gate * value).to(dtype), mask=kept)
        d_score *= factor
        value *= factor
    tl.store(d_scores_ptr + place, d_score.to(dtype), mask=kept)
    tl.store(coefficient_ptr + item[:, None] * LEAF_WIDTH + neuron[None, :], (value * gate).to(dtype), mask=kept)
    d_gate += tl.sum(tl.where(kept, value * d_value, 0.0), 1)
    tl.store(parts_ptr + item * chunks + chunk, d_gate, mask=there)


@triton.jit(do_not_specialize=["slot", "first"])
def _scatter_matmul_kernel(
    entries_ptr, weight_ptr, out_ptr, order_ptr, table_ptr,
    rows, slot, first,
    D: tl.constexpr, SLOTS: tl.constexpr, GROUPS: tl.constexpr, COUNT: tl.constexpr, COLUMNS: tl.constexpr,
    ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BN features of one tile: its rows' entries times COLUMNS rows of the leaf's matrix, from `first` on."""
    tile, slot = tl.program_id(1), tl.zeros((), tl.int32) + slot
    if beyond(tile, slot, table_ptr, GROUPS):
        return
    leaf, row, there = sorted_rows(tile, slot, order_ptr, table_ptr, rows, GROUPS, BM)
    leaf = leaf.to(tl.int64)
    c = first + tl.arange(0, COLUMNS)
    d = tl.program_id(0) * BN + tl.arange(0, BN)
    wanted, inside = c < COUNT, d < D
    at = entries_ptr + ((row * SLOTS + slot) * COUNT)[:, None] + c[None, :]
    entry = tl.load(at, mask=there[:, None] & wanted[None, :], other=0.0)
    weight_at = weight_ptr + (leaf * COUNT + c)[:, None] * D + d[None, :]
    weight = tl.load(weight_at, mask=wanted[:, None] & inside[None, :], other=0.0)
    target = out_ptr + row[:, None] * D + d[None, :]
    mask = there[:, None] & inside[None, :]
    total = tl.load(target, mask=mask, other=0.0).to(tl.float32) if ADD else tl.zeros((BM, BN), tl.float32)
    total = tl.dot(entry, weight, total, input_precision=PRECISION)
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _outer_kernel(
    entries_ptr, x_ptr, grad_ptr, order_ptr, table_ptr,
    rows, leaves,
    SLOTS: tl.constexpr, SHARE: tl.constexpr, GROUPS: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr,
    SPLITS: tl.constexpr, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns of one leaf times features, summed over the leaf's rows of every slot, SPLITS programs in turn."""
    leaf, split = tl.program_id(0), tl.program_id(2)
    c = (tl.program_id(1) % CHUNKS) * COLUMNS + tl.arange(0, COLUMNS)
    n = (tl.program_id(1) // CHUNKS) * BN + tl.arange(0, BN)
    wanted, inside = c < COUNT, n < D
    total = tl.zeros((COLUMNS, BN), tl.float32)
    for number in range(SLOTS):
        slot = tl.zeros((), tl.int64) + number
        table = table_ptr + slot * 4 * (GROUPS + 1)
        begin, end = tl.load(table + leaf), tl.load(table + leaf + 1)
        for start in range(begin + split * BR, end, SPLITS * BR):
            place = start + tl.arange(0, BR)
            there = place < end
            row = tl.load(order_ptr + slot * rows + place, mask=there, other=0).to(tl.int64)
            at = entries_ptr + ((row * SLOTS + slot) * COUNT)[None, :] + c[:, None]
            entry = tl.load(at, mask=wanted[:, None] & there[None, :], other=0.0)
            x = tl.load(
                x_ptr + (row // SHARE)[:, None] * D + n[None, :], mask=there[:, None] & inside[None, :], other=0.0
            )
            total = tl.dot(entry, x, total, input_precision=PRECISION)
    at = grad_ptr + ((split.to(tl.int64) * leaves + leaf) * COUNT + c)[:, None] * D + n[None, :]
    tl.store(at, total.to(grad_ptr.dtype.element_ty), mask=wanted[:, None] & inside[None, :])
