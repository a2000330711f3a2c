"""Conditional matrix multiplication by PyTorch's own batched products, at conditional cost.

For devices and dtypes without a kernel. The chosen (row, leaf) pairs are sorted by leaf and cut into tiles of one leaf
each; a tile multiplies its leaf's weights. How many tiles there can be depends on shapes alone, so nothing waits for
values of the device and the whole compiles; autograd and torch.func go through it.
Shapes as in conditional_reference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastff.ops import conditional_reference
from fastff.ops.reference import activate
from fastff.ops.weights import Leaves


class _Tiles(NamedTuple):
    """Where the pairs went: leaf (tiles,) of each tile; pair (tiles, size) in each slot, filled (tiles, size, 1) says
    where there is one; slot (pairs,) of each pair."""

    leaf: Tensor
    pair: Tensor
    filled: Tensor
    slot: Tensor


def forward(x: Tensor, leaf: Tensor, gate: Tensor, leaves: Leaves, *, activation: str) -> Tensor:
    """y (rows, out_features)."""
    w_in, b_in, w_out, b_out = leaves
    rows, k = leaf.shape
    if rows * k == 0:  # nothing to sort; the gradients are zeros
        return conditional_reference.forward(x, leaf, gate, leaves, activation=activation)
    tiles = _sort(leaf.reshape(-1), w_in.shape[0])
    # Empty slots hold zeros: an infinity that some weights hold must not become a NaN in their gradients.
    x_tile = torch.where(tiles.filled, x[tiles.pair // k], 0)
    gate_tile = torch.where(tiles.filled, gate.reshape(-1)[tiles.pair].unsqueeze(-1), 0)
    scores = torch.bmm(x_tile, w_in[tiles.leaf].transpose(1, 2))
    if b_in is not None:
        scores = scores + b_in[tiles.leaf].unsqueeze(1)
    scores = torch.where(tiles.filled, scores, 0)
    y_tile = torch.bmm(gate_tile * activate(scores, activation), w_out[tiles.leaf])
    if b_out is not None:
        y_tile = y_tile + gate_tile * b_out[tiles.leaf].unsqueeze(1)
    return y_tile.flatten(0, 1)[tiles.slot].view(rows, k, -1).sum(1)


def _sort(leaf: Tensor, leaves: int) -> _Tiles:
    """Tiles of the pairs whose leaves are `leaf` (pairs,)."""
    pairs = leaf.shape[0]
    size = _tile_rows(pairs, leaves)
    most = pairs // size + min(leaves, pairs)
    order = leaf.argsort(stable=True)
    leaf = leaf[order]
    counts = leaf.new_zeros(leaves).scatter_add(0, leaf, torch.ones_like(leaf))
    tiles_end = ((counts + (size - 1)) // size).cumsum(0)
    tiles_first = torch.cat((tiles_end.new_zeros(1), tiles_end[:-1]))
    pairs_first = counts.cumsum(0) - counts
    slot_in_order = (tiles_first * size - pairs_first)[leaf] + torch.arange(pairs, device=leaf.device)
    pair = leaf.new_full((most * size,), -1).scatter(0, slot_in_order, order).unflatten(0, (most, size))
    ended = leaf.new_zeros(most + 1).scatter_add(0, tiles_end, torch.ones_like(tiles_end))
    tile_leaf = ended.cumsum(0)[:most]
    slot = torch.empty_like(order).scatter(0, order, slot_in_order)
    return _Tiles(tile_leaf.clamp(max=leaves - 1), pair.clamp(min=0), (pair >= 0).unsqueeze(-1), slot)


def _tile_rows(pairs: int, leaves: int) -> int:
    """Rows of a tile: about the pairs of a leaf, so that few slots are empty and few weights are read twice."""
    for size in (64, 16, 4):
        if pairs >= size * leaves:
            return size
    return 1
