"""The C++ kernels of conditional matrix multiplication, called through ctypes: fp32 and fp64 on the CPU.

A kernel module of `fastff.ops.conditional`.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from fastff.config import ACTIVATIONS
from fastff.ops.library import SUFFIXES, call, pointer
from fastff.ops.native import why_unavailable

__all__ = ["backward", "forward", "why_not", "why_unavailable"]


class _Leaves(ctypes.Structure):
    """fastff_leaves of csrc/fastff.h."""

    _fields_ = (
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("leaves", ctypes.c_int64),
        ("leaf_width", ctypes.c_int64),
        ("activation", ctypes.c_int32),
    )


@functools.cache
def _c_leaves(in_features: int, out_features: int, leaves: int, width: int, activation: str) -> _Leaves:
    return _Leaves(in_features, out_features, leaves, width, ACTIVATIONS.index(activation))


def _leaves_of(w_in: Tensor, w_out: Tensor, activation: str) -> int:
    """Address of the C struct of leaves with these weights."""
    leaves, width, out_features = w_out.shape
    return ctypes.addressof(_c_leaves(w_in.shape[2], out_features, leaves, width, activation))


def why_not(x: Tensor, w_in: Tensor, w_out: Tensor, activation: str) -> str | None:
    """The reason why this backend cannot take these tensors, None if it can."""
    if x.device.type != "cpu":
        return f"backend 'native' runs on the CPU, x is on {x.device}"
    if x.dtype not in SUFFIXES:
        return f"backend 'native' takes float32 and float64, x is {x.dtype}"
    if activation not in ACTIVATIONS:
        return f"backend 'native' knows the activations {', '.join(ACTIVATIONS)}, not {activation!r}"
    if 0 in w_in.shape or 0 in w_out.shape:
        return f"backend 'native' needs leaves, w_in is {tuple(w_in.shape)} and w_out {tuple(w_out.shape)}"
    return None


def forward(
    x: Tensor,
    leaf: Tensor,
    gate: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """y (rows, out_features) and scores (rows, k, in_rows) of x (rows, in_features), leaf and gate (rows, k)."""
    rows, k = leaf.shape
    y, scores = x.new_empty(rows, w_out.shape[2]), x.new_empty(rows, k, w_in.shape[1])
    kept = [None if t is None else t.contiguous() for t in (w_in, b_in, w_out, b_out, x, leaf, gate)]
    call(
        f"fastff_conditional_forward_{SUFFIXES[x.dtype]}",
        _leaves_of(w_in, w_out, activation),
        *map(pointer, kept),
        rows,
        k,
        pointer(y),
        pointer(scores),
        torch.get_num_threads(),
    )
    return y, scores


def backward(
    grad_y: Tensor,
    x: Tensor,
    leaf: Tensor,
    gate: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    scores: Tensor,
    *,
    activation: str,
) -> tuple[Tensor, ...]:
    """Gradients of x, gate, w_in, b_in, w_out and b_out; an empty tensor for an absent bias."""
    rows, k = leaf.shape
    given = (x, gate, w_in, b_in, w_out, b_out)
    grads = [x.new_empty(0 if tensor is None else tensor.shape) for tensor in given]
    kept = [None if t is None else t.contiguous() for t in (w_in, w_out, b_out, x, leaf, gate, grad_y)]
    saved = scores.contiguous()
    call(
        f"fastff_conditional_backward_{SUFFIXES[x.dtype]}",
        _leaves_of(w_in, w_out, activation),
        *map(pointer, kept),
        rows,
        k,
        pointer(saved),
        *map(pointer, grads),
        torch.get_num_threads(),
    )
    return tuple(grads)
