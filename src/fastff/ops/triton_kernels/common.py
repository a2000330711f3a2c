"""Device functions that several kernels share: activations, the gate, and where the rows of a path lie.

A tree's matrix holds, in heap order, `2**depth - 1` node rows (or none) and then `LEAF_ROWS` rows for each leaf.
Kernels on grouped rows see a *subtree*: the `SUB` levels of decisions below a common prefix of `DEPTH - SUB` decisions.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(z):
    """tanh for z >= 0 (and NaN); the series keeps the relative error of small z, where 1 - 2 / (e^2z + 1) cancels."""
    square = z * z
    series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    return tl.where(z < 0.25, z * series, 1.0 - 2.0 / (tl.exp(2.0 * z) + 1.0))


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def activate(s, ACTIVATION: tl.constexpr):
    """Activation of one score; silu for swiglu, whose caller multiplies by the value score."""
    if ACTIVATION == "gelu":
        return 0.5 * s * (1.0 + tl.erf(s * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (s + 0.044715 * s * s * s)
        return s * sigmoid(2.0 * inner)
    if ACTIVATION == "relu":
        return tl.where(s <= 0, 0.0, s)
    if ACTIVATION == "identity":
        return s
    if ACTIVATION == "abs":
        return tl.abs(s)
    return s * sigmoid(s)


@triton.jit
def slope(s, ACTIVATION: tl.constexpr):
    """Derivative of `activate` at s."""
    if ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(s * 0.7071067811865476)) + s * 0.3989422804014327 * tl.exp(-0.5 * s * s)
    if ACTIVATION == "gelu_tanh":
        s = tl.where(tl.abs(s) > 30.0, tl.where(s > 0, 30.0, -30.0), s)  # powers of a large s overflow
        half = sigmoid(1.5957691216057308 * (s + 0.044715 * s * s * s))
        return half + s * half * (1.0 - half) * 1.5957691216057308 * (1.0 + 0.134145 * s * s)
    if ACTIVATION == "relu":
        return tl.where(s > 0, 1.0, 0.0)
    if ACTIVATION == "identity":
        return tl.full(s.shape, 1.0, tl.float32)
    if ACTIVATION == "abs":
        return tl.where(s > 0, 1.0, 0.0) - tl.where(s < 0, 1.0, 0.0)
    half = sigmoid(s)
    return half * (1.0 + s * (1.0 - half))


@triton.jit
def level_of(n, LEVELS: tl.constexpr):
    """Level of heap index n, for n below 2**LEVELS - 1."""
    level = tl.zeros_like(n)
    for bound in tl.static_range(1, LEVELS):
        level += (n + 1 >= (1 << bound)).to(n.dtype)
    return level


@triton.jit
def subtree_column(
    c, prefix,
    DEPTH: tl.constexpr, SUB: tl.constexpr, HAS_NODES: tl.constexpr, LEAF_FIRST: tl.constexpr,
    LEAF_ROWS: tl.constexpr, LEAF_ENTRY: tl.constexpr,
):  # fmt: skip
    """What column c of the subtree below `prefix` is: (row of the tree, path entry, shift, place, exists).

    A row of the batch has the column on its path when `(leaf inside the subtree) >> shift == place`."""
    nodes: tl.constexpr = ((1 << SUB) - 1) if HAS_NODES else 0
    is_node = c < nodes
    level = level_of(tl.where(is_node, c, 0), SUB)
    place = c + 1 - (1 << level)
    first = ((1 << (DEPTH - SUB + level)) - 1).to(tl.int64)
    node_row = first + (prefix.to(tl.int64) << level) + place
    leaf = tl.where(is_node, 0, c - nodes) // LEAF_ROWS
    neuron = tl.where(is_node, 0, c - nodes) % LEAF_ROWS
    leaf_row = LEAF_FIRST + ((prefix.to(tl.int64) << SUB) + leaf) * LEAF_ROWS + neuron
    exists = c < nodes + (1 << SUB) * LEAF_ROWS
    row = tl.where(exists, tl.where(is_node, node_row, leaf_row), 0)
    entry = tl.where(is_node, DEPTH - SUB + level, LEAF_ENTRY + neuron)
    shift = tl.where(is_node, SUB - level, 0)
    return row, entry, shift, tl.where(is_node, place, leaf), exists


@triton.jit
def prefix_of(group, tree, LEVEL: tl.constexpr, JOINT: tl.constexpr):
    """The first LEVEL decisions in tree number `tree` of the JOINT trees whose decisions make up the group's number."""
    return (group >> (LEVEL * (JOINT - 1 - tree))) & ((1 << LEVEL) - 1)


@triton.jit
def locate(tile, table_ptr, tiles_ptr, GROUPS: tl.constexpr, TILE: tl.constexpr):
    """Group of a tile and the range of sorted places it covers; `table` holds each group's first place, `tiles`
    its first tile, both with the total at the end."""
    groups = tl.arange(0, GROUPS)
    first = tl.load(tiles_ptr + groups)
    group = tl.sum((first <= tile).to(tl.int32), 0) - 1
    begin = tl.load(table_ptr + group) + (tile - tl.load(tiles_ptr + group)) * TILE
    return group, begin, tl.load(table_ptr + group + 1)
