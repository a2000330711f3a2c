"""What a conversion costs and gains on this machine: layer times, latency, the ceiling of any selection, routing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastff.conditional import ConditionalFeedforward
from fastff.convert.capture import Captured
from fastff.convert.choose_layers import LatencyProfile
from fastff.convert.distil import normaliser, unexplained
from fastff.convert.engine_latency import ENGINES
from fastff.convert.neurons import contribution, hidden_of
from fastff.convert.student import dense_layers
from fastff.layers import FFF
from fastff.models.families import DenseWeights, family_of
from fastff.models.feedforward import ConvertedFeedforward
from fastff.text.examples import Examples
from fastff.timing import interleaved

Shapes = Sequence[tuple[int, int]]  # (sequences, tokens a sequence) of timed calls
WHOLE = 6  # times as long as a layer, whole models are timed
PATIENCE = 20.0  # seconds; calls that take longer are measured once
FRACTIONS = (0.5, 0.25, 0.1)
ORACLE_ROWS = 2048


@torch.inference_mode()
def layer_us(layers: Mapping[str, nn.Module], x: Tensor, seconds: float) -> dict[str, float]:
    """Median microseconds of each layer on rows x (sequences, tokens, hidden)."""
    return _medians_us({name: partial(layer, x) for name, layer in layers.items()}, seconds, x.device)


@torch.inference_mode()
def model_us(
    models: Mapping[str, Any], shape: tuple[int, int], seconds: float, *, picture: tuple[int, ...] | None = None
) -> dict[str, float]:
    """Median microseconds of each whole model on random tokens of a shape, cut to the positions that it has.

    picture: channels, height and width of an image model's pictures; it reads as many as the shape has sequences."""
    model = next(iter(models.values()))
    inputs = _token_inputs(model, shape) if picture is None else _picture_inputs(model, shape[0], picture)
    return _medians_us({name: partial(model, **inputs) for name, model in models.items()}, seconds, model.device)


def _token_inputs(model: Any, shape: tuple[int, int]) -> dict[str, Tensor]:
    length = min(shape[1], getattr(model.config, "max_position_embeddings", shape[1] + 2) - 2)
    ids = torch.randint(5, model.config.vocab_size, (shape[0], length), device=model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _picture_inputs(model: Any, count: int, picture: tuple[int, ...]) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, *picture, device=model.device)}


def _medians_us(calls: Mapping[str, Callable[[], object]], seconds: float, device: torch.device) -> dict[str, float]:
    timings = interleaved(calls, seconds, device, patience=PATIENCE)
    return {name: timing.p50_us for name, timing in timings.items()}


def place_of(model: Any, time_on: str | None) -> torch.device:
    """Where a model is timed: where it is, or on the device that was named; engines run on the CPU."""
    if time_on in ENGINES:
        return torch.device("cpu")
    return torch.device(model.device if time_on is None else time_on)


def timed_on(model: Any, time_on: str | None) -> str:
    """The name of that place, with the engine."""
    place = place_name(place_of(model, time_on))
    return f"{time_on} engine, {place}" if time_on in ENGINES else place


def place_name(device: torch.device) -> str:
    """A GPU's name, or how many of the CPU's threads are used."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU, {(threads := torch.get_num_threads())} thread{'s' * (threads > 1)}"


def latency_profile(
    model: Any, shapes: Shapes, seconds: float, picture: tuple[int, ...] | None = None
) -> LatencyProfile:
    """Time the dense model and its feedforwards; blocks of equal size are timed once. picture: as in `model_us`."""
    family, width = family_of(model.config.model_type), model.config.hidden_size
    sizes = [layer.w_in.shape for layer in dense_layers(model)]
    cache: dict[Any, tuple[float, ...]] = {}
    for block, size in zip(family.blocks_of(model), sizes, strict=True):
        if size not in cache:
            layer = family.dense_of(block)
            xs = [torch.randn(*shape, width, device=model.device) for shape in shapes]
            cache[size] = tuple(layer_us({"dense": layer}, x, seconds)["dense"] for x in xs)
    return LatencyProfile(
        model_us=tuple(
            model_us({"dense": model}, shape, WHOLE * seconds, picture=picture)["dense"] for shape in shapes
        ),
        dense_us=tuple(cache[size] for size in sizes),
    )


def feedforward_us(
    models: Mapping[str, Any], captured: Sequence[Captured], shape: tuple[int, int], seconds: float
) -> dict[str, float]:
    """Microseconds that all feedforwards of each model take on captured rows of a shape, block by block interleaved."""
    total = dict.fromkeys(models, 0.0)
    for k, rows in enumerate(captured):
        layers = {}
        for name, model in models.items():
            family = family_of(model.config.model_type)
            block = family.blocks_of(model)[k]
            slot = family.slot_of(block)
            layers[name] = slot if isinstance(slot, ConvertedFeedforward) else family.dense_of(block)
            device = model.device
        x = rows.rows(slice(0, shape[0] * shape[1]), device)[0]
        x = x.repeat(-(-shape[0] * shape[1] // len(x)), 1)[: shape[0] * shape[1]].view(*shape, -1)
        for name, taken in layer_us(layers, x, seconds).items():
            total[name] += taken
    return total


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
def best_selection_unexplained(
    model: Any, block: int, captured: Captured, fractions: Sequence[float] = FRACTIONS
) -> dict[str, float]:
    """The ceiling of any selection: `distil.unexplained` of the best neurons of each row, by the fraction kept."""
    dense = dense_layers(model)[block]
    norm = normaliser(model, family_of(model.config.model_type).blocks_of(model)[block])
    rows = captured.rows(slice(0, ORACLE_ROWS), model.device)
    return {
        str(fraction): float(unexplained(norm, dense, _Oracle(dense, max(1, round(fraction * dense.neurons))), *rows))
        for fraction in fractions
    }


@torch.no_grad()
def routing(model: Any, examples: Examples, batches: int = 8) -> list[dict[str, Any]]:
    """Per conditional layer, over held-out examples: mean entropy of the leaves in bits (of `most_bits`), and leaves
    never used."""
    layers = [m for m in model.modules() if isinstance(m, FFF | ConditionalFeedforward)]
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
                "most_bits": math.log2(usage.counts.shape[1]),
                "entropy_bits": float(usage.entropy_bits.mean()),
                "dead_leaves": int(usage.dead_leaves.sum()),
                "leaves": usage.counts.numel(),
            }
        )
    return out
