"""The tensors of a layer, as every backend takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastff.config import TreeConfig
from fastff.errors import ShapeError

HALF = (torch.bfloat16, torch.float16)  # dtypes that the CPU kernels take and compute in fp32


class Leaves(NamedTuple):
    """The weights of leaves behind any router: w_in (leaves, in_rows, in_features), b_in (leaves, in_rows) or None,
    w_out (leaves, width, out_features), b_out (leaves, out_features) or None."""

    w_in: Tensor
    b_in: Tensor | None
    w_out: Tensor
    b_out: Tensor | None


class Weights(NamedTuple):
    """w_in (trees, in_rows, in_features), b_in (trees, in_rows) or None, w_out (trees, out_rows, out_features),
    b_out (trees, leaves, out_features) or None. Gradients of the four have the same form."""

    w_in: Tensor
    b_in: Tensor | None
    w_out: Tensor
    b_out: Tensor | None

    @property
    def present(self) -> list[Tensor]:
        """Those that the layer has."""
        return [tensor for tensor in self if tensor is not None]

    def map(self, change: Callable[[Tensor], Tensor]) -> Weights:
        """The tensors, each changed."""
        w_in, b_in, w_out, b_out = (None if tensor is None else change(tensor) for tensor in self)
        assert w_in is not None
        assert w_out is not None
        return Weights(w_in, b_in, w_out, b_out)

    def check(self, config: TreeConfig) -> None:
        """Raise ShapeError unless every tensor is there, or not, with the shape that `config` asks for."""
        shapes = (config.shape_of_w_in, config.shape_of_b_in, config.shape_of_w_out, config.shape_of_b_out)
        for name, tensor, shape in zip(self._fields, self, shapes, strict=True):
            seen = None if tensor is None else tuple(tensor.shape)
            if seen != shape:
                raise ShapeError(f"{name} {seen} does not match {shape}")
