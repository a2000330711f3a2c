"""The C++ kernels of conditional matrix multiplication, called through ctypes: fp32 and fp64 on the CPU.

A kernel module of `fastff.ops.conditional_interface`. For inference `PackedLeaves` holds a copy of the weights laid out
for it, in fp32, bf16 or int8.
"""

from __future__ import annotations

import ctypes
import functools

from torch import Tensor

from fastff.config import ACTIVATIONS
from fastff.ops.dense import dense
from fastff.ops.library import SUFFIXES, Pack, call, get_num_threads, pointer
from fastff.ops.native import why_unavailable
from fastff.ops.weights import Leaves

__all__ = ["WEIGHTS", "PackedLeaves", "backward", "forward", "leaves_of", "why_not", "why_unavailable"]


WEIGHTS = {None: 0, "bf16": 1, "int8": 2}  # by the name of a quantisation: enum fastff_weights


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


def leaves_of(w_in: Tensor, w_out: Tensor, activation: str) -> int:
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


def forward(x: Tensor, leaf: Tensor, gate: Tensor, leaves: Leaves, *, activation: str) -> tuple[Tensor, Tensor]:
    """y (rows, out_features) and scores (rows, k, in_rows) of x (rows, in_features), leaf and gate (rows, k)."""
    w_in, _, w_out, _ = leaves
    rows, k = leaf.shape
    y, scores = x.new_empty(rows, w_out.shape[2]), x.new_empty(rows, k, w_in.shape[1])
    kept = dense(*leaves, x, leaf, gate)
    call(
        f"fastff_conditional_forward_{SUFFIXES[x.dtype]}",
        leaves_of(w_in, w_out, activation),
        *map(pointer, kept),
        rows,
        k,
        pointer(y),
        pointer(scores),
        get_num_threads(),
    )
    return y, scores


def backward(
    grad_y: Tensor, x: Tensor, leaf: Tensor, gate: Tensor, leaves: Leaves, scores: Tensor, *, activation: str
) -> tuple[Tensor, ...]:
    """Gradients of x, gate, w_in, b_in, w_out and b_out; an empty tensor for an absent bias."""
    w_in, _, w_out, b_out = leaves
    rows, k = leaf.shape
    given = (x, gate, *leaves)
    grads = [x.new_empty(0 if tensor is None else tensor.shape) for tensor in given]
    kept = dense(w_in, w_out, b_out, x, leaf, gate, grad_y)
    saved = dense(scores)
    call(
        f"fastff_conditional_backward_{SUFFIXES[x.dtype]}",
        leaves_of(w_in, w_out, activation),
        *map(pointer, kept),
        rows,
        k,
        *map(pointer, saved),
        *map(pointer, grads),
        get_num_threads(),
    )
    return tuple(grads)


class PackedLeaves(Pack):
    """A copy of fp32 leaves laid out for inference.

    w_in: (leaves, in_rows, in_features); w_out: (leaves, width, out_features); biases as in `conditional_matmul`.
    quantization: None, "bf16" or "int8". The copy does not follow later changes of the weights.
    """

    of = "conditional_packed"

    def __init__(
        self,
        w_in: Tensor,
        w_out: Tensor,
        *,
        activation: str,
        b_in: Tensor | None = None,
        b_out: Tensor | None = None,
        quantization: str | None = None,
    ) -> None:
        super().__init__()
        self._out_features = w_out.shape[2]
        kept = dense(*(None if t is None else t.detach().float() for t in (w_in, b_in, w_out, b_out)))
        call(
            "fastff_conditional_pack_f32",
            leaves_of(w_in, w_out, activation),
            *map(pointer, kept),
            WEIGHTS[quantization],
            ctypes.byref(self._handle),
        )

    def __call__(self, x: Tensor, leaf: Tensor, gate: Tensor) -> Tensor:
        """y (rows, out_features) of x (rows, in_features), leaf and gate (rows, k); x and gate fp32."""
        rows, k = leaf.shape
        y = x.new_empty(rows, self._out_features)
        kept = dense(x, leaf, gate)
        call("fastff_conditional_infer_f32", self._handle, *map(pointer, kept), rows, k, pointer(y), get_num_threads())
        return y
