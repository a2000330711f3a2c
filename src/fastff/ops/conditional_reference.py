"""The truth of conditional matrix multiplication: pure PyTorch in the dtype it is given, differentiable by autograd.

Shapes, rows flattened to one dimension:
x (rows, in_features); leaf (rows, k) int64; gate (rows, k); the leaves' weights as in `weights.Leaves`.
in_rows is width, or for swiglu 2 * width: all gate rows of a leaf, then all value rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastff.ops.reference import activate
from fastff.ops.weights import Leaves


def forward(x: Tensor, leaf: Tensor, gate: Tensor, leaves: Leaves, *, activation: str) -> Tensor:
    """y (rows, out_features), by gathering the weights of every leaf that a row chose."""
    w_in, b_in, w_out, b_out = leaves
    scores = torch.einsum("ri,rkni->rkn", x, w_in[leaf])
    if b_in is not None:
        scores = scores + b_in[leaf]
    value = gate.unsqueeze(-1) * activate(scores, activation)
    y = torch.einsum("rkw,rkwo->ro", value, w_out[leaf])
    if b_out is not None:
        y = y + torch.einsum("rk,rko->ro", gate, b_out[leaf])
    return y
