"""Dense products in 8 and 4 bits by the C++ core: a packed weight matrix, for few rows and for many.

Rows of x are rounded to 8 or 16 bits with one scale each.
"""

from __future__ import annotations

import ctypes
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from fastff.config import ACTIVATIONS
from fastff.errors import ShapeError
from fastff.ops.dense import dense
from fastff.ops.library import call, get_num_threads, library, pointer

__all__ = ["FORMS", "MatrixForm", "PackedMatrix", "packed_bytes"]

# How weights are rounded, in the order of enum fastff_matrix_form: 8 bits with one scale an output row; with a scale to
# every 32 inputs of it in 8 bits, in 4, and in 4 with a minimum beside it; with a scale to every 64 in 8 bits.
MatrixForm = Literal["int8", "int8-groups", "int4", "int4-least", "int8-groups64"]
FORMS: tuple[MatrixForm, ...] = get_args(MatrixForm)

ALIGNMENT = 64  # bytes, of packed weights
BLOCK_BYTES: dict[MatrixForm, int] = {"int8-groups": 34, "int4": 18, "int4-least": 20}


class _Matrix(ctypes.Structure):
    """fastff_matrix of csrc/model/fastff_model.h."""

    _fields_ = (
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("gated", ctypes.c_int32),
        ("form", ctypes.c_int32),
    )


def packed_bytes(out_features: int, in_features: int, *, gated: bool = False, form: MatrixForm = "int8") -> int:
    """Size of a packed matrix; 0 for one that cannot be."""
    matrix = _Matrix(out_features, in_features, gated, FORMS.index(form))
    return int(library().fastff_matrix_bytes(ctypes.addressof(matrix)))


class PackedMatrix:
    """Weights (out_features, in_features) in the core's packed layout.

    gated: the weights are (2 * out_features, in_features), all gates and then all values, and an output is
    silu(gate) * value. `data` holds the packed bytes. Raises ShapeError for weights that are not such a matrix and
    FastffError for NaN or infinite ones.
    """

    def __init__(self, weights: Tensor, *, gated: bool = False, form: MatrixForm = "int8") -> None:
        if weights.dim() != 2:
            raise ShapeError(f"weights {tuple(weights.shape)} are not a matrix")
        self._allocate(*weights.shape, gated=gated, form=form)
        (kept,) = dense(weights.detach().float())
        call("fastff_matrix_pack_f32", self._shape, pointer(kept), pointer(self.data))

    @classmethod
    def of_blocks(cls, blocks: Tensor, *, gated: bool = False, form: MatrixForm) -> Self:
        """From GGUF's blocks (rows, in_features / 32, bytes of a block) uint8, whose numbers and scales are kept."""
        if blocks.dim() != 3 or blocks.dtype != torch.uint8 or blocks.shape[2] != BLOCK_BYTES.get(form):
            raise ShapeError(f"blocks {tuple(blocks.shape)} of {blocks.dtype} are not those of {form}")
        made = cls.__new__(cls)
        made._allocate(blocks.shape[0], 32 * blocks.shape[1], gated=gated, form=form)
        kept = blocks.contiguous()
        call("fastff_matrix_pack_blocks", made._shape, pointer(kept), pointer(made.data))
        return made

    def _allocate(self, rows: int, in_features: int, *, gated: bool, form: MatrixForm) -> None:
        if gated and rows % 2:
            raise ShapeError(f"weights ({rows}, {in_features}) are not a matrix of pairs of rows")
        self.out_features, self.in_features, self.gated = rows // 2 if gated else rows, in_features, gated
        self._matrix = _Matrix(self.out_features, in_features, gated, FORMS.index(form))
        size = int(library().fastff_matrix_bytes(self._shape))
        room = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
        start = -room.data_ptr() % ALIGNMENT
        self.data = room[start : start + size]

    @property
    def _shape(self) -> int:
        return ctypes.addressof(self._matrix)

    def multiply(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        *,
        activation: str = "identity",
        bits: int = 8,
        add_to: Tensor | None = None,
    ) -> Tensor:
        """act(x @ weights.T + bias) of x (rows, in_features) fp32; with add_to (rows, out_features) the sum of both.

        Raises ShapeError for tensors of other shapes or dtypes."""
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ShapeError(f"x {tuple(x.shape)} is not (rows, {self.in_features})")
        expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
            ("x", x, (len(x), self.in_features)),
            ("bias", bias, (self.out_features * (1 + self.gated),)),
            ("add_to", add_to, (len(x), self.out_features)),
        ]
        for name, tensor, shape in expected:
            if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.float32):
                raise ShapeError(f"{name} {tuple(tensor.shape)} of {tensor.dtype} is not {shape} of torch.float32")
        y = (
            x.new_empty(len(x), self.out_features)
            if add_to is None
            else add_to.clone(memory_format=torch.contiguous_format)
        )
        kept = dense(x, bias)
        activation = "swiglu" if self.gated else activation
        call(
            "fastff_matrix_multiply_f32",
            self._shape,
            pointer(self.data),
            pointer(kept[0]),
            len(x),
            pointer(kept[1]),
            ACTIVATIONS.index(activation),
            bits,
            add_to is not None,
            pointer(y),
            get_num_threads(),
        )
        return y
