"""The C++ kernels of a tree layer, called through ctypes: fp32 and fp64 on the CPU."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastff.config import ACTIVATIONS, GATES, TreeConfig
from fastff.errors import BackendUnavailable, FastffError
from fastff.ops.cost import conditional_us, dense_us
from fastff.ops.explanation import Explanation
from fastff.ops.library import OK, SUFFIXES, call, library, pointer
from fastff.ops.reference import Routed

_STALE = 4
_WEIGHTS = {None: 0, "bf16": 1, "int8": 2}  # by the name of a quantisation: enum fastff_weights
_NAMES = ("w_in", "b_in", "w_out", "b_out")
_FLOAT32, _empty_like, _get_num_threads = torch.float32, torch.empty_like, torch.get_num_threads
# From this size on a tensor may be memory that malloc has fresh from the system, to be faulted in page by page as it is
# written (above 32 MB it always is, with glibc). On small pages that doubles the time of 16384 rows of 768 features; on
# huge pages it adds a fifth.
_FRESH_BYTES = 2**22


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
    """Name of the instruction set in use: scalar, avx2, avx512, avx512dot (with VNNI and BF16) or neon."""
    name: bytes = library().fastff_isa()
    return name.decode()


def set_isa(name: str) -> None:
    """Use another instruction set from now on. Raises BackendUnavailable if it is unknown or this CPU lacks it."""
    if library().fastff_set_isa(name.encode()) != OK:
        raise BackendUnavailable(library().fastff_error().decode())


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
    if x.dtype not in SUFFIXES:
        return f"backend 'native' takes float32 and float64, x is {x.dtype}"
    return None


def _dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _on_huge_pages(fresh: Tensor) -> Tensor:
    """The same tensor, not yet written, on huge pages if it is large and the system has them."""
    if fresh.nbytes >= _FRESH_BYTES:
        library().fastff_advise_huge_pages(fresh.data_ptr(), fresh.nbytes)
    return fresh


def forward(
    x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, b_out: Tensor | None, *, config: TreeConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (rows, out_features), leaf (rows, trees), margin (rows,), scores (rows, trees, path_scores) of x (rows, in)."""
    rows = x.shape[0]
    y = _on_huge_pages(x.new_empty(rows, config.out_features))
    leaf = torch.empty(rows, config.trees, dtype=torch.int64)
    margin = x.new_empty(rows)
    scores = x.new_empty(rows, config.trees, config.path_scores)
    kept = _dense(w_in, b_in, w_out, b_out, x)
    inputs = [pointer(tensor) for tensor in kept]
    outputs = [pointer(tensor) for tensor in (y, leaf, margin, scores)]
    name = f"fastff_forward_{SUFFIXES[x.dtype]}"
    call(name, ctypes.addressof(_c_tree(config)), *inputs, rows, *outputs, torch.get_num_threads())
    return y, leaf, margin, scores


def backward(
    grad_y: Tensor,
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    leaf: Tensor,
    scores: Tensor,
    *,
    config: TreeConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w_in, b_in, w_out, b_out; an empty tensor for an absent bias."""
    given = (x, w_in, b_in, w_out, b_out)
    grads = [x.new_empty(0 if tensor is None else tensor.shape) for tensor in given]
    _backward("backward", grads, grad_y, x, w_in, w_out, b_out, leaf, scores, config)
    return grads[0], grads[1], grads[2], grads[3], grads[4]


def backward_visited(
    grad_y: Tensor,
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    leaf: Tensor,
    scores: Tensor,
    *,
    config: TreeConfig,
) -> tuple[Tensor | None, ...]:
    """As `backward`; the gradients of w_in, w_out and b_out are sparse tensors (COO over trees and rows, coalesced) of
    the rows that x visits, and nothing is computed or kept for the others. None for an absent bias."""
    weights = {"w_in": w_in, "w_out": w_out, "b_out": b_out}
    room = [torch.empty(0 if w is None else w.shape[0] * w.shape[1], dtype=torch.int64) for w in weights.values()]
    counts = torch.empty(3, dtype=torch.int64)
    tree, rows = ctypes.addressof(_c_tree(config)), leaf.contiguous()
    call("fastff_visited", tree, pointer(rows), len(rows), *map(pointer, room), pointer(counts))
    visited = [numbers[:count] for numbers, count in zip(room, counts.tolist(), strict=True)]
    values = [
        x.new_empty(0 if w is None else (len(numbers), w.shape[2]))
        for w, numbers in zip(weights.values(), visited, strict=True)
    ]
    grad_x, grad_b_in = x.new_empty(x.shape), None if b_in is None else x.new_empty(b_in.shape)
    grads = [grad_x, values[0], grad_b_in, values[1], values[2]]
    _backward("backward_visited", grads, grad_y, x, w_in, w_out, b_out, leaf, scores, config)
    sparse = [
        None if w is None else _sparse_rows(numbers, of_rows, w.shape)
        for w, numbers, of_rows in zip(weights.values(), visited, values, strict=True)
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
    w_in: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    leaf: Tensor,
    scores: Tensor,
    config: TreeConfig,
) -> None:
    """Fill `grads`, fresh tensors of x, w_in, b_in, w_out and b_out."""
    kept, saved = _dense(w_in, w_out, b_out, x, grad_y), _dense(leaf, scores)
    for grad in grads:
        if grad is not None:
            _on_huge_pages(grad)
    call(
        f"fastff_{kind}_{SUFFIXES[x.dtype]}",
        ctypes.addressof(_c_tree(config)),
        *map(pointer, kept),
        x.shape[0],
        *map(pointer, saved),
        *map(pointer, grads),
        torch.get_num_threads(),
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
    if dtype not in SUFFIXES:
        raise BackendUnavailable(f"backend 'native' takes float32 and float64, not {dtype}")
    plan = _Plan()
    asked = threads or torch.get_num_threads()
    call("fastff_plan_forward", ctypes.addressof(_c_tree(config)), 0, rows, asked, ctypes.addressof(plan))
    if plan.sorted_levels:
        form, reason = "sorted", "many rows: sorted by subtree, so that a subtree's rows and weights stay in the cache"
    elif rows >= plan.lockstep_below:
        form, reason = "grouped", "the rows of a node are scored together, so that its weights are read once"
    else:
        form, reason = "lockstep", "few rows walk down side by side, so that loads of one hide the latency of another"
    choices = {name: getattr(plan, name) for name, _ in _Plan._fields_} | {"isa": isa()}
    predicted = conditional_us(config, rows, plan.threads, dtype.itemsize)
    return Explanation("native", form, reason, choices, predicted, dense_us(config, rows, asked))


class PackedLayer:
    """A layer's weights packed for inference, and the shortest way from Python to the kernel.

    The pack is made at the first call and made again when a parameter was replaced or its version counter moved;
    an edit of a whole tensor that bypasses the counter (through `.data`) is caught by one weight of each.
    Parameters and inputs are fp32. Memory beside the parameters: one copy of the weights; quantised, the smaller copy
    and the routing nodes' w_in in fp32, from which scores near zero are computed again.
    """

    def __init__(self, config: TreeConfig, quantization: str | None = None) -> None:
        self._config = config
        self._quantization = quantization
        self._weights = _WEIGHTS[quantization]
        self._same_width = config.in_features == config.out_features
        self._large_rows = _FRESH_BYTES // (4 * config.out_features)
        self._handle = ctypes.c_void_p()
        self.address = 0  # of the C handle; 0 before the first call
        self._accepted: tuple[torch.Size | None, int] = (None, 0)  # shape and rows of the last input, read at once
        self._lock = threading.Lock()
        # What was packed: the tensors, then their versions and addresses.
        self._w_in: Tensor | None = None
        self._w_out: Tensor | None = None
        self._state = (0, 0, 0, 0)
        self._biases: _BiasState | None = None
        self._infer = library().fastff_infer_f32
        self._free = library().fastff_packed_free

    def __del__(self) -> None:
        if self._handle:
            self._free(self._handle)

    def __reduce__(self) -> tuple[type[PackedLayer], tuple[TreeConfig, str | None]]:
        return PackedLayer, (self._config, self._quantization)  # a copy packs for itself

    @property
    def bytes(self) -> int:
        """Bytes of the packed copy; 0 before the first call."""
        return int(library().fastff_packed_bytes(self._handle)) if self._handle else 0

    def __call__(self, x: Tensor, parameters: Mapping[str, Tensor | None]) -> Tensor | None:
        """y (..., out_features) of x (..., in_features), or None if this x or these weights need the registered op.

        parameters: by the names w_in, b_in, w_out, b_out."""
        if x.dtype is not _FLOAT32 or not x.is_cpu or not x.is_contiguous():
            return None
        shape, rows = self._accepted
        if x.shape != shape:
            if x.dim() == 0 or x.shape[-1] != self._config.in_features:
                return None
            rows = x.numel() // self._config.in_features
            self._accepted = (x.shape, rows)
        w_in, w_out = parameters["w_in"], parameters["w_out"]
        if (
            w_in is not self._w_in
            or w_out is not self._w_out
            or w_in is None
            or w_out is None
            or (w_in._version, w_out._version, w_in.data_ptr(), w_out.data_ptr()) != self._state
            or (self._biases is not None and _bias_state(parameters) != self._biases)
        ) and not self._pack(parameters):
            return None
        y = _empty_like(x) if self._same_width else x.new_empty((*x.shape[:-1], self._config.out_features))
        if rows >= self._large_rows:
            _on_huge_pages(y)
        status = self._infer(self.address, x.data_ptr(), y.data_ptr(), rows, _get_num_threads())
        if status == _STALE:
            self._pack(parameters, edited=True)
            return self(x, parameters)
        if status != OK:
            raise FastffError(library().fastff_error().decode())
        return y

    def routed(self, rows: Tensor, parameters: Mapping[str, Tensor | None]) -> Routed | None:
        """Output, leaf and margin of rows (rows, in_features), contiguous fp32 on the CPU; None as for a call."""
        if self(rows[:0], parameters) is None:  # packs what changed
            return None
        y = _on_huge_pages(rows.new_empty(len(rows), self._config.out_features))
        leaf = torch.empty(len(rows), self._config.trees, dtype=torch.int64)
        margin = rows.new_empty(len(rows))
        call(
            "fastff_forward_packed_f32",
            self._handle,
            pointer(rows),
            len(rows),
            *(pointer(tensor) for tensor in (y, leaf, margin)),
            torch.get_num_threads(),
        )
        return Routed(y, leaf, margin)

    def _pack(self, parameters: Mapping[str, Tensor | None], *, edited: bool = False) -> bool:
        """Pack unless another thread did so while this one waited, or the values were edited behind the counters."""
        ordered = [parameters[name] for name in _NAMES]
        w_in, _, w_out, _ = ordered
        present = [tensor for tensor in ordered if tensor is not None]
        # Tensors made in inference mode have no version counter to follow.
        if any(p.dtype != torch.float32 or not p.is_cpu or not p.is_contiguous() or p.is_inference() for p in present):
            return False
        if w_in is None or w_out is None:
            return False
        state = (w_in._version, w_out._version, w_in.data_ptr(), w_out.data_ptr())
        biases = _bias_state(parameters) if len(present) > 2 else None
        with self._lock:
            same = self._w_in is w_in and self._w_out is w_out and self._state == state and self._biases == biases
            if same and not edited:
                return True
            self._w_in = self._w_out = None
            pointers = [pointer(tensor) for tensor in ordered]
            if self._handle:
                call("fastff_repack_f32", self._handle, *pointers)
            else:
                tree = ctypes.addressof(_c_tree(self._config))
                call("fastff_pack_f32", tree, *pointers, self._weights, ctypes.byref(self._handle))
                self.address = self._handle.value or 0
            call("fastff_packed_watch_f32", self._handle, pointers[0], pointers[2])
            self._state, self._biases = state, biases
            self._w_in, self._w_out = w_in, w_out
        return True


_BiasState = tuple[tuple[int, int, int], ...]  # identity, version and address of each bias


def _bias_state(parameters: Mapping[str, Tensor | None]) -> _BiasState:
    biases = (parameters["b_in"], parameters["b_out"])
    return tuple([(id(b), b._version, b.data_ptr()) for b in biases if b is not None])
