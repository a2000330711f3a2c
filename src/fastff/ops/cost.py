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

from fastff.config import TreeConfig


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


def visited(there: int, rows: int) -> float:
    """Expected number of different nodes, of so many, that rows reach."""
    return float(min(rows, 1)) if there == 1 else -there * math.expm1(rows * math.log1p(-1 / there))
