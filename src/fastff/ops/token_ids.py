"""Token ids on their way into the C++ core, which takes 32 bits of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastff.errors import FastffError

_LARGEST = 2**31 - 1


def token_ids(ids: Sequence[int] | Tensor) -> Tensor:
    """ids as (tokens,) int32. Raises FastffError for what is not whole numbers that fit: converting would make other,
    valid ids of them. The core knows the vocabulary."""
    if not isinstance(ids, Tensor) and len(ids) == 0:
        return torch.empty(0, dtype=torch.int32)
    try:
        given = torch.as_tensor(ids)
    except (RuntimeError, TypeError, ValueError) as error:
        raise FastffError(f"token ids are not a row of whole numbers: {error}") from error
    if given.dim() != 1 or given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise FastffError(f"token ids are {given.dtype} {tuple(given.shape)}, expected a row of whole numbers")
    least, largest = (int(end) for end in torch.aminmax(given))
    if least < -_LARGEST or largest > _LARGEST:
        raise FastffError(f"token {least if least < 0 else largest} is outside every vocabulary")
    return given.to(torch.int32).contiguous()
