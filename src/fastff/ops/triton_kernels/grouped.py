"""Many rows: trees cut into blocks of levels, rows sorted between blocks, every product a tensor-core GEMM.

route.py multiplies x by a block of nodes and takes the decisions inside it: scores and leaf. Then either the two linear
kernels of linear.py, with `_values_kernel` between them to make scores into coefficients; or, where groups share their
leaves, one kernel a pass that does it all (leaves.py).

Weights must be finite: a row multiplies the neighbours of its path by zero, and zero times infinity is NaN.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastff.config import TreeConfig
from fastff.ops.triton_kernels.common import activate, tanh
from fastff.ops.triton_kernels.launch import apply, launch, new
from fastff.ops.triton_kernels.leaves import leaves
from fastff.ops.triton_kernels.linear import Matrix, gather_matmul, out_entries, scatter_matmul, sort_leaves
from fastff.ops.triton_kernels.plan import GroupedPlan, ceil_div, power_of_two, tau_of
from fastff.ops.triton_kernels.route import route
from fastff.ops.triton_kernels.sort import group_rows
from fastff.ops.weights import Weights


def forward(
    x: Tensor, weights: Weights, *, config: TreeConfig, plan: GroupedPlan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, leaf, margin, scores of contiguous x (rows, in_features); shapes as in ops.reference."""
    w_in, b_in, w_out, b_out = weights
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
        last = plan.leaf_routed and stage == plan.stages[-1]
        route(x, weights, leaf, scores, groups, config=config, stage=stage, tiles=plan.tiles,
              coefficient=coefficient if last else None, margins=margins if last else None)  # fmt: skip
    if not plan.stages:
        apply(Tensor.zero_, leaf)
    if groups is None or (groups.level, groups.joint) != (plan.level, plan.joint):
        groups = sort_leaves(leaf, config=config, level=plan.level, joint=plan.joint, tiles=plan.tiles, chunk=1)
    if coefficient is None:
        y = leaves(x, weights, scores, margins, groups, config=config, tiles=plan.tiles)
    else:
        if not plan.leaf_routed:
            matrix = Matrix.of_w_in(config, nodes=False)
            gather_matmul(x, w_in, leaf, groups, scores, config=config, matrix=matrix, tiles=plan.tiles, bias=b_in)
            _values(scores, coefficient, margins, config=config)
        y = scatter_matmul(
            coefficient, w_out, leaf, groups, config=config, matrix=Matrix.of_w_out(config), tiles=plan.tiles
        )
        if b_out is not None:
            matrix = Matrix.of_b_out(config)
            scatter_matmul(coefficient, b_out, leaf, groups, config=config, matrix=matrix, tiles=plan.tiles, into=y)
    margin = margins
    if apart:
        margin = new(x, rows)
        apply(_least, margins, margin)
    return y, leaf, margin, scores


def _least(margins: Tensor, margin: Tensor) -> None:
    torch.amin(margins, 1, out=margin)


def _values(scores: Tensor, coefficient: Tensor, margins: Tensor, *, config: TreeConfig) -> None:
    """Fill coefficient (rows, trees, out_entries) and margins (rows, trees) from path scores."""
    items = margins.numel()
    grid = (ceil_div(items, VALUES_TILE),)
    launch(
        _values_kernel, grid, scores, coefficient, margins, items, tau_of(config), **values_shape(config), num_warps=2
    )


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
def _values_kernel(
    scores_ptr, coefficient_ptr, margins_ptr,
    items, tau,
    DEPTH: tl.constexpr, NODE_OUTPUT: tl.constexpr, LEAF_WIDTH: tl.constexpr, SCORES: tl.constexpr,
    ENTRIES: tl.constexpr, HAS_B_OUT: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, TILE: tl.constexpr,
    BJ: tl.constexpr,
):  # fmt: skip
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
