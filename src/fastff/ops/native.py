"""The C++ kernels of a tree layer, called through ctypes: fp32 and fp64 on the CPU."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastff.config import ACTIVATIONS, GATES, TreeConfig
from fastff.errors import BackendUnavailable, FastffError
from fastff.ops.cost import conditional_us, dense_us
from fastff.ops.dense import dense
from fastff.ops.explanation import Explanation
from fastff.ops.library import OK, SUFFIXES, call, get_num_threads, last_error, library, pointer
from fastff.ops.reference import Routed
from fastff.ops.weights import HALF, Weights

STALE = 4
_WEIGHTS = {None: 0, "bf16": 1, "int8": 2}  # by the name of a quantisation: enum fastff_weights
# From this size on a tensor may be memory that malloc has fresh from the system, to be faulted in page by page as it is
# written (above 32 MB it always is, with glibc). On small pages that doubles the time of 16384 rows of 768 features; on
# huge pages it adds a fifth.
FRESH_BYTES = 2**22


class _Tree(ctypes.Structure):
    """fastff_tree of csrc/fastff.h."""

    _fields_ = (
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("trees", ctypes.c_int64),
        ("leaf_width", ctypes.c_int64),
        ("depth", ctypes.c_int32),
        ("node_output", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("gate", ctypes.c_int32),
        ("tau", ctypes.c_double),
    )


@functools.cache
def _c_tree(config: TreeConfig) -> _Tree:
    return _Tree(
        config.in_features,
        config.out_features,
        config.trees,
        config.leaf_width,
        config.depth,
        config.node_output,
        ACTIVATIONS.index(config.activation),
        0 if config.gate is None else 1 + GATES.index(config.gate),
        config.tau,
    )


def isa() -> str:
    """Name of the instruction set in use: scalar, avx2, avx512, avx512dot (VNNI and BF16), amx or neon."""
    name: bytes = library().fastff_isa()
    return name.decode()


def set_isa(name: str) -> None:
    """Use another instruction set from now on. Raises BackendUnavailable if it is unknown or this CPU lacks it."""
    if library().fastff_set_isa(name.encode()) != OK:
        raise BackendUnavailable(last_error())


def why_unavailable() -> str | None:
    try:
        library()
    except BackendUnavailable as error:
        return str(error)
    return None


def why_not(x: Tensor, config: TreeConfig) -> str | None:
    """The reason why this backend cannot take x, None if it can."""
    if x.device.type != "cpu":
        return f"backend 'native' runs on the CPU, x is on {x.device}"
    if x.dtype not in SUFFIXES and x.dtype not in HALF:
        return f"backend 'native' takes float64, float32, bfloat16 and float16, x is {x.dtype}"
    return None


def on_huge_pages(fresh: Tensor) -> Tensor:
    """The same tensor, not yet written, on huge pages if it is large and the system has them."""
    if fresh.nbytes >= FRESH_BYTES:
        library().fastff_advise_huge_pages(fresh.data_ptr(), fresh.nbytes)
    return fresh


def forward(x: Tensor, weights: Weights, *, config: TreeConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (rows, out_features), leaf (rows, trees), margin (rows,), scores (rows, trees, path_scores) of x (rows, in)."""
    rows = x.shape[0]
    y = on_huge_pages(x.new_empty(rows, config.out_features))
    leaf = torch.empty(rows, config.trees, dtype=torch.int64)
    margin = x.new_empty(rows)
    scores = x.new_empty(rows, config.trees, config.path_scores)
    kept = dense(*weights, x)
    inputs = [pointer(tensor) for tensor in kept]
    outputs = [pointer(tensor) for tensor in (y, leaf, margin, scores)]
    name = f"fastff_forward_{SUFFIXES[x.dtype]}"
    call(name, ctypes.byref(_c_tree(config)), *inputs, rows, *outputs, get_num_threads())
    return y, leaf, margin, scores


def backward(
    grad_y: Tensor, x: Tensor, weights: Weights, leaf: Tensor, scores: Tensor, *, config: TreeConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w_in, b_in, w_out, b_out; an empty tensor for an absent bias."""
    grads = [x.new_empty(0 if tensor is None else tensor.shape) for tensor in (x, *weights)]
    _backward("backward", grads, grad_y, x, weights, leaf, scores, config)
    return grads[0], grads[1], grads[2], grads[3], grads[4]


def backward_visited(
    grad_y: Tensor, x: Tensor, weights: Weights, leaf: Tensor, scores: Tensor, *, config: TreeConfig
) -> tuple[Tensor | None, ...]:
    """As `backward`; the gradients of w_in, w_out and b_out are sparse tensors (COO over trees and rows, coalesced) of
    the rows that x visits, and nothing is computed or kept for the others. None for an absent bias."""
    in_rows = (weights.w_in, weights.w_out, weights.b_out)
    room = [torch.empty(0 if w is None else w.shape[0] * w.shape[1], dtype=torch.int64) for w in in_rows]
    counts = torch.empty(3, dtype=torch.int64)
    tree, rows = ctypes.byref(_c_tree(config)), leaf.contiguous()
    call("fastff_visited", tree, pointer(rows), len(rows), *map(pointer, room), pointer(counts))
    visited = [numbers[:count] for numbers, count in zip(room, counts.tolist(), strict=True)]
    values = [
        x.new_empty(0 if w is None else (len(numbers), w.shape[2])) for w, numbers in zip(in_rows, visited, strict=True)
    ]
    b_in = weights.b_in
    grad_x, grad_b_in = x.new_empty(x.shape), None if b_in is None else x.new_empty(b_in.shape)
    grads = [grad_x, values[0], grad_b_in, values[1], values[2]]
    _backward("backward_visited", grads, grad_y, x, weights, leaf, scores, config)
    sparse = [
        None if w is None else _sparse_rows(numbers, of_rows, w.shape)
        for w, numbers, of_rows in zip(in_rows, visited, values, strict=True)
    ]
    return grad_x, sparse[0], grad_b_in, sparse[1], sparse[2]


def _sparse_rows(numbers: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """(trees, rows, features) with `values` in rows of these numbers, counted over all trees."""
    indices = torch.stack((numbers // shape[1], numbers % shape[1]))
    return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=True, check_invariants=False)


def _backward(
    kind: str,
    grads: Sequence[Tensor | None],
    grad_y: Tensor,
    x: Tensor,
    weights: Weights,
    leaf: Tensor,
    scores: Tensor,
    config: TreeConfig,
) -> None:
    """Fill `grads`, fresh tensors of x, w_in, b_in, w_out and b_out."""
    kept, saved = dense(weights.w_in, weights.w_out, weights.b_out, x, grad_y), dense(leaf, scores)
    for grad in grads:
        if grad is not None:
            on_huge_pages(grad)
    call(
        f"fastff_{kind}_{SUFFIXES[x.dtype]}",
        ctypes.byref(_c_tree(config)),
        *map(pointer, kept),
        x.shape[0],
        *map(pointer, saved),
        *map(pointer, grads),
        get_num_threads(),
    )


class _Plan(ctypes.Structure):
    """fastff_plan of csrc/fastff.h."""

    _fields_ = (
        ("threads", ctypes.c_int32),
        ("sorted_levels", ctypes.c_int32),
        ("block_rows", ctypes.c_int64),
        ("pair_at_least", ctypes.c_int32),
        ("lockstep_below", ctypes.c_int32),
    )


def explain(config: TreeConfig, rows: int, dtype: torch.dtype, threads: int | None) -> Explanation:
    """How the kernels would cut the work, and what it is expected to cost. Raises BackendUnavailable for the dtype."""
    if dtype in HALF:
        dtype = torch.float32  # in which they are computed
    if dtype not in SUFFIXES:
        raise BackendUnavailable(f"backend 'native' takes float64, float32, bfloat16 and float16, not {dtype}")
    plan = _Plan()
    asked = threads or get_num_threads()
    call("fastff_plan_forward", ctypes.byref(_c_tree(config)), 0, rows, asked, ctypes.addressof(plan))
    if plan.sorted_levels:
        form, reason = "sorted", "many rows: sorted by subtree, so that a subtree's rows and weights stay in the cache"
    elif rows >= plan.lockstep_below:
        form, reason = "grouped", "the rows of a node are scored together, so that its weights are read once"
    else:
        form, reason = "lockstep", "few rows walk down side by side, so that loads of one hide the latency of another"
    choices = {name: getattr(plan, name) for name, _ in _Plan._fields_} | {"isa": isa()}
    predicted = conditional_us(config, rows, plan.threads, dtype.itemsize)
    return Explanation("native", form, reason, choices, predicted, dense_us(config, rows, asked))


def new_pack(config: TreeConfig, weights: Weights, quantization: str | None) -> int:
    """Address of a packed copy of fp32 weights, to be freed with `fastff_packed_free`."""
    handle, kept = ctypes.c_void_p(), dense(*weights)
    tree = ctypes.byref(_c_tree(config))
    call("fastff_pack_f32", tree, *map(pointer, kept), _WEIGHTS[quantization], ctypes.addressof(handle))
    return handle.value or 0


def watch_pack(pack: int, places: Sequence[int]) -> None:
    """Let calls of the pack find it stale from when the four bytes at one of these addresses change."""
    array = (ctypes.c_void_p * len(places))(*places)
    call("fastff_packed_watch", pack, ctypes.addressof(array), len(places))


def pack_bytes(pack: int) -> int:
    """Memory of a pack; 0 for none."""
    return int(library().fastff_packed_bytes(pack))


def forward_packed(pack: int, rows: Tensor, config: TreeConfig) -> Routed | None:
    """Output, leaf and margin of rows (rows, in_features), contiguous fp32; None if the pack is stale."""
    y = on_huge_pages(rows.new_empty(len(rows), config.out_features))
    leaf = torch.empty(len(rows), config.trees, dtype=torch.int64)
    margin = rows.new_empty(len(rows))
    outputs = map(pointer, (y, leaf, margin))
    status = library().fastff_forward_packed_f32(pack, pointer(rows), len(rows), *outputs, get_num_threads())
    if status not in (OK, STALE):
        raise FastffError(last_error())
    return Routed(y, leaf, margin) if status == OK else None


def checksum(tensor: Tensor) -> int:
    """A number that tells whether any byte of a contiguous tensor changed."""
    return int(library().fastff_checksum(pointer(tensor), tensor.nbytes))


def read_memory(tensor: Tensor, streams: int = 1) -> int:
    """The sum of a tensor's words, read by one core as fast as it can, in so many parts side by side: for timing. Its
    bytes are a multiple of 256 * streams."""
    total = ctypes.c_uint64()
    call("fastff_read_memory", pointer(tensor), tensor.nbytes, streams, ctypes.byref(total))
    return total.value


def peek(address: int) -> int:
    """The four bytes that lie there."""
    return ctypes.c_uint32.from_address(address).value
