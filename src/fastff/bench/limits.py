"""The machine's own limits, measured, and the least time that they allow a conditional layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastff.config import TreeConfig
from fastff.machine import cache_bytes
from fastff.ops.cost import levels, visited
from fastff.timing import seconds_of

BYTES = {"fp32": 4, "bf16": 2, "int8": 1}  # of a weight
MEMORY_BYTES = 2**29
PEAK_SIZE = 2048  # of the square matrices that are multiplied


@dataclass(frozen=True)
class Limits:
    """Of `threads` cores together: bytes read a second from memory and from the last-level cache, whose size is
    last_level_bytes, and fp32 floating-point operations a second of a large matrix product."""

    threads: int
    memory_bytes_per_s: float
    cache_bytes_per_s: float
    last_level_bytes: int
    flops_per_s: float


def measure() -> Limits:
    """With torch's number of threads; about two seconds."""
    own, last = cache_bytes()
    a, b = torch.randn(2, PEAK_SIZE, PEAK_SIZE)
    cached = max(4 * own * torch.get_num_threads(), min(last // 8, 2**25))
    return Limits(
        threads=torch.get_num_threads(),
        memory_bytes_per_s=read_bandwidth(MEMORY_BYTES, repeats=4),
        cache_bytes_per_s=read_bandwidth(cached, repeats=60),
        last_level_bytes=last,
        flops_per_s=2 * PEAK_SIZE**3 / _least_seconds(lambda: torch.mm(a, b), 8),
    )


def read_bandwidth(size: int, *, repeats: int) -> float:
    """Bytes a second, of the faster of two routines that read `size` bytes again and again."""
    x = torch.ones(size // 4)
    matrix, vector = x[: len(x) // 1024 * 1024].view(-1, 1024), torch.ones(1024)
    reads: tuple[Callable[[], object], ...] = (lambda: torch.dot(x, x), lambda: torch.mv(matrix, vector))
    return size / min(_least_seconds(read, repeats) for read in reads)


def _least_seconds(call: Callable[[], object], repeats: int) -> float:
    call()
    return min(seconds_of(call) for _ in range(repeats))


def least_us(config: TreeConfig, limits: Limits, *, rows: int, layers: int, precision: str) -> float:
    """Microseconds a row that the limits allow: all products at the peak of fp32, or every weight that the rows are
    expected to visit read once a call, and the row itself read and written; whichever takes longer.

    The levels next to the root that fit the last-level cache, all layers together, are read from there; what lies
    below them, from memory. Rows are taken to spread evenly over the leaves."""
    seconds = 4 * rows * (config.in_features + config.out_features) / limits.cache_bytes_per_s
    stored = 0
    for there, size in levels(config):
        stored += there * size * config.trees * BYTES[precision] * layers
        cached = stored <= limits.last_level_bytes
        bandwidth = limits.cache_bytes_per_s if cached else limits.memory_bytes_per_s
        seconds += visited(there, rows) * size * config.trees * BYTES[precision] / bandwidth
    return 1e6 * max(config.flops_per_row / limits.flops_per_s, seconds / rows)
