"""How rows spread over leaves."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def path_of(leaf: Tensor, depth: int) -> Tensor:
    """Heap indices (..., depth + 1) int64 of the nodes on the way to leaves (...) of trees, root first, leaf last."""
    shift = torch.arange(depth, -1, -1, device=leaf.device)
    heap = leaf.unsqueeze(-1) + int(2**depth)
    return (heap >> shift) - 1


def add_counts(counts: Tensor, leaf: Tensor) -> None:
    """Add rows to counts (trees, leaves) by the leaves (..., trees * k) that they took, tree by tree."""
    index = leaf.reshape(-1, len(counts), leaf.shape[-1] // len(counts)).movedim(1, 0).flatten(1)
    counts.scatter_add_(1, index, counts.new_ones(()).expand(index.shape))


class Usage(NamedTuple):
    """How rows spread over the leaves: counts (trees, leaves) int64, and per tree the entropy in bits of that
    distribution (`depth` when all leaves are equally used) and the number of leaves no row reached."""

    counts: Tensor
    entropy_bits: Tensor
    dead_leaves: Tensor

    @classmethod
    def of(cls, counts: Tensor) -> Usage:
        """From counts (trees, leaves)."""
        share = counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)
        return cls(counts, -torch.xlogy(share, share).sum(-1) / math.log(2), (counts == 0).sum(-1))

    @property
    def visits(self) -> Tensor:
        """Rows that visited each node (trees, 2 * leaves - 1), heap order, leaves last."""
        levels = [self.counts]
        while levels[0].shape[1] > 1:
            levels.insert(0, levels[0].unflatten(1, (-1, 2)).sum(2))
        return torch.cat(levels, 1)

    def one_sided(self, *, share: float = 0.99, least: int = 100) -> float:
        """Share of the routing nodes visited by `least` rows or more that send `share` of them or more to one side;
        NaN if no node was visited as often."""
        visits = self.visits
        nodes = self.counts.shape[1] - 1
        children = visits[:, 1:].unflatten(1, (nodes, 2)) if nodes else visits.new_zeros(visits.shape[0], 0, 2)
        here = visits[:, :nodes]
        known = here >= least
        one = known & (children.amax(2) >= share * here)
        return int(one.sum()) / int(known.sum()) if bool(known.any()) else math.nan
