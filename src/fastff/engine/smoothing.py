"""Activations that lose less when a row is rounded to 8 bits with one scale: large channels made smaller.

A few channels of an encoder's normalised rows are many times as large as the others, in every row, and the scale is
theirs. Each channel is divided by a factor and the weights' column multiplied by it, which changes nothing but the
rounding of both. Which channels are large is learnt from random tokens of the model's own vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["channel_maxima", "smoothing"]

_SEQUENCES, _LENGTH, _SEED = 16, 64, 0
_STRENGTH = 0.75  # of a channel's size, how much moves into the weights: 0 nothing, 1 all
_LEAST = 1e-5  # of the largest channel, below which a channel counts as no smaller: dead ones have no size


def channel_maxima(base: Any, vocab_size: int, positions: int) -> Mapping[nn.Module, Tensor]:
    """Largest |x| of every channel (in_features,) before each linear layer of an encoder, over random tokens."""
    found: dict[nn.Module, Tensor] = {}

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        largest = inputs[0].detach().flatten(0, -2).abs().amax(0)
        found[module] = torch.maximum(largest, found[module]) if module in found else largest

    hooks = [m.register_forward_pre_hook(look) for m in base.modules() if isinstance(m, nn.Linear)]
    training = base.training
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(vocab_size, (_SEQUENCES, min(_LENGTH, positions)), generator=generator)
    try:
        base.eval()
        with torch.no_grad():
            base(input_ids=ids)
    finally:
        base.train(training)
        for hook in hooks:
            hook.remove()
    return found


def smoothing(largest: Tensor, weights: Iterable[Tensor]) -> Tensor:
    """What channels of x (in_features,) are divided by, and columns of the weights (.., in_features) multiplied by.

    largest: of `channel_maxima`. The factors' geometric mean is 1.
    """
    columns = torch.stack([w.detach().abs().amax(0) for w in weights]).amax(0)
    size, weight = (v.clamp_min(_LEAST * float(v.max())) for v in (largest.double(), columns.double()))
    if not (size.isfinite().all() and weight.isfinite().all() and size.min() > 0 and weight.min() > 0):
        return torch.ones_like(columns)  # all zero, or not finite: what is wrong shows where the weights are stored
    factors = size.log() * _STRENGTH - weight.log() * (1 - _STRENGTH)
    return (factors - factors.mean()).exp().float()
