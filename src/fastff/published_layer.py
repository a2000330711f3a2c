"""State dicts of one layer as published: pbelcak/UltraFastBERT and pbelcak/fastfeedforward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastff.errors import CheckpointError


def read_published(state: Mapping[str, Tensor], depth: int | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of FFF and its weights by name, views of the state's tensors where possible. depth: decisions, needed
    where the state does not hold it. Raises CheckpointError naming a missing, extra or misshapen tensor, or an unknown
    layout."""
    if "linear_in.weight" in state:
        return _read_ultrafastbert(state, depth)
    if "w1s" in state and "w2s" in state:
        return _read_fastfeedforward(state, depth)
    raise CheckpointError(f"unknown layout: keys {sorted(state)} hold neither linear_in.weight nor w1s and w2s")


def _read_ultrafastbert(state: Mapping[str, Tensor], depth: int | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    _check_keys(state, {"linear_in.weight", "linear_out.weight"}, {"linear_in.bias"})
    if depth is None:
        raise CheckpointError("the UltraFastBERT layout does not hold its depth: pass depth=")
    w_in, w_out = state["linear_in.weight"], state["linear_out.weight"]
    per_tree = 2 ** (depth + 1) - 1
    rows, in_features = _matrix("linear_in.weight", w_in)
    out_features, _ = _matrix("linear_out.weight", w_out)
    if rows % per_tree:
        raise CheckpointError(f"linear_in.weight has {rows} rows, expected a multiple of {per_tree} for depth {depth}")
    _check_shape("linear_out.weight", w_out, (out_features, rows))
    trees = rows // per_tree
    weights = {
        "w_in": w_in.reshape(trees, per_tree, in_features),
        "w_out": w_out.t().reshape(trees, per_tree, out_features),
    }
    bias = state.get("linear_in.bias")
    if bias is not None:
        _check_shape("linear_in.bias", bias, (rows,))
        weights["b_in"] = bias.reshape(trees, per_tree)
    arguments = {"in_features": in_features, "out_features": out_features, "depth": depth, "trees": trees}
    return {**arguments, "bias": bias is not None}, weights


def _read_fastfeedforward(state: Mapping[str, Tensor], depth: int | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    counters = {"node_usage", "leaf_usage", "depth"}
    _check_keys(state, {"w1s", "b1s", "w2s", "b2s"}, {"node_weights", "node_biases", *counters})
    w1s, w2s = state["w1s"], state["w2s"]
    if w1s.dim() != 3 or w2s.dim() != 3:
        raise CheckpointError(f"w1s {tuple(w1s.shape)} and w2s {tuple(w2s.shape)} need three dimensions each")
    leaves, in_features, leaf_width = w1s.shape
    if "depth" in state:
        stored = int(state["depth"].item())
        if depth not in (None, stored):
            raise CheckpointError(f"depth {depth} does not match the stored depth {stored}")
        depth = stored
    elif depth is None:
        depth = leaves.bit_length() - 1
    nodes = 2**depth - 1
    out_features = w2s.shape[2]
    _check_shape("w1s", w1s, (2**depth, in_features, leaf_width))
    _check_shape("w2s", w2s, (leaves, leaf_width, out_features))
    _check_shape("b1s", state["b1s"], (leaves, leaf_width))
    _check_shape("b2s", state["b2s"], (leaves, out_features))
    node_weights = _node_tensor(state, "node_weights", (nodes, in_features), w1s)
    node_biases = _node_tensor(state, "node_biases", (nodes, 1), w1s)
    weights = {
        "w_in": torch.cat((node_weights, w1s.transpose(1, 2).reshape(-1, in_features))).unsqueeze(0),
        "b_in": torch.cat((node_biases.flatten(), state["b1s"].flatten())).unsqueeze(0),
        "w_out": w2s.reshape(1, -1, out_features),
        "b_out": state["b2s"].unsqueeze(0),
    }
    arguments = {
        "in_features": in_features,
        "out_features": out_features,
        "depth": depth,
        "leaf_width": leaf_width,
        "node_output": False,
        "activation": "relu",
        "bias": True,
    }
    return arguments, weights


def _node_tensor(state: Mapping[str, Tensor], name: str, shape: tuple[int, int], like: Tensor) -> Tensor:
    if shape[0] == 0:  # savers drop tensors without elements
        return like.new_empty(shape)
    if name not in state:
        raise CheckpointError(f"missing tensor {name} {shape}")
    _check_shape(name, state[name], shape)
    return state[name]


def _check_keys(state: Mapping[str, Tensor], needed: set[str], optional: set[str]) -> None:
    for problem, names in (("missing", needed - set(state)), ("unexpected", set(state) - needed - optional)):
        if names:
            raise CheckpointError(f"{problem} tensor {', '.join(sorted(names))}")


def _matrix(name: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.dim() != 2:
        raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}, expected two dimensions")
    rows, columns = tensor.shape
    return rows, columns


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
