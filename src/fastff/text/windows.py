"""Rows of tokens for masked-language-model training: packing into windows, masking an exact number of positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastff.errors import ShapeError

IGNORED = -100  # label of a position that is not to be predicted


def pack(tokens: Sequence[int], *, seq_len: int, first: int, last: int) -> Tensor:
    """Cut one text's tokens into windows (windows, seq_len) int64, each between the tokens `first` and `last`.

    What does not fill a window at the end is dropped. Raises ShapeError for a seq_len below 3.
    """
    if seq_len < 3:
        raise ShapeError(f"seq_len {seq_len} is not at least 3: first token, one of the text, last token")
    inner = seq_len - 2
    windows = len(tokens) // inner
    body = torch.tensor(list(tokens[: windows * inner]), dtype=torch.int64).view(windows, inner)
    start, end = torch.full((windows, 1), first), torch.full((windows, 1), last)
    return torch.cat((start, body, end), 1)


def mask_tokens(
    tokens: Tensor, *, mask: int, vocab_size: int, special: int, generator: torch.Generator, share: float = 0.25
) -> tuple[Tensor, Tensor]:
    """Choose exactly `round(share * n)`, at least one, of the n ordinary tokens of each row; returns inputs and labels.

    tokens (rows, seq_len) int64; ids below `special` are special and never chosen. Of the chosen, 80 % become `mask`,
    10 % a random ordinary token, 10 % stay. labels are the tokens where chosen and -100 elsewhere; a row without
    ordinary tokens has none.
    """
    ordinary = tokens >= special
    count = (ordinary.sum(1) * share).round().long().clamp(min=1)
    draw = torch.rand(tokens.shape, generator=generator).masked_fill(~ordinary, 2.0)
    rank = draw.argsort(1).argsort(1)
    chosen = (rank < count.unsqueeze(1)) & ordinary
    fate = torch.rand(tokens.shape, generator=generator)
    random = torch.randint(special, vocab_size, tokens.shape, generator=generator)
    replaced = torch.where(fate < 0.8, mask, torch.where(fate < 0.9, random, tokens))
    return torch.where(chosen, replaced, tokens), torch.where(chosen, tokens, IGNORED)
