"""Packed copies that follow the tensors they were made from: when a copy must be made again, and how it is made whole.

`fastff.ops.packed` says what of an edit is seen at once and what within a bounded number of rows; it is the same here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

from fastff.errors import FastffError
from fastff.ops import native

RECHECK = 256
_ATTEMPTS = 3  # to pack weights that another thread is editing

Stamp = tuple[int, ...]
Pack = TypeVar("Pack")


def stamp_of(tensors: Sequence[Tensor]) -> Stamp:
    """Version (0 without a counter) and address of each."""
    return tuple([x for t in tensors for x in (0 if t.is_inference() else t._version, t.data_ptr())])


def checksum_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Of all bytes of each; costs as much as reading them once."""
    return tuple([native.checksum(tensor.detach().contiguous()) for tensor in tensors])


def packed_whole(tensors: Sequence[Tensor], make: Callable[[], Pack]) -> tuple[Stamp, tuple[int, ...], Pack]:
    """Stamp and checksum of the tensors, and what `make` packed of them: made again while another thread edits, because
    what was read while it wrote belongs to no moment."""
    for _ in range(_ATTEMPTS):
        seen = stamp_of(tensors), checksum_of(tensors)
        pack = make()
        if seen == (stamp_of(tensors), checksum_of(tensors)):
            break
    return *seen, pack


def watched(tensors: Sequence[Tensor]) -> list[int]:
    """Addresses of four bytes of each contiguous tensor: the first of the first one, the last of the others."""
    large = [tensor for tensor in tensors if tensor.nbytes >= 4 and tensor.is_contiguous()]
    return [t.data_ptr() + (0 if t is tensors[0] else t.nbytes - 4) for t in large]


class _Seen(NamedTuple, Generic[Pack]):
    tensors: tuple[Tensor | None, ...]
    aliases: list[Tensor]  # what is watched must stay where it is
    stamp: Stamp
    watched: list[int]
    bytes: list[int]
    checksum: tuple[int, ...]
    pack: Pack

    def shows(self, tensors: Sequence[Tensor | None], present: Sequence[Tensor]) -> bool:
        """Whether these are the tensors that were packed, unchanged as far as counters, addresses and the watched bytes
        tell."""
        same = len(tensors) == len(self.tensors) and all(a is b for a, b in zip(tensors, self.tensors, strict=True))
        return same and stamp_of(present) == self.stamp and [native.peek(at) for at in self.watched] == self.bytes


class FollowedPack(Generic[Pack]):
    """The packed copy in use of some tensors.

    limit: how much may be read by way of the copy before all tensors are compared with their checksum, in any unit;
    RECHECK times what the tensors hold makes that about one hundredth of the time of those reads."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._left = 0
        self._seen: _Seen[Pack] | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[FollowedPack[Pack]], tuple[int]]:
        return type(self), (self._limit,)  # a copy packs for itself

    def drop(self) -> None:
        """Forget the copy: the next call makes one."""
        self._seen = None

    def doubt(self) -> None:
        """Compare all tensors with their checksum at the next call."""
        self._left = -1

    def of(self, tensors: Sequence[Tensor | None], reads: int, make: Callable[[], Pack]) -> Pack:
        """The copy of these tensors as they are now, for a call that reads so much of it; `make` packs them.

        Raises FastffError for tensors without memory."""
        present = [tensor for tensor in tensors if tensor is not None]
        with self._lock:
            self._left -= reads
            seen = self._seen
            if seen is not None and seen.shows(tensors, present):
                if self._left >= 0:
                    return seen.pack
                if seen.checksum == checksum_of(present):
                    self._left = self._limit
                    return seen.pack
            del seen
            self.drop()  # before the new copy comes
            if any(tensor.numel() > 0 and tensor.data_ptr() == 0 for tensor in present):
                raise FastffError("the weights have no memory: their storage was emptied")
            aliases = [tensor.detach() for tensor in present]
            places = watched(present)
            seen_bytes = [native.peek(at) for at in places]  # before packing: an edit after it shows
            stamp, checksum, pack = packed_whole(present, make)
            self._seen = _Seen(tuple(tensors), aliases, stamp, places, seen_bytes, checksum, pack)
            self._left = self._limit
            return pack
