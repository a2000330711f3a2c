"""Routes by the C++ core: fp32 and fp64 on the CPU, at the cost of the scores that a row needs."""

from __future__ import annotations

import ctypes
import functools
from typing import Protocol

import torch
from torch import Tensor

from fastff.errors import FastffError
from fastff.ops import backends, interface
from fastff.ops.dense import dense
from fastff.ops.library import OK, SUFFIXES, Pack, call, get_num_threads, last_error, library, pointer
from fastff.ops.native_conditional import WEIGHTS, leaves_of

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
        ctypes.byref(_c_router(sizes)),
        *map(pointer, kept),
        rows,
        pointer(leaf),
        pointer(gate),
        None,
        get_num_threads(),
    )
    return leaf, gate


class PackedRouter(Pack):
    """A copy of an fp32 router in 16 bits, for inference: half the memory to read, and the leaves of fp32, because what
    16 bits leave in doubt is computed again. It does not follow later changes of the weights.

    quantization: "bf16" or "int8", which route alike.
    """

    of = "router"

    def __init__(
        self, sizes: Sizes, weight: Tensor, bias: Tensor | None, balance: Tensor | None, quantization: str
    ) -> None:
        super().__init__()
        self._k = sizes.trees * sizes.chosen
        kept = dense(*(None if t is None else t.detach().float() for t in (weight, bias, balance)))
        call(
            "fastff_router_pack_f32",
            ctypes.byref(_c_router(sizes)),
            *map(pointer, kept),
            WEIGHTS[quantization],
            ctypes.byref(self._handle),
        )

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """leaf (rows, k) int64 and gate (rows, k) of x (rows, in_features), fp32."""
        (x,) = dense(x)
        leaf, gate = torch.empty(len(x), self._k, dtype=torch.int64), x.new_empty(len(x), self._k)
        out = (pointer(leaf), pointer(gate))
        call("fastff_router_infer_f32", self._handle, pointer(x), len(x), *out, get_num_threads())
        return leaf, gate


class JoinedLayer(Pack):
    """Copies of an fp32 router and its leaves as one layer, for inference: one call from rows to rows.

    router: weight, bias, balance; leaves: w_in (leaves, in_rows, in_features), b_in, w_out (leaves, width, features),
    b_out; quantization: None, "bf16" or "int8". It does not follow later changes of the weights.
    """

    of = "layer"

    def __init__(
        self,
        sizes: Sizes,
        router: tuple[Tensor, Tensor | None, Tensor | None],
        leaves: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
        *,
        activation: str,
        quantization: str | None,
    ) -> None:
        super().__init__()
        self._infer = library().fastff_layer_infer_f32
        self._out_features = leaves[2].shape[2]
        kept = dense(*(None if t is None else t.detach().float() for t in (*router, *leaves)))
        call(
            "fastff_layer_pack_f32",
            ctypes.byref(_c_router(sizes)),
            *map(pointer, kept[:3]),
            leaves_of(leaves[0], leaves[2], activation),
            *map(pointer, kept[3:]),
            WEIGHTS[quantization],
            ctypes.byref(self._handle),
        )

    def __call__(self, x: Tensor) -> Tensor:
        """y (rows, out_features) of x (rows, in_features), fp32 and contiguous."""
        y = x.new_empty(len(x), self._out_features)
        if self._infer(self._handle, pointer(x), pointer(y), len(x), get_num_threads()) != OK:
            raise FastffError(last_error())
        return y
