"""A dense layer's neurons: their values on rows, what they contribute, their rows in another layer's terms."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastff.models.families import DenseWeights
from fastff.ops.reference import activate

GELU_AS_SILU = 1.702  # gelu(z) is about silu(1.702 z) / 1.702


def hidden_of(dense: DenseWeights, x: Tensor) -> Tensor:
    """Neuron values (rows, neurons) of the dense layer."""
    value: Tensor = activate(F.linear(x, dense.w_in, dense.b_in), dense.activation)
    if dense.v_in is not None:
        value = value * F.linear(x, dense.v_in, dense.v_b)
    return value


def dense_forward(dense: DenseWeights, x: Tensor) -> Tensor:
    """(rows, hidden) to (rows, hidden)."""
    y: Tensor = hidden_of(dense, x) @ dense.w_out
    return y if dense.b_out is None else y + dense.b_out


def contribution(dense: DenseWeights, x: Tensor) -> Tensor:
    """How much each neuron adds to each row: |value| times the norm of its output weights, (rows, neurons)."""
    value: Tensor = hidden_of(dense, x).abs() * dense.w_out.norm(dim=1)
    return value


def neuron_rows(dense: DenseWeights, which: Tensor, activation: str) -> tuple[Tensor, Tensor | None]:
    """Input rows of some neurons, and their second rows if gated, rescaled where `activation` only approximates."""
    w = dense.w_in[which]
    if dense.v_in is None:
        return w, None
    scale = _gate_scale(dense, activation)
    return w * scale, dense.v_in[which] / scale


def neuron_biases(dense: DenseWeights, which: Tensor, activation: str) -> tuple[Tensor, Tensor | None]:
    """Biases alike, zero where the dense layer has none."""
    b = dense.w_in.new_zeros(which.shape) if dense.b_in is None else dense.b_in[which]
    if dense.v_in is None:
        return b, None
    scale = _gate_scale(dense, activation)
    vb = dense.w_in.new_zeros(which.shape) if dense.v_b is None else dense.v_b[which]
    return b * scale, vb / scale


def _gate_scale(dense: DenseWeights, activation: str) -> float:
    return GELU_AS_SILU if activation == "swiglu" and dense.activation.startswith("gelu") else 1.0
