"""Conditional products on a GPU: rows grouped by their leaf, tensor cores for each group, no product thrown away.

The interface is that of every kernel module of ops.conditional_interface.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastff.ops import triton_kernels
from fastff.ops.dense import dense
from fastff.ops.triton_kernels.conditional_plan import plan
from fastff.ops.weights import Leaves

MOST_LEAVES = 4096  # groups of the counting sort


def why_unavailable() -> str | None:
    """The reason why these kernels cannot run on this machine, None if they can."""
    return triton_kernels.why_unavailable()


def why_not(x: Tensor, w_in: Tensor, w_out: Tensor, activation: str) -> str | None:
    """The reason why these kernels cannot take these tensors, None if they can."""
    reason = triton_kernels.why_not_tensor(x)
    if reason is None and w_in.shape[0] > MOST_LEAVES:
        reason = f"backend 'triton' sorts rows by at most {MOST_LEAVES} leaves, these are {w_in.shape[0]}"
    return reason


def forward(x: Tensor, leaf: Tensor, gate: Tensor, leaves: Leaves, *, activation: str) -> tuple[Tensor, Tensor]:
    """y (rows, out_features) and scores (rows, k, in_rows), which the backward needs; sums are in float32."""
    rows, slots = leaf.shape
    if rows == 0 or slots == 0:
        return x.new_zeros(rows, leaves.w_out.shape[2]), x.new_empty(rows, slots, leaves.w_in.shape[1])
    y, scores = _run("forward", (x, leaf, gate, *leaves), activation)
    return y, scores


def backward(
    grad_y: Tensor, x: Tensor, leaf: Tensor, gate: Tensor, leaves: Leaves, scores: Tensor, *, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate, w_in, b_in, w_out, b_out, in their dtype; an empty tensor for an absent bias.

    Leaves that no row uses get exactly zero. Deterministic: sums run in a fixed order, in float32."""
    rows, slots = leaf.shape
    if rows == 0 or slots == 0:
        given = (x, gate, *leaves)
        gx, ggate, gw_in, gb_in, gw_out, gb_out = (x.new_empty(0) if t is None else torch.zeros_like(t) for t in given)
        return gx, ggate, gw_in, gb_in, gw_out, gb_out
    operands = (grad_y, x, leaf, gate, *leaves, scores)
    gx, ggate, gw_in, gb_in, gw_out, gb_out = _run("backward", operands, activation)
    return gx, ggate, gw_in, gb_in, gw_out, gb_out


def _run(kind: str, operands: tuple[Tensor | None, ...], activation: str) -> tuple[Tensor, ...]:
    """One pass, recorded by all that decides what it allocates and launches."""
    from fastff.ops.triton_kernels import conditional_kernels
    from fastff.ops.triton_kernels.launch import replay
    from fastff.ops.triton_kernels.linear import precision_of

    operands = dense(*operands)
    x: Tensor = operands[0]  # type: ignore[assignment]  # or grad_y: of the same rows, dtype and device
    first = 3 if kind == "forward" else 4  # of the leaves' weights
    w_in, _, w_out, _ = _leaves(operands, first)
    slots = operands[first - 1].shape[1]  # type: ignore[union-attr]  # of gate
    features = max(w_in.shape[2], w_out.shape[2])
    chosen = plan(x.shape[0], slots, w_in.shape[0], w_out.shape[1], features, backward=kind == "backward")
    function: Any = getattr(conditional_kernels, kind)
    shapes = tuple(None if tensor is None else tuple(tensor.shape) for tensor in operands)
    key = (function, chosen, shapes, activation, x.dtype, x.device, precision_of(x.dtype))

    def run(*given: Tensor | None) -> tuple[Tensor, ...]:
        arguments = (*given[:first], _leaves(given, first), *given[first + 4 :])
        return triton_kernels.fitting(chosen, lambda fitted: function(*arguments, activation=activation, plan=fitted))

    with triton_kernels.on_device(x):
        return replay(key, run, *operands)


def _leaves(operands: tuple[Tensor | None, ...], first: int) -> Leaves:
    """The weights among the operands of a pass."""
    w_in, b_in, w_out, b_out = operands[first : first + 4]
    assert w_in is not None
    assert w_out is not None
    return Leaves(w_in, b_in, w_out, b_out)
