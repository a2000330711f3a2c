"""Decoders in the C++ core, called through ctypes: an immutable model, and sessions that hold a conversation."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastff.errors import FastffError
from fastff.ops.library import Owner, call, library, pointer, processors
from fastff.ops.token_ids import token_ids

__all__ = ["NativeModel", "NativeSession", "Sampling"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn.

    temperature  0 takes the likeliest token; above, probabilities are those of logits / temperature
    top_k        only the likeliest tokens; 0 for all
    top_p        only the likeliest tokens whose probabilities reach it; 1 for all
    seed         of the random numbers
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


class _Facts(ctypes.Structure):
    """fastff_model_facts of csrc/model/fastff_model.h."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("vocab_size", "positions", "hidden", "layers", "bytes"))

    vocab_size: int
    positions: int
    hidden: int
    layers: int
    bytes: int


_LEAST = float(torch.finfo(torch.float32).tiny)


class _Sampling(ctypes.Structure):
    """fastff_sampling of csrc/model/fastff_model.h."""

    _fields_ = (("temperature", ctypes.c_float), ("top_p", ctypes.c_float), ("top_k", ctypes.c_int64))


class NativeModel(Owner):
    """A model file, opened. map: share its pages with other processes instead of a copy on huge pages.

    Raises FastffError for a file that is missing, damaged or of another version.
    """

    of = "model"

    def __init__(self, path: Path, *, map: bool = False) -> None:
        super().__init__()
        self._opened = path, map
        call("fastff_model_open", os.fsencode(path), map, ctypes.byref(self._handle))
        facts = _Facts()
        call("fastff_model_describe", self._handle, ctypes.addressof(facts))
        self.vocab_size, self.positions = facts.vocab_size, facts.positions
        self.hidden, self.layers = facts.hidden, facts.layers

    def __reduce__(self) -> tuple[Any, ...]:
        path, map = self._opened
        return partial(NativeModel, map=map), (path.absolute(),)  # another process opens the file itself

    @property
    def handle(self) -> ctypes.c_void_p:
        return self._handle


class NativeSession(Owner):
    """The tokens of one conversation and what the model keeps of them, up to `capacity` positions.

    One thread at a time may use it. threads: at most how many work on a call, 0 for all that this process may use.
    Raises FastffError for a capacity that the model or the memory lacks.
    """

    of = "session"

    def __init__(self, model: NativeModel, capacity: int, *, threads: int = 0) -> None:
        super().__init__()
        self.model = model  # which must live as long
        self.threads = threads or processors()
        self.capacity = capacity
        call("fastff_session_new", model.handle, capacity, ctypes.byref(self._handle))

    def __len__(self) -> int:
        return int(library().fastff_session_length(self._handle))

    def rewind(self, length: int = 0) -> None:
        """Forget all but the first `length` tokens."""
        call("fastff_session_rewind", self._handle, length)

    def feed(self, ids: Sequence[int], *, want_logits: bool = False) -> Tensor | None:
        """Read tokens after those read so far; with want_logits the logits (len(ids), vocab_size) after each of them.

        Raises FastffError for tokens outside the vocabulary, or more than fit; then none is read.
        """
        tokens = token_ids(ids)
        logits = torch.empty(len(tokens), self.model.vocab_size) if want_logits else None
        call("fastff_session_feed", self._handle, pointer(tokens), len(tokens), pointer(logits), self.threads)
        return logits

    def feed_one(self, token: int) -> None:
        """`feed` of one token, the shortest way."""
        if not 0 <= token < self.model.vocab_size:
            raise FastffError(f"token {token} is outside the vocabulary of {self.model.vocab_size}")
        call("fastff_session_feed", self._handle, ctypes.byref(ctypes.c_int32(token)), 1, None, self.threads)

    def seed(self, seed: int) -> None:
        call("fastff_session_seed", self._handle, seed & (1 << 64) - 1)

    def sample(self, sampling: Sampling) -> int:
        """Draw the next token; it is not read yet."""
        top_p = max(sampling.top_p, _LEAST) if sampling.top_p > 0 else sampling.top_p  # in fp32 it would be 0
        settings = _Sampling(sampling.temperature, top_p, sampling.top_k)
        token = ctypes.c_int32()
        call("fastff_session_sample", self._handle, ctypes.byref(settings), ctypes.byref(token))
        return token.value
