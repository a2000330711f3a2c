"""Modules of PyTorch in the native engine's terms: projections, norms and every kind of feedforward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastff.conditional import ConditionalFeedforward
from fastff.config import ACTIVATIONS, GATES
from fastff.engine import conditional_layers
from fastff.engine.native_file import StoredTensor
from fastff.engine.smoothing import smoothing
from fastff.errors import CheckpointError
from fastff.layers import FFF
from fastff.models.feedforward import GATED_ACTIVATIONS, ConvertedFeedforward, DenseFeedforward
from fastff.ops.native_linear import MatrixForm

Tensors = dict[str, StoredTensor]
Maxima = Mapping[nn.Module, Tensor]  # of the channels before a linear layer; those without are not smoothed
Feedforward = FFF | ConditionalFeedforward | ConvertedFeedforward | DenseFeedforward


def projections(
    up: Any, down: Any, activation: str, to: str, maxima: Maxima, tensors: Tensors, *, form: MatrixForm = "int8"
) -> dict[str, Any]:
    """Adds two linear layers around an activation, the first of twice as many rows where it has gates."""
    gated = up.out_features == 2 * down.in_features
    if (gated or activation in GATED_ACTIVATIONS) and activation not in ("swiglu", "gelu"):
        raise CheckpointError(f"gates of kind {activation!r} are not among the engine's: expected 'swiglu' or 'gelu'")
    tensors |= dense_tensors(f"{to}up", up, gated=gated, maxima=maxima, form=form)
    tensors |= dense_tensors(f"{to}down", down, form=form)
    return {"neurons": down.in_features, "activation": ACTIVATIONS.index(activation), "gated": gated}


def feedforward(
    module: nn.Module | None, to: str, maxima: Maxima, tensors: Tensors, *, form: MatrixForm = "int8"
) -> dict[str, Any]:
    """Adds the tensors of a feedforward of fastff's, or of none; returns its description
    (`csrc/model/feedforward.h`)."""
    settings: dict[str, Any] = {"neurons": 0, "activation": 0}
    if isinstance(module, ConvertedFeedforward):
        settings = feedforward(module.layer, to, maxima, tensors, form=form)
        if module.shared is not None:
            settings |= feedforward(module.shared, to, maxima, tensors, form=form)
        tensors[f"{to}conditional.bias"] = stored(module.bias)
    elif isinstance(module, DenseFeedforward):
        settings = projections(module.linear_in, module.linear_out, module.activation, to, maxima, tensors, form=form)
    elif isinstance(module, FFF) and module.router is not None:
        settings = feedforward(module.joined(), to, maxima, tensors, form=form)
    elif isinstance(module, FFF):
        settings["trees"] = trees(module, f"{to}conditional.", tensors)
    elif isinstance(module, ConditionalFeedforward) and form == "int4" and conditional_layers.takes_4_bits(module):
        settings["grouped"] = conditional_layers.settings(module)
        tensors |= dict(conditional_layers.grouped_tensors(module, f"{to}conditional.", form))
    elif isinstance(module, ConditionalFeedforward):
        settings["routed"] = conditional_layers.settings(module)
        tensors |= dict(conditional_layers.tensors(module, f"{to}conditional."))
    return settings


def trees(layer: FFF, to: str, tensors: Tensors) -> dict[str, Any]:
    c = layer.config
    parts = {name: getattr(layer, name) for name in ("w_in", "b_in", "w_out", "b_out")}
    tensors |= {to + name: stored(part) for name, part in parts.items() if part is not None}
    settings = {name: getattr(c, name) for name in ("trees", "depth", "leaf_width", "node_output", "tau")}
    gate = 0 if c.gate is None else 1 + GATES.index(c.gate)
    return settings | {"activation": ACTIVATIONS.index(c.activation), "gate": gate}


def stored(tensor: Tensor) -> StoredTensor:
    kept = tensor.detach()
    return StoredTensor(tuple(kept.shape), lambda: kept)


def norm_tensors(to: str, norm: Any) -> Tensors:
    parts = {"weight": norm.weight, "bias": norm.bias}
    return {f"{to}.{name}": stored(part) for name, part in parts.items() if part is not None}


def dense_tensors(
    to: str, *layers: Any, gated: bool = False, maxima: Maxima | None = None, form: MatrixForm = "int8"
) -> Tensors:
    """The projections one after another as one matrix; smoothed where their input's maxima are known."""
    for layer in layers:
        if type(layer) is not nn.Linear:
            raise CheckpointError(f"{to} is made of a {type(layer).__name__}, expected a Linear")
    rows, inputs = sum(layer.out_features for layer in layers), layers[0].in_features
    weights = [layer.weight.detach() for layer in layers]
    largest = (maxima or {}).get(layers[0])
    factors = None if largest is None else smoothing(largest, weights)
    made = {to: StoredTensor((rows // (1 + gated), inputs), lambda: _joined(weights, factors), form, gated)}
    if factors is not None:
        made[f"{to}.factors"] = stored(1 / factors)
    biases = [layer.bias for layer in layers]
    if any(bias is not None for bias in biases):
        parts = [
            torch.zeros(layer.out_features) if bias is None else bias.detach()
            for layer, bias in zip(layers, biases, strict=True)
        ]
        made[f"{to}.bias"] = stored(torch.cat(parts))
    return made


def _joined(weights: list[Tensor], factors: Tensor | None) -> Tensor:
    joined = torch.cat(weights)
    return joined if factors is None else joined * factors
