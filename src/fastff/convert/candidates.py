"""What each candidate costs and spoils, measured before the long work: its time, its error, its loss."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from fastff.convert.capture import Captured
from fastff.convert.choose_layers import (
    LatencyProfile,
    Option,
    Shape,
    refuse,
    shapes_of,
    shares_of,
    shortlist,
)
from fastff.convert.conversion_settings import ConversionSettings
from fastff.convert.distil import end_loss, normaliser, teach_layer, use_masked_training
from fastff.convert.latency import latency_profile, layer_us, place_name, place_of
from fastff.convert.student import dense_layers, describe_tree, flops, stored_neurons
from fastff.models.families import DenseWeights, family_of
from fastff.models.feedforward import ConvertedFeedforward
from fastff.models.kinds import Kind
from fastff.report.progress import Progress, silent
from fastff.text.examples import Examples

STEPS = 20  # of a candidate alone
STEP_ROWS, PASSES = 2048, 4  # of such a step, and how many times the dense layer's work it is, about
SPLIT_FLOPS = 400  # of a row, a dimension and a level: products with a vector, slower than those with a matrix
HELD_OUT_EXAMPLES = 128  # that its loss_increase is measured on, or
HELD_OUT_FLOATS = 2**27  # as many as the teacher's outputs on them may take


@dataclass(frozen=True)
class Survey:
    """What is known before any text is read: times of the dense model, and the shapes worth trying."""

    profile: LatencyProfile
    shapes: tuple[Shape, ...]


class Timer:
    """Times of described layers with fresh weights, each measured once."""

    def __init__(self, model: Any, settings: ConversionSettings) -> None:
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


def survey(teacher: Any, settings: ConversionSettings, progress: Progress = silent) -> Survey:
    """Time the model and every shape. Raises ValueError, naming the best reachable, for a budget out of reach."""
    dense = dense_layers(teacher)
    shapes = shapes_of(settings, dense[0])
    if not shapes:
        least = least_share(dense[0], settings)
        raise ValueError(f"active {settings.share:.2%} is below {least:.2%}, the least for this layer")
    place = place_of(teacher, settings.time_on)
    timed = teacher if teacher.device.type == place.type else copy.deepcopy(teacher).to(place)
    profile, timer = latency_profile(timed, settings.shapes, settings.timing_s), Timer(teacher, settings)
    slowness, stored = [], []
    for k, shape in enumerate(shapes):
        description = shape.fit(dense[0], settings.share)
        assert description is not None
        slowness.append(max(new / old for new, old in zip(timer(description), profile.dense_us[0], strict=True)))
        stored.append(stored_neurons(description))
        progress("timing", k + 1, len(shapes))
    kept = [shapes[k] for k in shortlist(shapes, slowness, stored)]
    if settings.speedup is None:
        if min(slowness) >= 1 and not settings.keep_slow:
            raise ValueError(
                f"no layer is faster as a tree at active {settings.share:.1%} on {place_name(place)}: ask for less"
                + (", or time it on the CPU if the model will run on one" if place.type == "cuda" else "")
            )
        return Survey(profile, tuple(kept))
    fastest = {shape: _fastest(shape, dense, profile, timer, settings) for shape in kept}
    able = [shape for shape in kept if profile.reach(fastest[shape]) >= settings.speedup]
    if not able:
        raise refuse(settings.speedup, profile, max(map(profile.reach, fastest.values())))
    return Survey(profile, tuple(able))


def least_share(dense: DenseWeights, settings: ConversionSettings) -> float:
    """Share of the work of the smallest tree that can be made of a layer."""
    least = describe_tree(dense, trees=1, depth=3, leaf_width=2, shared=settings.shared or 0)
    return min(flops(dense, least), dense.flops_per_row) / dense.flops_per_row


def _fastest(
    shape: Shape, dense: Sequence[DenseWeights], profile: LatencyProfile, timer: Timer, settings: ConversionSettings
) -> list[tuple[float, ...]]:
    """Least microseconds [block][shape] of the dense layer and a shape's candidates."""
    out = []
    for layer, dense_us in zip(dense, profile.dense_us, strict=True):
        tried = [timer(d) for share in shares_of(settings) if (d := shape.fit(layer, share)) is not None]
        out.append(tuple(min(column) for column in zip(dense_us, *tried, strict=True)))
    return out


class Trials:
    """Tries candidates in the dense model: trained alone on few rows, then its output compared on held-out text."""

    def __init__(
        self, teacher: Any, kind: Kind, captured: Sequence[Captured], held_out: Examples, settings: ConversionSettings
    ) -> None:
        self.teacher, self.kind, self.captured, self.settings = teacher, kind, captured, settings
        self.dense = dense_layers(teacher)
        self.family = family_of(teacher.config.model_type)
        some = held_out.slice(0, _examples_kept(held_out, teacher, kind))
        self.batches = [some.batch(which, teacher.device) for which in some.in_order(settings.batch)]
        self.trained_s = float("inf")  # of the candidate that was trained fastest
        with torch.no_grad():
            self.wanted = [teacher(**inputs, output_hidden_states=True) for inputs in self.batches]

    def try_out(self, block: int, description: dict[str, Any]) -> tuple[float, float]:
        """`distil.unexplained` on rows kept aside, and the loss increase: `distil.end_loss` with this layer alone
        replaced."""
        at = self.family.blocks_of(self.teacher)[block]
        module = ConvertedFeedforward(description, self.teacher.config.hidden_size).to(self.teacher.device)
        use_masked_training([module], self.teacher.device.type == "cuda")
        for parameter in at.parameters():
            parameter.requires_grad_(False)
        start = time.perf_counter()
        unexplained = teach_layer(
            module,
            self.dense[block],
            normaliser(self.teacher, at),
            self.captured[block],
            steps=min(STEPS, self.settings.layer_steps),
            seed=block,
            rows=self.settings.probe_rows,
        )
        self.trained_s = min(self.trained_s, time.perf_counter() - start)
        loss_increase = 0.0
        with torch.no_grad(), self.family.replaced(at, module):
            for inputs, wanted in zip(self.batches, self.wanted, strict=True):
                got = self.teacher(**inputs, output_hidden_states=True)
                loss_increase += float(end_loss(got, wanted, inputs["attention_mask"], self.kind)) / len(self.batches)
        return unexplained, loss_increase

    def estimated_s(self, found: Survey) -> float:
        """Seconds of a candidate, from its floating-point operations and the dense model's times."""
        settings, dense = self.settings, self.dense[0]
        description = found.shapes[0].fit(dense, settings.share)
        assert description is not None
        tokens = [sequences * length for sequences, length in settings.shapes]
        row_s = min(us / n for us, n in zip(found.profile.dense_us[0], tokens, strict=True)) * 1e-6
        token_s = min(us / n for us, n in zip(found.profile.model_us, tokens, strict=True)) * 1e-6
        hidden, neurons = dense.w_in.shape[1], stored_neurons(description)
        rows = min(settings.probe_rows, len(self.captured[0]))
        splits = description["trees"] * description["depth"] * (hidden + neurons) * SPLIT_FLOPS * rows
        regression = 2 * rows * neurons * (neurons + hidden) + 4 * neurons**3 / 3
        steps = min(STEPS, settings.layer_steps) * STEP_ROWS * PASSES
        held_out = sum(int(inputs["attention_mask"].sum()) for inputs in self.batches)
        seconds: float = row_s * ((splits + regression) / dense.flops_per_row + steps) + token_s * held_out
        return seconds


def _examples_kept(held_out: Examples, teacher: Any, kind: Kind) -> int:
    """How many held-out examples to keep the teacher's outputs of, within HELD_OUT_FLOATS."""
    config = teacher.config
    a_token = config.hidden_size * (config.num_hidden_layers + 1)
    a_token += config.vocab_size if kind in ("causal", "masked") else 0
    longest = int((held_out.offsets[1:] - held_out.offsets[:-1]).max())
    room = HELD_OUT_FLOATS // int(a_token * longest)
    return max(1, min(len(held_out), HELD_OUT_EXAMPLES, room))


def trial_count(trials: Trials, found: Survey, shares: Sequence[float]) -> int:
    """Candidates that `probe` tries if no limit stops it."""
    return len(found.shapes) + len(trials.dense) * len(shares)


def probe(
    trials: Trials, found: Survey, shares: Sequence[float], progress: Progress, out_of_time: Callable[[], bool]
) -> tuple[list[list[Option]], list[dict[str, Any]]]:
    """Options of every block, the dense layer first, and what was measured of each shape on the middle block.

    The shape that leaves least unexplained there is used in all blocks, as wide as each of `shares` allows. Once
    out_of_time(), no more is tried but one block: others then have the figures of the nearest that was tried."""
    middle = len(trials.dense) // 2
    total, timer = trial_count(trials, found, shares), Timer(trials.teacher, trials.settings)
    done = count(1)
    tried: list[dict[str, Any]] = []
    best: tuple[float, Shape] | None = None
    for shape in found.shapes:
        if best is not None and out_of_time():
            break
        description = shape.fit(trials.dense[middle], trials.settings.share)
        assert description is not None
        unexplained, increase = trials.try_out(middle, description)
        tried.append(
            {
                "description": description,
                "times_us": timer(description),
                "unexplained": unexplained,
                "loss_increase": increase,
            }
        )
        best = min(best or (unexplained, shape), (unexplained, shape), key=lambda pair: pair[0])
        progress("probe", next(done), total)
    assert best is not None
    measured = _try_blocks(trials, best[1], shares, lambda: progress("probe", next(done), total), out_of_time)
    return [_options(k, layer, best[1], measured, timer, found) for k, layer in enumerate(trials.dense)], tried


def _try_blocks(
    trials: Trials,
    shape: Shape,
    shares: Sequence[float],
    progress: Callable[[], None],
    out_of_time: Callable[[], bool],
) -> dict[float, dict[int, tuple[float, float]]]:
    """Unexplained variance and loss increase by share and block; every share is tried on one block at least, and the
    blocks of the share asked for come first, evenly spread."""
    blocks = len(trials.dense)
    spread = sorted(range(blocks), key=lambda k: (f"{k:016b}"[::-1], k))
    nearest_first = sorted(shares, key=lambda share: abs(share - trials.settings.share))
    order = [(share, spread[0]) for share in nearest_first]
    order += [(share, k) for share in nearest_first for k in spread[1:]]
    measured: dict[float, dict[int, tuple[float, float]]] = {share: {} for share in shares}
    for share, block in order:
        fitted, late = shape.fit(trials.dense[block], share), out_of_time()
        if fitted is not None and not (measured[share] and late):
            measured[share][block] = trials.try_out(block, fitted)
        progress()
    return measured


def _options(
    block: int,
    layer: DenseWeights,
    shape: Shape,
    measured: dict[float, dict[int, tuple[float, float]]],
    timer: Timer,
    found: Survey,
) -> list[Option]:
    options = [Option(None, 1.0, found.profile.dense_us[block])]
    for share, figures in measured.items():
        fitted = shape.fit(layer, share)
        if fitted is not None and figures:
            nearest = min(figures, key=lambda other: abs(other - block))
            work = flops(layer, fitted) / layer.flops_per_row
            options.append(Option(fitted, work, timer(fitted), *figures[nearest], measured_on=nearest))
    return options
