"""A layer's weights packed for inference, and the shortest way from Python to the kernel.

A pack is a snapshot: made whole from the four tensors of one moment, never changed, replaced whole by the next one.
What is packed is compared with the layer's weights at every call:
- the tensors themselves, their version counters and their addresses, so that a replaced parameter, an optimiser's step,
  an edit in place and new `.data` are seen at once;
- four bytes of each tensor (the first of w_in, the last of the others), for edits of whole tensors that bypass the
  counters, as `p.data.mul_(2)` does;
- a checksum of all weights, at the call after one that recorded gradients, and again after so many rows that they read
  RECHECK times the bytes of all weights. It costs as much as reading the weights once, 2.5 ms for 25 MB, which is about
  one hundredth of the time of those rows.
An edit of a part of a tensor that bypasses the counters (`p.data[3] = 0`, a write through numpy) may therefore be
missed until that check, unless it is made within `PackedLayer.updating`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastff.config import TreeConfig
from fastff.errors import FastffError, ShapeError
from fastff.ops import native
from fastff.ops.eager import are_plain
from fastff.ops.followed import RECHECK, Stamp, checksum_of, packed_whole, stamp_of, watched
from fastff.ops.library import last_error, library, thread_counter
from fastff.ops.reference import Routed
from fastff.ops.weights import HALF, Weights

# One call into C: no other thread runs between the first tensor and the last.
_take = itemgetter(*Weights._fields)
_FLOAT32, _empty_like = torch.float32, torch.empty_like

Parameters = Mapping[str, Tensor | None]


class _Pack:
    """The packed copy in the core's memory; freed with its last user, which may be a call of another thread."""

    __slots__ = ("_aliases", "_free", "address")

    def __init__(self, config: TreeConfig, weights: Weights, quantization: str | None) -> None:
        self._free = library().fastff_packed_free
        self._aliases = [tensor.detach() for tensor in weights.present]  # what is watched must stay where it is
        floats = weights.map(lambda tensor: tensor.detach().float())
        self.address = native.new_pack(config, floats, quantization)
        native.watch_pack(self.address, watched(weights.present))

    def __del__(self) -> None:
        if hasattr(self, "address"):
            self._free(self.address)


class _Snapshot(NamedTuple):
    """What was packed."""

    weights: Weights
    stamp: Stamp
    checksum: tuple[int, ...]
    pack: _Pack

    @property
    def quick(self) -> tuple[Any, ...]:
        """What a call looks at: the four tensors, their dtype, version and address of w_in and w_out, the tensors whose
        stamp is compared beside these (the biases; all, of tensors made in inference mode, which have no version), what
        reads it, that stamp, the pack's address. A plain tuple is taken apart fastest."""
        w_in, b_in, w_out, b_out = self.weights
        counted = not any(tensor.is_inference() for tensor in self.weights.present)
        short = (w_in._version, w_in.data_ptr(), w_out._version, w_out.data_ptr()) if counted else None
        rest = [tensor for tensor in (b_in, b_out) if tensor is not None] if counted else self.weights.present
        read = _counted_stamp if counted else stamp_of
        return (*self.weights, w_in.dtype, short, rest, read, read(rest), self.pack.address, self)

    def shows(self, weights: Weights) -> bool:
        """Whether these are the tensors that were packed, unchanged as far as counters and addresses tell."""
        same = all(now is then for now, then in zip(weights, self.weights, strict=True))
        return same and stamp_of(weights.present) == self.stamp


_NOTHING = (None, None, None, None, None, None, (), None, (), 0, None)


class PackedLayer:
    """The snapshot of one layer in use. Memory: one copy of the weights in fp32; quantised, the smaller copy and the
    routing nodes' w_in in fp32, from which scores near zero are computed again. While a pack is replaced, calls of
    other threads may keep the former one a moment longer."""

    def __init__(self, config: TreeConfig, quantization: str | None = None) -> None:
        self._config = config
        self._quantization = quantization
        self._same_width = config.in_features == config.out_features
        self._large_rows = native.FRESH_BYTES // (4 * config.out_features)
        self._recheck_rows = RECHECK * config.neurons // config.active_neurons
        self._rows_left = 0  # before the checksum is due
        self._accepted: tuple[torch.Size | None, int] = (None, 0)  # shape and rows of the last input, read at once
        self._lock = threading.RLock()
        self._quick: tuple[Any, ...] = _NOTHING  # of the snapshot in use, replaced whole
        self._infer = library().fastff_infer_f32
        self._threads = thread_counter()

    def __reduce__(self) -> tuple[type[PackedLayer], tuple[TreeConfig, str | None]]:
        return PackedLayer, (self._config, self._quantization)  # a copy packs for itself

    @property
    def bytes(self) -> int:
        """Bytes of the packed copy; 0 before the first call and after `drop`."""
        return native.pack_bytes(self.address)

    @property
    def address(self) -> int:
        """Of the pack in the core's memory; 0 as for `bytes`. Valid as long as nothing is packed anew."""
        return int(self._quick[-2])

    @property
    def _snapshot(self) -> _Snapshot | None:
        snapshot: _Snapshot | None = self._quick[-1]
        return snapshot

    def drop(self) -> None:
        """Forget the pack: the next call makes one."""
        self._quick = _NOTHING

    def doubt(self) -> None:
        """Compare all weights with their checksum at the next call."""
        self._rows_left = -1

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Within the block other threads evaluate the weights as they were before it, or wait for its end; whatever the
        block edited, and by whatever means, the first call after it sees whole."""
        with self._lock:
            try:
                yield
            finally:
                self.drop()

    def infer(self, x: Tensor, parameters: Parameters) -> Tensor | None:
        """y (..., out_features) of x (..., in_features), or None if this x or these weights need the registered op.

        parameters: by the names w_in, b_in, w_out, b_out; None if one is missing, as where a parametrization computes
        it."""
        x_dtype = x.dtype
        if (x_dtype is not _FLOAT32 and x_dtype not in HALF) or not x.is_cpu or not x.is_contiguous() or x.is_neg():
            return None
        shape, rows = self._accepted
        if x.shape != shape:
            if x.dim() == 0 or x.shape[-1] != self._config.in_features:
                return None
            rows = x.numel() // self._config.in_features
            self._accepted = (x.shape, rows)
        try:
            now_in, now_b_in, now_out, now_b_out = _take(parameters)
        except KeyError:
            return None
        w_in, b_in, w_out, b_out, dtype, short, rest, read, stamp, address, snapshot = self._quick
        self._rows_left -= rows
        if (
            now_in is not w_in
            or now_out is not w_out
            or now_b_in is not b_in
            or now_b_out is not b_out
            or x_dtype is not dtype
            or self._rows_left < 0
            or (short and (w_in._version, w_in.data_ptr(), w_out._version, w_out.data_ptr()) != short)
            or (rest and read(rest) != stamp)
        ):
            snapshot = self._renewed(partial(_weights, parameters), x_dtype)
            if snapshot is None:
                return None
            address = snapshot.pack.address
        if x_dtype is not _FLOAT32:
            x = x.float()
        y = _empty_like(x) if self._same_width else x.new_empty((*x.shape[:-1], self._config.out_features))
        if rows >= self._large_rows:
            native.on_huge_pages(y)
        status = self._infer(address, x.data_ptr(), y.data_ptr(), rows, self._threads())
        if status:
            if status != native.STALE:
                raise FastffError(last_error())
            self._forget(snapshot)
            return self.infer(x.to(x_dtype), parameters)
        return y if x_dtype is _FLOAT32 else y.to(x_dtype)

    def routed(self, rows: Tensor, take: Callable[[], Weights]) -> Routed | None:
        """Output, leaf and margin of rows (rows, in_features), contiguous fp32 on the CPU, by the weights that `take`
        gives; None if these cannot be packed. Raises ShapeError for their shapes."""
        self._rows_left -= len(rows)
        while (snapshot := self._renewed(take)) is not None:
            routed = native.forward_packed(snapshot.pack.address, rows, self._config)
            if routed is not None:
                return routed
            self._forget(snapshot)
        return None

    def _forget(self, stale: _Snapshot) -> None:
        """Drop a pack that the core found stale, unless another thread has replaced it already."""
        with self._lock:
            if self._snapshot is stale:
                self.drop()

    def _renewed(self, take: Callable[[], Weights], dtype: torch.dtype | None = None) -> _Snapshot | None:
        """The snapshot of the weights as they are now, packed if they changed; None if they cannot be packed or are of
        another dtype. Waits for threads that pack or are within `updating`."""
        with self._lock:
            try:
                weights = take()
            except KeyError:  # taken away meanwhile
                return None
            if not _packable(weights, self._config) or dtype not in (None, weights.w_in.dtype):
                return None
            snapshot, checked = self._snapshot, self._rows_left >= 0
            if snapshot is not None and snapshot.shows(weights):
                if checked:
                    return snapshot
                if snapshot.checksum == checksum_of(weights.present):
                    self._rows_left = self._recheck_rows
                    return snapshot
            self.drop()  # before the new copy comes
            snapshot = self._packed(weights)
            self._quick, self._rows_left = snapshot.quick, self._recheck_rows
            return snapshot

    def _packed(self, weights: Weights) -> _Snapshot:
        make = partial(_Pack, self._config, weights, self._quantization)
        return _Snapshot(weights, *packed_whole(weights.present, make))


def _weights(parameters: Parameters) -> Weights:
    return Weights(*_take(parameters))


def _packable(weights: Weights, config: TreeConfig) -> bool:
    """Whether the core can read the tensors where they lie: plain, of one dtype, dense and present in memory."""
    try:
        weights.check(config)
    except ShapeError:
        return False
    present = weights.present
    return are_plain(present) and all(
        tensor.dtype == weights.w_in.dtype
        and (tensor.dtype == torch.float32 or tensor.dtype in HALF)
        and tensor.is_cpu
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and tensor.untyped_storage().nbytes() >= (tensor.storage_offset() + tensor.numel()) * tensor.itemsize
        for tensor in present
    )


def _counted_stamp(tensors: Sequence[Tensor]) -> Stamp:
    """`stamp_of` tensors that all have a counter, in less time."""
    return tuple([x for t in tensors for x in (t._version, t.data_ptr())])
