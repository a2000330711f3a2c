"""Tensors as kernels read them: the values themselves in memory, row by row."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def dense(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Each tensor contiguous, and with its negative or conjugate bit carried out, which `contiguous` alone leaves as a
    note beside the memory. No copy where nothing is to be done."""
    return tuple(None if t is None else t.resolve_conj().resolve_neg().contiguous() for t in tensors)
