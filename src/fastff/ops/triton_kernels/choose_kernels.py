"""Choosing leaves on a GPU: the k best of a row's scores, and the k best leaves of trees by a beam. One kernel each.

What is chosen, and how ties and NaN are treated, is defined by fastff.routers.choose, whose plain forms these equal."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastff.ops.triton_kernels import on_device
from fastff.ops.triton_kernels.common import sigmoid
from fastff.ops.triton_kernels.plan import ceil_div, power_of_two

TILE = 4096  # scores that one program holds
HIGHEST = 128  # rows that one program holds at most
LEAST = tl.constexpr(-3.0e38)  # below all scores but those that are as good as -infinity


def best(score: Tensor, balance: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """leaf (rows, k) int64, ascending, and load (candidates,) int64: how many rows chose each.

    score: (rows, candidates) float32; balance: (candidates,) float32 or None. Compares sigmoid(score) + balance, or
    the score where there is none.
    """
    score = score.contiguous()
    rows, count = score.shape
    leaf = torch.empty(rows, k, dtype=torch.int64, device=score.device)
    load = torch.zeros(count, dtype=torch.int64, device=score.device)
    width = power_of_two(count)
    height = max(1, min(TILE // width, HIGHEST))
    with on_device(score):
        _best_kernel[(ceil_div(rows, height),)](
            score, balance, leaf, load, rows, COUNT=count, WIDTH=width, K=k, BM=height, num_warps=4
        )
    return leaf, load


def beam(score: Tensor, balance: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """leaf (rows, trees, k) int64 within its tree, ascending; the sums of their paths, likewise, float32; and load
    (trees, nodes + leaves) int64, heap order: how many rows kept each node.

    score: (rows, trees, nodes) float32, heap order; balance: (trees, nodes + leaves) float32 or None.
    """
    score = score.contiguous()
    rows, trees, nodes = score.shape
    depth = nodes.bit_length()
    leaf = torch.empty(rows, trees, k, dtype=torch.int64, device=score.device)
    total = torch.empty(rows, trees, k, dtype=torch.float32, device=score.device)
    load = torch.zeros(trees, 2 * nodes + 1, dtype=torch.int64, device=score.device)
    height = max(1, min(TILE >> depth, HIGHEST))
    with on_device(score):
        _beam_kernel[(ceil_div(rows, height), trees)](
            score, balance, leaf, total, load, rows, TREES=trees, DEPTH=depth, K=k, BM=height, num_warps=4
        )
    return leaf, total, load


def beam_backward(grad: Tensor, leaf: Tensor, nodes: int) -> Tensor:
    """Gradient of the node scores (rows, trees, nodes) from that of the path sums (rows, trees, k)."""
    grad, leaf = grad.contiguous(), leaf.contiguous()
    rows, trees, k = leaf.shape
    depth = nodes.bit_length()
    grad_score = torch.empty(rows, trees, nodes, dtype=torch.float32, device=grad.device)
    height = max(1, min(TILE >> depth, HIGHEST))
    with on_device(grad):
        _beam_backward_kernel[(ceil_div(rows, height), trees)](
            grad, leaf, grad_score, rows, TREES=trees, DEPTH=depth, K=k, BM=height, num_warps=4
        )
    return grad_score


@triton.jit
def finite_below(score):
    """The score, but not -infinity, which NaN becomes where values are compared. NaN stays."""
    return tl.where(score < LEAST, LEAST, score)


@triton.jit
def _take(value, candidate, COUNT: tl.constexpr, K: tl.constexpr):
    """1 at the K candidates of the largest values in each row (BM, COUNT), the lower index first where they tie."""
    place = tl.arange(0, COUNT)[None, :]
    value = tl.where(value != value, float("-inf"), value)
    taken = tl.zeros_like(candidate)
    for _ in range(K):
        left = (candidate > 0) & (taken == 0)
        most = tl.max(tl.where(left, value, float("-inf")), 1)
        first = tl.min(tl.where(left & (value == most[:, None]), place, COUNT), 1)
        taken = tl.where(place == first[:, None], 1, taken)
    return taken


@triton.jit
def _store(taken, leaf_ptr, there, K: tl.constexpr, COUNT: tl.constexpr):
    """The taken columns of each row, ascending. leaf_ptr: of each row (BM,)."""
    place = tl.cumsum(taken, 1) - 1
    index = tl.arange(0, COUNT)[None, :] + tl.zeros_like(taken)
    tl.store(leaf_ptr[:, None] + place, index.to(tl.int64), mask=(taken > 0) & there[:, None])


@triton.jit
def count(taken, load_ptr, there, COUNT: tl.constexpr, LIMIT: tl.constexpr):
    """Add the rows of this tile to the load of every column."""
    load = tl.sum(tl.where(there[:, None], taken, 0), 0).to(tl.int64)
    place = tl.arange(0, COUNT)
    tl.atomic_add(load_ptr + place, load, mask=(load > 0) & (place < LIMIT), sem="relaxed")


@triton.jit
def _best_kernel(
    score_ptr, balance_ptr, leaf_ptr, load_ptr,
    rows,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    there = row < rows
    c = tl.arange(0, WIDTH)
    at = score_ptr + row[:, None] * COUNT + c[None, :]
    score = tl.load(at, mask=there[:, None] & (c < COUNT)[None, :], other=0.0)
    value = finite_below(score)
    if balance_ptr is not None:
        value = sigmoid(score) + tl.load(balance_ptr + c, mask=c < COUNT, other=0.0)[None, :]
    candidate = (c < COUNT).to(tl.int32)[None, :] + tl.zeros((BM, WIDTH), tl.int32)
    taken = _take(value, candidate, WIDTH, K)
    _store(taken, leaf_ptr + row * K, there, K, WIDTH)
    count(taken, load_ptr, there, WIDTH, COUNT)


@triton.jit
def _children(left, right, BM: tl.constexpr, WIDTH: tl.constexpr):
    """Left and right children of a level (BM, WIDTH) side by side: (BM, 2 * WIDTH)."""
    return tl.reshape(tl.join(left, right), (BM, 2 * WIDTH))


@triton.jit
def walk(score_ptr, balance_ptr, load_ptr, there, tree, DEPTH: tl.constexpr, K: tl.constexpr, BM: tl.constexpr):
    """Marks on the leaves that the beam keeps and the sums of all paths, both (BM, leaves). score_ptr: of the nodes of
    each row (BM,) in this tree. Every level whole, (BM, 2**level), with a mark on the nodes that the beam keeps."""
    nodes: tl.constexpr = (1 << DEPTH) - 1
    total = tl.zeros((BM, 1), tl.float32)
    kept = tl.zeros((BM, 1), tl.int32) + 1
    if load_ptr is not None:
        load_ptr += tree * (2 * nodes + 1)
        count(kept, load_ptr, there, 1, 1)
    for level in tl.static_range(DEPTH):
        c = tl.arange(0, 1 << level)
        score = tl.load(score_ptr[:, None] + c[None, :] + ((1 << level) - 1), mask=there[:, None], other=0.0)
        total = _children(total - score, total + score, BM, 1 << level)
        kept = _children(kept, kept, BM, 1 << level)
        if (2 << level) > K:
            value = finite_below(total)
            if balance_ptr is not None:
                heap = tree * (2 * nodes + 1) + (2 << level) - 1 + tl.arange(0, 2 << level)
                value = sigmoid(total) + tl.load(balance_ptr + heap)[None, :]
            kept = _take(value, kept, 2 << level, K)
        if load_ptr is not None:
            count(kept, load_ptr + (2 << level) - 1, there, 2 << level, 2 << level)
    return kept, total


@triton.jit
def grad_nodes(below, grad_score_ptr, there, NODES: tl.constexpr, DEPTH: tl.constexpr, BM: tl.constexpr):
    """Gradient of the node scores from that of the leaves' path sums (BM, leaves). grad_score_ptr: of each row (BM,).
    From the leaves up: what hangs below a node adds up, and the node's own score pulls right against left."""
    for up in tl.static_range(DEPTH):
        left, right = tl.split(tl.reshape(below, (BM, (NODES + 1) >> (up + 1), 2)))
        node = ((NODES + 1) >> (up + 1)) - 1 + tl.arange(0, (NODES + 1) >> (up + 1))
        value = (right - left).to(grad_score_ptr.dtype.element_ty)
        tl.store(grad_score_ptr[:, None] + node[None, :], value, mask=there[:, None])
        below = left + right


@triton.jit
def _beam_kernel(
    score_ptr, balance_ptr, leaf_ptr, total_ptr, load_ptr,
    rows,
    TREES: tl.constexpr, DEPTH: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    tree = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    there = row < rows
    nodes: tl.constexpr = (1 << DEPTH) - 1
    item = row * TREES + tree
    kept, total = walk(score_ptr + item * nodes, balance_ptr, load_ptr, there, tree, DEPTH, K, BM)
    _store(kept, leaf_ptr + item * K, there, K, nodes + 1)
    at = total_ptr + (item * K)[:, None] + tl.cumsum(kept, 1) - 1
    tl.store(at, total, mask=(kept > 0) & there[:, None])


@triton.jit
def _beam_backward_kernel(
    grad_ptr, leaf_ptr, grad_score_ptr,
    rows,
    TREES: tl.constexpr, DEPTH: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    tree = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    there = row < rows
    nodes: tl.constexpr = (1 << DEPTH) - 1
    item = row * TREES + tree
    place = tl.arange(0, nodes + 1)
    below = tl.zeros((BM, nodes + 1), tl.float32)
    for chosen in range(K):
        leaf = tl.load(leaf_ptr + item * K + chosen, mask=there, other=-1)
        grad = tl.load(grad_ptr + item * K + chosen, mask=there, other=0.0)
        below += tl.where(place[None, :] == leaf[:, None], grad[:, None], 0.0)
    grad_nodes(below, grad_score_ptr + item * nodes, there, nodes, DEPTH, BM)
