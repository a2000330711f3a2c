"""Encoders in the C++ core, called through ctypes: immutable, so that any number of threads may run one at once."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastff.errors import ShapeError
from fastff.ops.library import Owner, call, pointer
from fastff.ops.token_ids import token_ids

__all__ = ["NativeEncoder"]


class _Facts(ctypes.Structure):
    """fastff_encoder_facts of csrc/model/fastff_model.h."""

    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ("vocab_size", "positions", "types", "hidden", "layers", "bytes")
    )

    vocab_size: int
    positions: int
    types: int
    hidden: int
    layers: int
    bytes: int


class NativeEncoder(Owner):
    """An encoder's file, opened. map: share its pages with other processes instead of a copy on huge pages.

    Raises FastffError for a file that is missing, damaged or of another version.
    """

    of = "encoder"

    def __init__(self, path: Path, *, map: bool = False) -> None:
        super().__init__()
        self._opened = path, map
        call("fastff_encoder_open", os.fsencode(path), map, ctypes.byref(self._handle))
        facts = _Facts()
        call("fastff_encoder_describe", self._handle, ctypes.addressof(facts))
        self.vocab_size, self.positions, self.types = facts.vocab_size, facts.positions, facts.types
        self.hidden, self.layers = facts.hidden, facts.layers

    def __reduce__(self) -> tuple[Any, ...]:
        path, map = self._opened
        return partial(NativeEncoder, map=map), (path.absolute(),)  # another process opens the file itself

    def run(
        self,
        ids: Sequence[int] | Tensor,
        lengths: Sequence[int],
        *,
        types: Sequence[int] | Tensor | None = None,
        threads: int = 0,
    ) -> Tensor:
        """Hidden states (tokens, hidden) of sequences that lie end to end in ids (tokens,); types likewise.

        threads: at most how many work on the call, 0 for all that this process may use. Raises ShapeError for lengths
        that do not sum to the tokens, FastffError for a token, type or length out of range.
        """
        rows = token_ids(ids)
        kinds = None if types is None else token_ids(types)
        if sum(lengths) != len(rows) or (kinds is not None and kinds.shape != rows.shape):
            raise ShapeError(f"ids {tuple(rows.shape)} are not the {sum(lengths)} tokens of the lengths, types alike")
        counts = torch.tensor(lengths, dtype=torch.int64)
        hidden = torch.empty(len(rows), self.hidden)
        data = (pointer(rows), pointer(kinds), pointer(counts), len(lengths))
        call("fastff_encoder_run", self._handle, *data, pointer(hidden), threads)
        return hidden
