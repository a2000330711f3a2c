"""What a call costs on a CPU core: a model with four measured constants, for choosing a form and for `explain`.

A conditional layer pays for reading the neurons that some row visits, once, and for the arithmetic of every row's
path, which runs below the speed of matrix products because rows are gathered. The masked form of the same layer
computes every neuron by matrix products and pays for masking the scores. The model is good to about a third; what it
decides is when the masked form wins: only where a row uses a large share of all neurons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

from fastff.config import Sizes, TreeConfig


@dataclass(frozen=True)
class Machine:
    """Speeds of one core in fp32. The defaults were measured on an AVX-512 core of 2023."""

    gathered: float = 25e9  # floating-point operations a second on gathered rows
    products: float = 90e9  # likewise in matrix products
    reading: float = 20e9  # bytes of weights a second
    masking: float = 3e-8  # seconds for a score of the masked form, beside its product


CPU = Machine()


@lru_cache(maxsize=1024)
def conditional_us(config: TreeConfig, rows: int, threads: int = 1, weight_bytes: int = 4) -> float:
    """Microseconds of the native form for so many rows that spread evenly over the leaves."""
    reading = visited_weights(config, rows) * weight_bytes / CPU.reading
    return 1e6 * (reading + rows * config.flops_per_row / CPU.gathered / threads)


@lru_cache(maxsize=1024)
def masked_us(config: TreeConfig, rows: int, threads: int = 1) -> float:
    """Microseconds of the masked form: every neuron by matrix products."""
    scores = config.trees * config.in_rows
    return dense_us(config, rows, threads) + 1e6 * rows * scores * CPU.masking / threads


@lru_cache(maxsize=1024)
def dense_us(config: TreeConfig, rows: int, threads: int = 1) -> float:
    """Microseconds of a dense layer with as many neurons as `config` stores."""
    weights = config.trees * (config.in_rows * config.in_features + config.out_rows * config.out_features)
    return products_us(weights, rows, threads)


def products_us(weights: int, rows: int, threads: int = 1) -> float:
    """Microseconds of matrix products of so many rows with so many fp32 weights."""
    return 1e6 * (4 * weights / CPU.reading + 2 * rows * weights / CPU.products / threads)


def mostly_active(config: TreeConfig) -> bool:
    """Whether a row uses so large a share of the neurons that the masked form may win."""
    return config.active_neurons > 0.4 * config.neurons


def masked_wins(config: TreeConfig, rows: int, threads: int) -> bool:
    """Whether the masked form is expected to be faster than the conditional one."""
    return mostly_active(config) and masked_us(config, rows, threads) < conditional_us(config, rows, threads)


def visited_weights(config: TreeConfig, rows: int) -> float:
    """Expected number of different weights that so many rows read, when they spread evenly over the leaves."""
    return config.trees * sum(visited(there, rows) * size for there, size in levels(config))


def levels(config: TreeConfig) -> list[tuple[int, int]]:
    """Nodes of a tree on each level and weights of one, root first and leaves last."""
    node = config.in_features + (config.out_features if config.node_output else 0)
    leaf = config.leaf_in_rows * config.in_features + config.leaf_width * config.out_features
    return [*((2**level, node) for level in range(config.depth)), (config.leaves, leaf)]


def visited(there: int, rows: int, taken: int = 1) -> float:
    """Expected number of different nodes, of so many, that rows reach of which each takes `taken`."""
    if taken >= there:
        return float(there if rows else 0)
    return -there * math.expm1(rows * math.log1p(-taken / there))


class RoutedSizes(Sizes, Protocol):
    """What the cost of a layer behind a router follows from: `fastff.conditional.ConditionalConfig` tells it."""

    @property
    def leaves(self) -> int: ...
    @property
    def leaf_width(self) -> int: ...
    @property
    def leaf_in_rows(self) -> int: ...
    @property
    def activation(self) -> str: ...
    @property
    def chosen(self) -> int: ...
    @property
    def routing_scores(self) -> int: ...
    @property
    def routing_features(self) -> int: ...


class Work(NamedTuple):
    """A layer behind a router. leaves: stored; chosen: of a row; leaf_weights: of one leaf; routing_scores: of a row,
    each of routing_features products."""

    leaves: int
    chosen: int
    leaf_weights: int
    routing_scores: int
    routing_features: int


def work_of(config: TreeConfig | RoutedSizes) -> Work:
    """The work of a ConditionalFeedforward's configuration, or of trees with paths."""
    trees = config.trees if isinstance(config, TreeConfig) else 1
    weights = config.leaf_in_rows * config.in_features + config.leaf_width * config.out_features
    sizes = (trees * config.leaves, trees * config.chosen, weights)
    return Work(*sizes, config.routing_scores, config.routing_features)


def routed_us(work: Work, rows: int, threads: int = 1, weight_bytes: int = 4) -> float:
    """As `conditional_us`. The nodes that route count as read once for every score of a row, at most so many rows."""
    routing = work.routing_scores * work.routing_features
    weights = visited(work.leaves, rows, work.chosen) * work.leaf_weights + min(rows, 8) * routing
    flops = 2 * rows * (work.chosen * work.leaf_weights + routing)
    return 1e6 * (weights * weight_bytes / CPU.reading + flops / CPU.gathered / threads)
