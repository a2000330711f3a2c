"""The functions that routers are made of: which leaves, and with what gates. Differentiable through the gates alone.

Scores keep the dtype they are given. Chosen indices ascend, so that sums over them have one order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

INFINITY = float("inf")


def best(value: Tensor, k: int) -> Tensor:
    """Indices (..., k) int64, ascending, of the k largest of value (..., n): a tie takes the lower index, NaN loses."""
    n = value.shape[-1]
    index = torch.arange(n, device=value.device).expand(value.shape)
    if k == n:
        return index
    value = value.detach()
    value = value.masked_fill(value.isnan(), -INFINITY)
    least = value.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, tied = value > least, value == least
    chosen = above | (tied & (tied.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    place = torch.where(chosen, chosen.cumsum(-1) - 1, k)  # the others all go to a place that is cut off
    return index.new_zeros(*value.shape[:-1], k + 1).scatter(-1, place, index)[..., :k]


def preference(score: Tensor, balance: Tensor | None) -> Tensor:
    """What selection compares: the sigmoid of a score plus the balance, which no gate sees; without balance the score
    itself, which has the order of its sigmoid and, unlike it, does not reach 1 at 17."""
    score = score.detach()
    if balance is None:
        return score.clamp(min=torch.finfo(score.dtype).min)  # -infinity, too, wins against NaN
    return score.sigmoid() + balance


def normalised(score: Tensor) -> Tensor:
    """Gates (..., k): sigmoid(score) over its sum, times k. By logarithms: a sum of vanishing sigmoids is no 0 / 0."""
    return F.logsigmoid(score).softmax(-1) * score.shape[-1]


class Beam(NamedTuple):
    """The best leaves of each tree: leaf (rows, trees, k) within its tree, their path sums score (rows, trees, k), and
    the nodes (rows, trees, kept) int64 that the beam kept, heap indices, root first and leaves last."""

    leaf: Tensor
    score: Tensor
    kept: Tensor


def beam(node_score: Tensor, k: int, balance: Tensor | None) -> Beam:
    """Walk down trees with the k best nodes of every level.

    node_score: (rows, trees, nodes) in heap order; balance: (trees, nodes + leaves) in heap order.
    A node's sum is +score for every decision to the right and -score for every one to the left on the way to it.
    """
    rows, trees, nodes = node_score.shape
    place = torch.zeros(rows, trees, 1, dtype=torch.int64, device=node_score.device)  # within its level
    total = node_score.new_zeros(rows, trees, 1)
    kept, width = [place], 1
    while width <= nodes:
        score = node_score.gather(2, place + (width - 1))
        place = torch.stack((2 * place, 2 * place + 1), -1).flatten(-2)
        total = torch.stack((total - score, total + score), -1).flatten(-2)
        width *= 2
        heap = place + (width - 1)
        if place.shape[-1] > k:
            there = None if balance is None else balance.expand(rows, -1, -1).gather(2, heap)
            index = best(preference(total, there), k)  # children ascend as their parents do
            place, total, heap = place.gather(2, index), total.gather(2, index), heap.gather(2, index)
        kept.append(heap)
    return Beam(place, total, torch.cat(kept, -1))


def beam_margin(node_score: Tensor, k: int, balance: Tensor | None) -> Tensor:
    """How much better (rows,) the last node that `beam` kept was than the first it dropped, the least over levels and
    trees; infinity where it dropped none, zero where a comparison was not a number."""
    rows, trees, nodes = node_score.shape
    kept = beam(node_score, k, balance).kept
    margin = node_score.new_full((rows, trees), INFINITY)
    total, width = node_score.new_zeros(rows, trees, 1), 1
    while width <= nodes:
        score = node_score[..., width - 1 : 2 * width - 1]
        total, width = torch.stack((total - score, total + score), -1).flatten(-2), 2 * width
        if width <= k:
            continue
        value = preference(total, None if balance is None else balance[:, width - 1 : 2 * width - 1])
        heap = torch.arange(width - 1, 2 * width - 1, device=kept.device)
        in_beam = (kept.unsqueeze(-1) == heap).any(-2)
        parent_kept = (kept.unsqueeze(-1) == (heap - 1) // 2).any(-2)
        worst = value.masked_fill(~in_beam, INFINITY).amin(-1)
        dropped = value.masked_fill(in_beam | ~parent_kept, -INFINITY).amax(-1)
        margin = torch.minimum(margin, worst - dropped)
    return margin.nan_to_num(nan=0.0, posinf=INFINITY).amin(-1)


def histogram(index: Tensor, bins: int) -> Tensor:
    """How often each of `bins` occurs in index (any shape), int64."""
    flat = index.reshape(-1)
    return flat.new_zeros(bins).scatter_add(0, flat, flat.new_ones(()).expand(flat.shape))
