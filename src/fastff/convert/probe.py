"""What each candidate costs and spoils, measured before the long work: its time here, its error, its harm."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastff.convert.capture import Captured, Progress
from fastff.convert.distil import Kind, end_loss, normaliser, teach_layer, use_masked_training
from fastff.convert.measure import clock, layer_us, place_name, place_of
from fastff.convert.plan import (
    Clock,
    Option,
    Shape,
    refuse,
    shapes_of,
    shares_of,
    shortlist,
)
from fastff.convert.settings import Settings
from fastff.convert.student import dense_layers, describe_tree, flops, stored_neurons
from fastff.models.families import DenseWeights, family_of
from fastff.models.feedforward import ConvertedFeedforward
from fastff.text.examples import Examples

STEPS = 20  # of a candidate alone
HELD_OUT_EXAMPLES = 128  # that its harm is measured on, or
HELD_OUT_FLOATS = 2**27  # as many as the teacher's outputs on them may take


@dataclass(frozen=True)
class Survey:
    """What is known before any text is read: times of the dense model, and the shapes worth trying."""

    clock: Clock
    shapes: tuple[Shape, ...]


class Timer:
    """Times of described layers with fresh weights, each measured once."""

    def __init__(self, model: Any, settings: Settings) -> None:
        self.width, self.settings = model.config.hidden_size, settings
        self.device = place_of(model, settings.time_on)
        self._known: dict[str, tuple[float, ...]] = {}

    def __call__(self, description: dict[str, Any]) -> tuple[float, ...]:
        key = str(description)
        if key not in self._known:
            layer = ConvertedFeedforward(description, self.width).to(self.device).eval()
            xs = [torch.randn(*shape, self.width, device=self.device) for shape in self.settings.shapes]
            self._known[key] = tuple(layer_us({key: layer}, x, self.settings.timing_s)[key] for x in xs)
        return self._known[key]


def survey(teacher: Any, settings: Settings, progress: Progress = lambda *_: None) -> Survey:
    """Time the model and every shape. Raises ValueError, naming the best reachable, for a budget out of reach."""
    dense = dense_layers(teacher)
    shapes = shapes_of(settings, dense[0])
    if not shapes:
        least = least_share(dense[0], settings)
        raise ValueError(f"active {settings.share:.2%} is below {least:.2%}, the least for this layer")
    place = place_of(teacher, settings.time_on)
    timed = teacher if teacher.device.type == place.type else copy.deepcopy(teacher).to(place)
    model_clock, timer = clock(timed, settings.shapes, settings.timing_s), Timer(teacher, settings)
    slowness, stored = [], []
    for k, shape in enumerate(shapes):
        description = shape.fit(dense[0], settings.share)
        assert description is not None
        slowness.append(max(new / old for new, old in zip(timer(description), model_clock.dense_us[0], strict=True)))
        stored.append(stored_neurons(description))
        progress("timing", k + 1, len(shapes))
    kept = [shapes[k] for k in shortlist(shapes, slowness, stored)]
    if settings.speedup is None:
        if min(slowness) >= 1 and not settings.keep_slow:
            raise ValueError(
                f"no layer is faster as a tree at active {settings.share:.1%} on {place_name(place)}: ask for less"
                + (", or time it on the CPU if the model will run on one" if place.type == "cuda" else "")
            )
        return Survey(model_clock, tuple(kept))
    fastest = {shape: _fastest(shape, dense, model_clock, timer, settings) for shape in kept}
    able = [shape for shape in kept if model_clock.reach(fastest[shape]) >= settings.speedup]
    if not able:
        raise refuse(settings.speedup, model_clock, max(map(model_clock.reach, fastest.values())))
    return Survey(model_clock, tuple(able))


def least_share(dense: DenseWeights, settings: Settings) -> float:
    """Share of the work of the smallest tree that can be made of a layer."""
    least = describe_tree(dense, trees=1, depth=3, leaf_width=2, shared=settings.shared or 0)
    return min(flops(dense, least), dense.flops_per_row) / dense.flops_per_row


def _fastest(
    shape: Shape, dense: Sequence[DenseWeights], model_clock: Clock, timer: Timer, settings: Settings
) -> list[tuple[float, ...]]:
    """Least microseconds [block][shape] of the dense layer and a shape's candidates."""
    out = []
    for layer, dense_us in zip(dense, model_clock.dense_us, strict=True):
        tried = [timer(d) for share in shares_of(settings) if (d := shape.fit(layer, share)) is not None]
        out.append(tuple(min(column) for column in zip(dense_us, *tried, strict=True)))
    return out


class Bench:
    """Tries candidates in the dense model: taught alone on few rows, then its output compared on held-out text."""

    def __init__(
        self, teacher: Any, kind: Kind, captured: Sequence[Captured], held_out: Examples, settings: Settings
    ) -> None:
        self.teacher, self.kind, self.captured, self.settings = teacher, kind, captured, settings
        self.dense = dense_layers(teacher)
        self.family = family_of(teacher.config.model_type)
        some = held_out.slice(0, _examples_kept(held_out, teacher, kind))
        self.batches = [some.batch(which, teacher.device) for which in some.in_order(settings.batch)]
        with torch.no_grad():
            self.wanted = [teacher(**inputs, output_hidden_states=True) for inputs in self.batches]

    def try_out(self, block: int, description: dict[str, Any]) -> tuple[float, float]:
        """`distil.missed` on rows kept aside, and the harm: `distil.end_loss` with this layer alone replaced."""
        at = self.family.blocks_of(self.teacher)[block]
        module = ConvertedFeedforward(description, self.teacher.config.hidden_size).to(self.teacher.device)
        use_masked_training([module], self.teacher.device.type == "cuda")
        for parameter in at.parameters():
            parameter.requires_grad_(False)
        missed = teach_layer(
            module,
            self.dense[block],
            normaliser(self.teacher, at),
            self.captured[block],
            steps=min(STEPS, self.settings.layer_steps),
            seed=block,
            rows=self.settings.probe_rows,
        )
        harm = 0.0
        with torch.no_grad(), self.family.replaced(at, module):
            for inputs, wanted in zip(self.batches, self.wanted, strict=True):
                got = self.teacher(**inputs, output_hidden_states=True)
                harm += float(end_loss(got, wanted, inputs["attention_mask"], self.kind)) / len(self.batches)
        return missed, harm


def _examples_kept(held_out: Examples, teacher: Any, kind: Kind) -> int:
    """How many held-out examples to keep the teacher's outputs of, within HELD_OUT_FLOATS."""
    config = teacher.config
    a_token = config.hidden_size * (config.num_hidden_layers + 1)
    a_token += config.vocab_size if kind in ("causal", "masked") else 0
    longest = int((held_out.offsets[1:] - held_out.offsets[:-1]).max())
    room = HELD_OUT_FLOATS // int(a_token * longest)
    return max(1, min(len(held_out), HELD_OUT_EXAMPLES, room))


def probe(
    bench: Bench, found: Survey, shares: Sequence[float], progress: Progress
) -> tuple[list[list[Option]], list[dict[str, Any]]]:
    """Options of every block, the dense layer first, and what was measured of each shape on the middle block.

    The shape that missed least there is used in all blocks, as wide as each of `shares` allows."""
    settings, dense = bench.settings, bench.dense
    timer, middle = Timer(bench.teacher, settings), len(bench.dense) // 2
    total, done, tried = len(found.shapes) + len(dense) * len(shares), 0, []
    best: tuple[float, Shape] | None = None
    for shape in found.shapes:
        description = shape.fit(dense[middle], settings.share)
        assert description is not None
        missed, harm = bench.try_out(middle, description)
        tried.append({"description": description, "times_us": timer(description), "missed": missed, "harm": harm})
        best = min(best or (missed, shape), (missed, shape), key=lambda pair: pair[0])
        done += 1
        progress("probe", done, total)
    assert best is not None
    options = []
    for k, layer in enumerate(dense):
        mine = [Option(None, 1.0, found.clock.dense_us[k])]
        for share in shares:
            fitted = best[1].fit(layer, share)
            if fitted is not None:
                missed, harm = bench.try_out(k, fitted)
                mine.append(Option(fitted, flops(layer, fitted) / layer.flops_per_row, timer(fitted), missed, harm))
            done += 1
            progress("probe", done, total)
        options.append(mine)
    return options, tried
