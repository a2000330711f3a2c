"""Routing on a GPU in one kernel: the scores of a tile of rows, the best leaves of each, their gates; and its gradient.

Scores stay on the chip: they are neither rounded to the dtype of x nor written. What is chosen is defined by
fastff.routers.choose; gates are its `normalised`."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from fastff.ops.dense import dense
from fastff.ops.triton_kernels import fitting, on_device
from fastff.ops.triton_kernels.choose_kernels import TILE, count, finite_below, grad_nodes, walk
from fastff.ops.triton_kernels.common import sigmoid
from fastff.ops.triton_kernels.linear import precision_of, tile_of
from fastff.ops.triton_kernels.plan import Tiles, ceil_div, power_of_two

FEW, MANY = 1024, 16384  # rows: up to so few tiles are low, beyond so many high
LAST = tl.constexpr(-3.2e38)  # below all values that are compared
LOWEST, HIGHEST = 16, 128  # rows of a tile: the least that a product takes; at most
NARROW, WIDE = 128, 512  # bytes of a row that a step reads
STAGES = 3  # steps in flight
ALIGNED = 8  # scores of a tree, of which cuBLAS wants a multiple: 63 took 2.5 times as long as 96 (H200)


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, balance: Tensor | None, k: int, counted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """leaf (rows, trees * k) int64, ascending, over all trees; gate, of x's dtype; the chosen scores, float32; and load
    as of `choose.best` or `choose.beam`, empty unless `counted`.

    weight: (leaves, in_features), one score a leaf, or (trees, nodes, in_features), path sums; bias of its shape
    without in_features; balance as of `choose`.
    """
    x, weight, bias, balance = dense(x, weight, bias, balance)
    paths, columns = weight.dim() == 3, weight.shape[-2]
    rows, trees, leaves = x.shape[0], weight.shape[0] if paths else 1, columns + paths
    leaf = torch.empty(rows, trees * k, dtype=torch.int64, device=x.device)
    gate = torch.empty(rows, trees * k, dtype=x.dtype, device=x.device)
    chosen = torch.empty(rows, trees * k, dtype=torch.float32, device=x.device)
    shape = (0,) if not counted else (trees, leaves + columns) if paths else (leaves,)
    load = torch.zeros(shape, dtype=torch.int64, device=x.device)
    width = max(16, power_of_two(columns))
    height, warps = tile(rows, max(width, leaves), paths)
    # A beam reads the scores of a level at a time, which registers cannot give: they go through the cache.
    scores = torch.empty(rows, trees, columns, dtype=torch.float32, device=x.device) if paths else None
    features = min(step(x, height + width), max(16, power_of_two(x.shape[1])))

    def run(plan: RoutePlan) -> None:
        tiles = plan.tiles
        _route_kernel[(ceil_div(rows, tiles.rows), trees)](
            x, weight, bias, balance, leaf, gate, chosen, load if counted else None, scores, rows,
            D=x.shape[1], TREES=trees, COLUMNS=columns, WIDTH=width, DEPTH=columns.bit_length() if paths else 0, K=k,
            SLOTS=power_of_two(k), BM=tiles.rows, BK=tiles.inner,
            PRECISION=precision_of(x.dtype), num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    with on_device(x):
        fitting(RoutePlan(Tiles(height, width, features, 16, warps, STAGES)), run)
    return leaf, gate, chosen, load


def route_backward(
    grad_gate: Tensor, x: Tensor, weight: Tensor, leaf: Tensor, chosen: Tensor, biased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (empty unless `biased`) from that of the gates."""
    grad_gate, x, weight, leaf, chosen = dense(grad_gate, x, weight, leaf, chosen)
    paths, columns = weight.dim() == 3, weight.shape[-2]
    rows, trees = x.shape[0], weight.shape[0] if paths else 1
    k = leaf.shape[1] // trees
    width = power_of_two(columns + paths)
    padded = min(width, ceil_div(columns, ALIGNED) * ALIGNED)
    grad_score = torch.empty(rows, trees * padded, dtype=x.dtype, device=x.device)
    height = max(1, min(TILE // width, HIGHEST))
    with on_device(x):
        _grad_score_kernel[(ceil_div(rows, height), trees)](
            grad_gate, leaf, chosen, grad_score, rows, TREES=trees, COLUMNS=columns, PADDED=padded,
            WIDTH=width, DEPTH=columns.bit_length() if paths else 0, K=k, SLOTS=power_of_two(k), BM=height, num_warps=4,
        )  # fmt: skip
    flat = weight if padded == columns else functional.pad(weight, (0, 0, 0, padded - columns))  # which copies
    flat = flat.reshape(trees * padded, -1)
    grad_weight = (grad_score.T @ x).view(trees, padded, -1)[:, :columns].reshape(weight.shape)
    if not biased:
        return grad_score @ flat, grad_weight, x.new_empty(0)
    grad_bias = grad_score.sum(0).view(trees, padded)[:, :columns].reshape(weight.shape[:-1])
    return grad_score @ flat, grad_weight, grad_bias


@dataclass(frozen=True)
class RoutePlan:
    """tiles: rows, and `inner` features that a product takes at once."""

    tiles: Tiles


def step(x: Tensor, lines: int) -> int:
    """Features that a product takes at once, of so many rows of x and of the weight. Few rows wait for memory: they ask
    for all that fits at once."""
    few = x.shape[0] <= FEW and x.itemsize == 2 and lines * WIDE * STAGES <= _shared_memory(x.device)
    return (WIDE if few else NARROW) // x.itemsize


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have; 0 where kernels are interpreted."""
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def tile(rows: int, width: int, paths: bool) -> tuple[int, int]:
    """Rows of a tile of so many columns, and warps. High tiles read the weight less often, and few of them leave most
    of a GPU idle; levels of a beam, which come and go, take registers. Measured on an H200: docs/benchmarks-gpu.md."""
    few, many = rows <= FEW, rows > MANY
    if paths:
        height = max(LOWEST, min(64, 2 * TILE // width)) if many else LOWEST
        return height, 8 if height * width >= TILE else 4
    height = max(LOWEST, min(HIGHEST if many else LOWEST if few else 64, 4 * TILE // width))
    return height, 8 if height * width >= 4 * TILE else 4


@triton.jit
def _gates(score, real, K: tl.constexpr):
    """sigmoid(score) over its sum over the `real` columns of each row, times K. By logarithms, as `normalised`."""
    likely = tl.minimum(score, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(score)))
    likely = tl.where(score != score, score, likely)
    most = tl.max(tl.where(real, likely, float("-inf")), 1)
    part = tl.where(real, tl.exp(likely - most[:, None]), 0.0)
    return part / tl.sum(part, 1)[:, None] * K


@triton.jit
def _pick(value, score, BM: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr):
    """The K columns of the largest values in each row (BM, WIDTH), lower index first where they tie, and their scores,
    both (BM, SLOTS) in the order found. Values are finite, or -infinity where there is no candidate; the third result
    is the values with -infinity where one was taken, too."""
    c, slot = tl.arange(0, WIDTH)[None, :], tl.arange(0, SLOTS)[None, :]
    column, chosen = tl.zeros((BM, SLOTS), tl.int32), tl.zeros((BM, SLOTS), tl.float32)
    for number in tl.static_range(K):
        # Two plain reductions take fewer instructions than one that carries the column along.
        first = tl.min(tl.where(value == tl.max(value, 1)[:, None], c, WIDTH), 1)
        here = c == first[:, None]
        column = tl.where(slot == number, first[:, None], column)
        chosen = tl.where(slot == number, tl.sum(tl.where(here, score, 0.0), 1)[:, None], chosen)
        value = tl.where(here, float("-inf"), value)
    return column, chosen, value


@triton.jit
def _ranks(column, K: tl.constexpr, SLOTS: tl.constexpr):
    """How many of a row's K columns (BM, SLOTS) are lower than each."""
    slot, rank = tl.arange(0, SLOTS)[None, :], tl.zeros_like(column)
    for number in range(K):
        other = tl.sum(tl.where(slot == number, column, 0), 1)
        rank += (other[:, None] < column).to(tl.int32)
    return rank


@triton.jit
def _store_chosen(
    column, chosen, first, item, leaf_ptr, gate_ptr, chosen_ptr, there, K: tl.constexpr, SLOTS: tl.constexpr
):
    """What each row chose, ascending: leaves `first` + column, their gates and scores."""
    real = (tl.arange(0, SLOTS) < K)[None, :] & (item >= 0)[:, None]
    at = (item * K)[:, None] + _ranks(column, K, SLOTS)
    mask = real & there[:, None]
    tl.store(leaf_ptr + at, (first + column).to(tl.int64), mask=mask)
    tl.store(chosen_ptr + at, chosen, mask=mask)
    tl.store(gate_ptr + at, _gates(chosen, real, K).to(gate_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _route_kernel(
    x_ptr, weight_ptr, bias_ptr, balance_ptr, leaf_ptr, gate_ptr, chosen_ptr, load_ptr, scores_ptr,
    rows,
    D: tl.constexpr, TREES: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    K: tl.constexpr, SLOTS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows in one tree (the only one where DEPTH is 0: columns are leaves then, else nodes)."""
    tree = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    there = row < rows
    c = tl.arange(0, WIDTH)
    w_row = tree * COLUMNS + tl.where(c < COLUMNS, c, 0)
    read = tl.where(there, row, 0)
    score = tl.zeros((BM, WIDTH), tl.float32)
    for start in range(0, D, BK):
        w = tl.trans(tile_of(weight_ptr, w_row, start, D, BK))
        score = tl.dot(tile_of(x_ptr, read, start, D, BK), w, score, input_precision=PRECISION)
    if bias_ptr is not None:
        score += tl.load(bias_ptr + w_row).to(tl.float32)[None, :]
    item = row * TREES + tree
    if DEPTH == 0:
        value = finite_below(score)
        if balance_ptr is not None:
            value = sigmoid(score) + tl.load(balance_ptr + c, mask=c < COLUMNS, other=0.0)[None, :]
        value = tl.where(value == value, value, LAST)  # NaN loses, against all but its like
        value = tl.where((c < COLUMNS)[None, :], value, float("-inf"))
        column, chosen, value = _pick(value, score, BM, WIDTH, K, SLOTS)
        if load_ptr is not None:
            taken = (value == float("-inf")) & (c < COLUMNS)[None, :]
            count(taken.to(tl.int32), load_ptr, there, WIDTH, COLUMNS)
        _store_chosen(column, chosen, 0, item, leaf_ptr, gate_ptr, chosen_ptr, there, K, SLOTS)
    else:
        own = scores_ptr + item * COLUMNS
        tl.store(own[:, None] + c[None, :], score, mask=there[:, None] & (c < COLUMNS)[None, :])
        tl.debug_barrier()  # other threads of this program read them
        kept, total = walk(own, balance_ptr, load_ptr, there, tree, DEPTH, K, BM)
        place = tl.where(kept > 0, 0.0, float("-inf"))
        column, chosen, _ = _pick(place, total, BM, COLUMNS + 1, K, SLOTS)
        _store_chosen(column, chosen, tree * (COLUMNS + 1), item, leaf_ptr, gate_ptr, chosen_ptr, there, K, SLOTS)


@triton.jit
def _grad_score_kernel(
    grad_gate_ptr, leaf_ptr, chosen_ptr, grad_score_ptr,
    rows,
    TREES: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    K: tl.constexpr, SLOTS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Gradient of every score (rows, trees * PADDED): of the gates' softmax of log sigmoids, zero where not chosen and
    beyond COLUMNS."""
    tree = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    there = row < rows
    item = row * TREES + tree
    slot = tl.arange(0, SLOTS)
    at = (item * K)[:, None] + slot[None, :]
    real = (slot < K)[None, :] & (row >= 0)[:, None]
    mask = real & there[:, None]
    chosen = tl.load(chosen_ptr + at, mask=mask, other=0.0)
    share = _gates(chosen, real, 1)
    grad = tl.load(grad_gate_ptr + at, mask=mask, other=0.0).to(tl.float32) * K
    mean = tl.sum(tl.where(mask, share * grad, 0.0), 1)
    grad = tl.where(mask, share * (grad - mean[:, None]) * sigmoid(-chosen), 0.0)
    place = tl.arange(0, WIDTH)
    below = tl.zeros((BM, WIDTH), tl.float32)
    for number in range(K):
        leaf = tl.load(leaf_ptr + item * K + number, mask=there, other=-1) - tree * WIDTH
        own = tl.sum(tl.where(slot[None, :] == number, grad, 0.0), 1)
        below += tl.where(place[None, :] == leaf[:, None], own[:, None], 0.0)
    out = grad_score_ptr + item * PADDED
    if DEPTH == 0:
        value = below.to(grad_score_ptr.dtype.element_ty)
        tl.store(out[:, None] + place[None, :], value, mask=there[:, None] & (place < PADDED)[None, :])
    else:
        if PADDED > COLUMNS:
            tl.store(out + COLUMNS, tl.zeros((BM,), grad_score_ptr.dtype.element_ty), mask=there)
        grad_nodes(below, out, there, COLUMNS, DEPTH, BM)
