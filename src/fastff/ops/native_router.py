"""Routes by the C++ core: fp32 and fp64 on the CPU, at the cost of the scores that a row needs."""

from __future__ import annotations

import ctypes
import functools
from typing import Protocol

import torch
from torch import Tensor

from fastff.ops import backends, interface
from fastff.ops.dense import dense
from fastff.ops.library import SUFFIXES, call, get_num_threads, pointer

KINDS = ("tree", "paths", "flat", "product_key")
GATES = (None, "boundary", "boundary_min", "normalised")


class Sizes(Protocol):
    """What a route needs to know of a router: `fastff.routers.RouterConfig` is one."""

    def __hash__(self) -> int: ...

    @property
    def kind(self) -> str: ...
    @property
    def in_features(self) -> int: ...
    @property
    def trees(self) -> int: ...
    @property
    def candidates(self) -> int: ...
    @property
    def chosen(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def gate(self) -> str | None: ...
    @property
    def tau(self) -> float: ...


class _Router(ctypes.Structure):
    """fastff_router of csrc/fastff.h."""

    _fields_ = (
        ("in_features", ctypes.c_int64),
        ("trees", ctypes.c_int64),
        ("candidates", ctypes.c_int64),
        ("chosen", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("depth", ctypes.c_int32),
        ("gate", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("tau", ctypes.c_double),
    )


@functools.lru_cache(maxsize=1024)
def _c_router(sizes: Sizes) -> _Router:
    kind, gate = KINDS.index(sizes.kind), GATES.index(sizes.gate)
    counts = (sizes.in_features, sizes.trees, sizes.candidates, sizes.chosen)
    return _Router(*counts, kind, sizes.depth, gate, 0, sizes.tau)


def can_route(x: Tensor, weight: Tensor) -> bool:
    """Whether `route` can take these rows and weights here and now: nothing that it must be differentiable, traced or
    transformed for, and no other backend asked for by `use_backend`."""
    return (
        not torch.is_grad_enabled()
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in SUFFIXES
        and backends.forced_backend() in (None, "native")
        and interface.untouched(x, weight)
        and backends.why_unavailable_cached("native") is None
    )


def route(
    sizes: Sizes, weight: Tensor, bias: Tensor | None, balance: Tensor | None, x: Tensor
) -> tuple[Tensor, Tensor]:
    """leaf (rows, k) int64 and gate (rows, k) of x (rows, in_features)."""
    rows, k = x.shape[0], sizes.trees * sizes.chosen
    leaf, gate = torch.empty(rows, k, dtype=torch.int64), x.new_empty(rows, k)
    given = (weight, bias, None if balance is None else balance.to(x.dtype), x)
    kept = dense(*given)
    call(
        f"fastff_route_{SUFFIXES[x.dtype]}",
        ctypes.addressof(_c_router(sizes)),
        *map(pointer, kept),
        rows,
        pointer(leaf),
        pointer(gate),
        None,
        get_num_threads(),
    )
    return leaf, gate
