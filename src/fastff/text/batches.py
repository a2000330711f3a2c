"""Which windows a step learns from, and their masks: a function of the seed and the position alone.

A step's rows are cut into equal micro-batches. Process r of n takes micro-batches r, r + n, ...; each draws its masks
from its own seed. So a run on another number of processes, or a resumed one, sees the same rows with the same masks.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fastff.errors import TrainingError
from fastff.text.tokens import Tokens
from fastff.text.windows import mask_tokens

Batch = dict[str, Tensor]
Numbers = np.ndarray[tuple[int], np.dtype[np.int64]]
_SEED_STEP = 1_000_003


class Batches:
    """Micro-batches of windows [first, last) of `tokens`, shuffled anew in every pass. share: of the words, masked.

    Raises TrainingError if there is no window.
    """

    def __init__(self, tokens: Tokens, first: int, last: int, *, seed: int, causal: bool, share: float = 0.25) -> None:
        if last <= first:
            raise TrainingError(f"no windows to learn from: {last - first} of {len(tokens)}")
        self.tokens, self.first, self.last = tokens, first, last
        self.seed, self.causal, self.share = seed, causal, share

    def numbers(self, position: int, count: int) -> Numbers:
        """Window numbers (count,) of the rows that begin `position` rows after the start of training."""
        total = self.last - self.first
        found: list[Numbers] = []
        while count > 0:
            passed, offset = divmod(position, total)
            piece = _order(self.seed, passed, total)[offset : offset + count]
            found.append(piece)
            position, count = position + len(piece), count - len(piece)
        return self.first + np.concatenate(found)

    def micro_batch(self, position: int, count: int) -> Batch:
        """input_ids and labels (count, seq_len) int64 of the `count` rows that begin at `position`."""
        windows = self.tokens.windows(self.numbers(position, count))
        if self.causal:
            return {"input_ids": windows, "labels": windows.clone()}
        inputs, labels = self.masked(windows, self.seed * _SEED_STEP + position)
        return {"input_ids": inputs, "labels": labels}

    def masked(self, windows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels; the same seed masks the same."""
        vocabulary = self.tokens.vocabulary
        generator = torch.Generator().manual_seed(seed)
        return mask_tokens(
            windows,
            mask=vocabulary.mask,
            vocab_size=vocabulary.size,
            special=vocabulary.special,
            generator=generator,
            share=self.share,
        )


@lru_cache(maxsize=1)  # one pass at a time: a billion tokens have eight million windows
def _order(seed: int, passed: int, total: int) -> Numbers:
    return np.random.default_rng([seed, passed]).permutation(total)
