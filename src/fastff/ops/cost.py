"""What a call costs on a CPU core: a model with four measured constants, for choosing a form and for `explain`.

A conditional layer pays for reading the neurons that some row visits, once, and for the arithmetic of every row's
path, which runs below the speed of matrix products because rows are gathered. The masked form of the same layer
computes every neuron by matrix products and pays for masking the scores. The model is good to about a third; what it
decides is when the masked form wins: only where a row uses a large share of all neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fastff.tree import TreeConfig


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
    reading = _visited_weights(config, rows) * weight_bytes / CPU.reading
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


def _visited_weights(config: TreeConfig, rows: int) -> float:
    """Weights of the neurons that at least one of `rows` rows visits, each leaf being equally likely."""

    def visited(nodes: int) -> float:
        return nodes * (1 - (1 - 1 / nodes) ** rows) if nodes > 1 else float(min(rows, 1))

    node = config.in_features + (config.out_features if config.node_output else 0)
    leaf = config.leaf_in_rows * config.in_features + config.leaf_width * config.out_features
    total = sum(visited(2**level) for level in range(config.depth)) * node + visited(config.leaves) * leaf
    return config.trees * total
