"""What a conversion costs and gains on this machine: layer times, latency, the ceiling of any selection, routing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastff.convert.capture import Captured
from fastff.convert.distil import missed, normaliser
from fastff.convert.initialise import contribution, hidden_of
from fastff.convert.student import dense_layers
from fastff.convert.text import Examples
from fastff.layers import FFF
from fastff.models.converted import ConvertedFeedforward
from fastff.models.families import DenseWeights, family_of

ROWS = 128  # of a timed call: one sentence of this many tokens
FRACTIONS = (0.25, 0.1, 0.05, 0.02)
ORACLE_ROWS = 2048


def _median_us(call: Callable[[], object], seconds: float = 0.15) -> float:
    call()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples) < 5:
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) * 1e6)
    return statistics.median(samples)


@torch.no_grad()
def layer_times(model: Any, descriptions: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Median microseconds of each dense layer and its tree (fresh weights) on the model's device, 128 rows a call."""
    family, width = family_of(model.config.model_type), model.config.hidden_size
    x = torch.randn(ROWS, width, device=model.device)
    cache: dict[str, float] = {}
    out = []
    for block, description in zip(family.blocks_of(model), descriptions, strict=True):
        key = str(description)
        if key not in cache:  # blocks of one model are alike
            tree = ConvertedFeedforward(description, width).to(model.device).eval()
            cache[key] = _median_us(lambda tree=tree: tree(x))  # type: ignore[misc]
        slot = family.slot_of(block)
        tail: nn.Module = block.get_submodule("output.dense") if family.norm is not None else nn.Identity()
        dense = _median_us(lambda slot=slot, tail=tail: tail(slot(x)))  # type: ignore[misc]
        out.append({"dense_us": dense, "new_us": cache[key]})
    return out


@torch.no_grad()
def latency_ms(model: Any) -> float:
    """Median milliseconds of the whole model on one sentence of 128 tokens, on its device."""
    length = min(ROWS, getattr(model.config, "max_position_embeddings", ROWS) - 2)
    ids = torch.randint(5, model.config.vocab_size, (1, length), device=model.device)
    mask = torch.ones_like(ids)
    model.eval()
    return _median_us(lambda: model(input_ids=ids, attention_mask=mask), seconds=1.0) / 1e3


class _Oracle(nn.Module):
    """The dense layer with only the `keep` neurons that contribute most to each row."""

    def __init__(self, dense: DenseWeights, keep: int) -> None:
        super().__init__()
        self.dense, self.keep = dense, keep

    def forward(self, x: Tensor) -> Tensor:
        value = contribution(self.dense, x)
        least = value.topk(self.keep, dim=-1).values[..., -1:]
        y: Tensor = torch.where(value >= least, hidden_of(self.dense, x), 0) @ self.dense.w_out
        return y if self.dense.b_out is None else y + self.dense.b_out


@torch.no_grad()
def oracle_missed(model: Any, block: int, captured: Captured) -> dict[str, float]:
    """The ceiling of any selection: `distil.missed` of the best neurons of each row, by the fraction that is kept."""
    dense = dense_layers(model)[block]
    norm = normaliser(model, family_of(model.config.model_type).blocks_of(model)[block])
    rows = captured.rows(slice(0, ORACLE_ROWS), model.device)
    return {
        str(fraction): float(missed(norm, dense, _Oracle(dense, max(1, round(fraction * dense.neurons))), *rows))
        for fraction in FRACTIONS
    }


@torch.no_grad()
def routing(model: Any, examples: Examples, batches: int = 8) -> list[dict[str, Any]]:
    """Per tree layer, over held-out text: mean entropy of the leaves in bits (of `depth`), and leaves never used."""
    layers = [m for m in model.modules() if isinstance(m, FFF)]
    for layer in layers:
        layer.track_usage()
        layer.reset_usage()
    model.eval()
    for which in list(examples.in_order(16))[:batches]:
        model(**examples.batch(which, model.device))
    out = []
    for layer in layers:
        usage = layer.usage()
        layer.track_usage(False)
        out.append(
            {
                "depth": layer.config.depth,
                "entropy_bits": float(usage.entropy_bits.mean()),
                "dead_leaves": int(usage.dead_leaves.sum()),
                "leaves": layer.config.trees * layer.config.leaves,
            }
        )
    return out
