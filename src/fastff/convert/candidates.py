"""What each candidate costs and spoils, measured before the long work: its time, its error, its loss."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count, zip_longest
from typing import Any

import torch

from fastff.convert.capture import Captured
from fastff.convert.choose_layers import (
    PLAIN,
    Candidate,
    LatencyProfile,
    Option,
    Plain,
    refuse,
    shapes_of,
    shares_of,
    shortlist,
)
from fastff.convert.conversion_settings import ConversionSettings
from fastff.convert.distil import normaliser, prune_layer, teach_layer, use_masked_training
from fastff.convert.distil_loss import end_loss
from fastff.convert.engine_latency import ENGINES, EngineTimes
from fastff.convert.latency import WHOLE, latency_profile, layer_us, place_of, timed_on
from fastff.convert.student import dense_layers, flops, stored_neurons
from fastff.models.families import DenseWeights, family_of
from fastff.models.feedforward import ConvertedFeedforward
from fastff.models.kinds import Kind
from fastff.report.progress import Progress, silent
from fastff.text.examples import Examples

STEPS = 20  # of a candidate alone
STEP_ROWS, PASSES = 2048, 4  # of such a step, and how many times the dense layer's work it is, about
SPLIT_FLOPS = 400  # of a row, a dimension and a level: products with a vector, slower than those with a matrix
LEADING = 2  # kinds of layers that are tried in every block
HELD_OUT_EXAMPLES = 128  # that its loss_increase is measured on, or
HELD_OUT_FLOATS = 2**27  # as many as the teacher's outputs on them may take


@dataclass(frozen=True)
class Survey:
    """What is known before anything is tried: times of the dense model, and the shapes worth trying."""

    profile: LatencyProfile
    shapes: tuple[Candidate, ...]


class Timer:
    """Times of described layers with fresh weights, each measured once."""

    def __init__(self, model: Any, settings: ConversionSettings) -> None:
        self.width, self.settings = model.config.hidden_size, settings
        self.device = place_of(model, settings.time_on)
        self._known: dict[str, tuple[float, ...]] = {}
        self.engine: EngineTimes | None = None
        if settings.time_on in ENGINES:
            self.engine = EngineTimes(model, settings.time_on, settings.shapes, WHOLE * settings.timing_s)

    def __call__(self, description: dict[str, Any]) -> tuple[float, ...]:
        if self.engine is not None:
            return self.engine.layer(description)
        key = str(description)
        if key not in self._known:
            layer = ConvertedFeedforward(description, self.width).to(self.device).eval()
            xs = [torch.randn(*shape, self.width, device=self.device) for shape in self.settings.shapes]
            self._known[key] = tuple(layer_us({key: layer}, x, self.settings.timing_s)[key] for x in xs)
        return self._known[key]


def survey(
    teacher: Any,
    settings: ConversionSettings,
    progress: Progress = silent,
    *,
    picture: tuple[int, ...] | None = None,
) -> Survey:
    """Time the model and every shape; picture: as in `model_us`. Raises ValueError, naming the best reachable, for a
    budget out of reach."""
    dense = dense_layers(teacher)
    shapes = shapes_of(settings, dense[0]) + [p for p in map(Plain, PLAIN) if p.fit(dense[0], settings.share)]
    if all(shape.kind == "none" for shape in shapes):
        least = least_share(dense[0], settings)
        raise ValueError(f"active {settings.share:.2%} is below {least:.2%}, the least for this layer")
    place, timer = place_of(teacher, settings.time_on), Timer(teacher, settings)
    if timer.engine is not None:
        profile = timer.engine.profile()
    else:
        timed = teacher if teacher.device.type == place.type else copy.deepcopy(teacher).to(place)
        profile = latency_profile(timed, settings.shapes, settings.timing_s, picture)
    slowness, stored = [], []
    for k, shape in enumerate(shapes):
        description = shape.fit(dense[0], settings.share)
        assert description is not None
        slowness.append(
            max(new / max(old, 1e-9) for new, old in zip(timer(description), profile.dense_us[0], strict=True))
        )
        stored.append(stored_neurons(description))
        progress("timing", k + 1, len(shapes))
    kept = worth_trying(shapes, slowness, stored)
    if settings.speedup is None:
        paying = [slow for shape, slow in zip(shapes, slowness, strict=True) if shape.kind != "none"]
        if min(paying) >= 1 and not settings.keep_slow:
            where = timed_on(teacher, settings.time_on)
            hint = ", or time it on the CPU that the model will run on" if place.type == "cuda" else ""
            raise ValueError(
                f"no candidate is faster than the dense layer at active {settings.share:.1%} on {where}: ask for less"
                + hint
            )
        return Survey(profile, tuple(kept))
    fastest = {shape: _fastest(shape, dense, profile, timer, settings) for shape in kept}
    able = [shape for shape in kept if profile.reach(fastest[shape]) >= settings.speedup]
    if not able:
        raise refuse(settings.speedup, profile, max(map(profile.reach, fastest.values())))
    return Survey(profile, tuple(able))


def worth_trying(shapes: Sequence[Candidate], slowness: Sequence[float], stored: Sequence[int]) -> list[Candidate]:
    """The shapes whose error is measured: the shortlist of each kind, the kinds in turn, so that a limit of time leaves
    none of them out."""
    lists = []
    for kind in dict.fromkeys(shape.kind for shape in shapes):
        mine = [k for k, shape in enumerate(shapes) if shape.kind == kind]
        some = shortlist([shapes[k] for k in mine], [slowness[k] for k in mine], [stored[k] for k in mine])
        lists.append([shapes[mine[k]] for k in some])
    return [shape for turn in zip_longest(*lists) for shape in turn if shape is not None]


def least_share(dense: DenseWeights, settings: ConversionSettings) -> float:
    """Share of the work of the smallest layer, of one neuron beside those that are to be shared."""
    return (1 + (settings.shared or 0)) / dense.neurons


def _fastest(
    shape: Candidate, dense: Sequence[DenseWeights], profile: LatencyProfile, timer: Timer, settings: ConversionSettings
) -> list[tuple[float, ...]]:
    """Least microseconds [block][shape] of the dense layer and a shape's candidates."""
    out = []
    for layer, dense_us in zip(dense, profile.dense_us, strict=True):
        tried = [timer(d) for share in shares_of(settings) if (d := shape.fit(layer, share)) is not None]
        out.append(tuple(min(column) for column in zip(dense_us, *tried, strict=True)))
    return out


class Trials:
    """Tries candidates in the dense model: trained alone on few rows, then its output compared on held-out examples."""

    def __init__(
        self, teacher: Any, kind: Kind, captured: Sequence[Captured], held_out: Examples, settings: ConversionSettings
    ) -> None:
        self.teacher, self.kind, self.captured, self.settings = teacher, kind, captured, settings
        self.dense = dense_layers(teacher)
        self.family = family_of(teacher.config.model_type)
        some = held_out.slice(0, _examples_kept(held_out, teacher, kind))
        self.batches = [some.batch(which, teacher.device) for which in some.in_order(settings.batch)]
        self.tokens = some.tokens
        self.trained_s = float("inf")  # of the candidate that was trained fastest
        with torch.no_grad():
            self.wanted = [teacher(**inputs, output_hidden_states=True) for inputs in self.batches]

    def try_out(self, block: int, description: dict[str, Any], *, pruned: bool = False) -> tuple[float, float]:
        """`distil.unexplained` on rows kept aside, and the loss increase: `distil_loss.end_loss` with this layer alone
        replaced. pruned: neurons are left out and nothing is taught."""
        at = self.family.blocks_of(self.teacher)[block]
        module = ConvertedFeedforward(description, self.teacher.config.hidden_size).to(self.teacher.device)
        use_masked_training([module], self.teacher.device.type == "cuda")
        for parameter in at.parameters():
            parameter.requires_grad_(False)
        norm, dense, captured = normaliser(self.teacher, at), self.dense[block], self.captured[block]
        if pruned:
            unexplained = prune_layer(module, dense, norm, captured)
        else:
            steps, rows = min(STEPS, self.settings.layer_steps), self.settings.probe_rows
            start = time.perf_counter()
            unexplained = teach_layer(module, dense, norm, captured, steps=steps, seed=block, rows=rows)
            self.trained_s = min(self.trained_s, time.perf_counter() - start)
        loss_increase = 0.0
        with torch.no_grad(), self.family.replaced(at, module):
            for inputs, wanted in zip(self.batches, self.wanted, strict=True):
                got = self.teacher(**inputs, output_hidden_states=True)
                loss_increase += float(end_loss(got, wanted, inputs.get("attention_mask"), self.kind)) / len(
                    self.batches
                )
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
        splits = description.get("trees", 0) * description.get("depth", 0) * (hidden + neurons) * SPLIT_FLOPS * rows
        regression = 2 * rows * neurons * (neurons + hidden) + 4 * neurons**3 / 3
        steps = min(STEPS, settings.layer_steps) * STEP_ROWS * PASSES
        seconds: float = row_s * ((splits + regression) / dense.flops_per_row + steps) + token_s * self.tokens
        return seconds


def _examples_kept(held_out: Examples, teacher: Any, kind: Kind) -> int:
    """How many held-out examples to keep the teacher's outputs of, within HELD_OUT_FLOATS."""
    config = teacher.config
    a_token = config.hidden_size * (config.num_hidden_layers + 1)
    a_token += config.vocab_size if kind in ("causal", "masked") else 0
    longest = int(held_out.lengths.max())
    room = HELD_OUT_FLOATS // int(a_token * longest)
    return max(1, min(len(held_out), HELD_OUT_EXAMPLES, room))


def trial_count(trials: Trials, found: Survey, shares: Sequence[float]) -> int:
    """Candidates that `probe` tries if no limit stops it."""
    kinds = {shape.kind for shape in found.shapes}
    leading = min(LEADING, len(kinds - {"none"}))
    return len(found.shapes) + len(trials.dense) * (len(shares) * leading + ("none" in kinds))


@dataclass
class Probed:
    """What was measured: unexplained variance and loss increase by kind, share and block; and of each kind the shape
    that left least unexplained on the middle block."""

    shapes: dict[str, Candidate] = field(default_factory=dict)
    measured: dict[tuple[str, float], dict[int, tuple[float, float]]] = field(default_factory=dict)

    def options(
        self, block: int, layer: DenseWeights, timer: Callable[[dict[str, Any]], tuple[float, ...]], found: Survey
    ) -> list[Option]:
        """Of one block, the dense layer first; figures of the nearest block where there are none of its own."""
        options = [Option(None, 1.0, found.profile.dense_us[block])]
        for (kind, share), figures in self.measured.items():
            fitted = self.shapes[kind].fit(layer, share)
            if fitted is not None and figures:
                nearest = min(figures, key=lambda other: abs(other - block))
                work = flops(layer, fitted) / layer.flops_per_row
                options.append(Option(fitted, work, timer(fitted), *figures[nearest], measured_on=nearest, kind=kind))
        return options


def probe(
    trials: Trials, found: Survey, shares: Sequence[float], progress: Progress, out_of_time: Callable[[], bool]
) -> tuple[list[list[Option]], list[dict[str, Any]]]:
    """Options of every block, the dense layer first, and what was measured of each shape on the middle block.

    Of every kind the shape that leaves least unexplained there is kept. The LEADING kinds by their loss increase are
    tried in all blocks, as wide as each of `shares` allows, and so is no layer at all; the others keep the figures of
    the middle block. Once out_of_time(), no more is tried but one block: others then have the figures of the nearest
    that was tried."""
    middle, share = len(trials.dense) // 2, trials.settings.share
    total, timer = trial_count(trials, found, shares), Timer(trials.teacher, trials.settings)
    done = count(1)
    tried: list[dict[str, Any]] = []
    best: dict[str, dict[str, Any]] = {}
    probed = Probed()
    for shape in found.shapes:
        if best and out_of_time():
            break
        description = shape.fit(trials.dense[middle], share)
        assert description is not None
        unexplained, increase = trials.try_out(middle, description, pruned=shape.kind == "pruned")
        figures = {"kind": shape.kind, "description": description, "times_us": timer(description)}
        tried.append(figures | {"unexplained": unexplained, "loss_increase": increase})
        if shape.kind not in best or unexplained < best[shape.kind]["unexplained"]:
            best[shape.kind], probed.shapes[shape.kind] = tried[-1], shape
        progress("probe", next(done), total)
    ranked = sorted((kind for kind in best if kind != "none"), key=lambda kind: best[kind]["loss_increase"])
    everywhere = ranked[:LEADING]
    _try_blocks(trials, probed, everywhere, shares, lambda: progress("probe", next(done), total), out_of_time)
    for kind in ranked[LEADING:]:
        probed.measured[kind, share] = {middle: (best[kind]["unexplained"], best[kind]["loss_increase"])}
    return [probed.options(k, layer, timer, found) for k, layer in enumerate(trials.dense)], tried


def _try_blocks(
    trials: Trials,
    probed: Probed,
    kinds: Sequence[str],
    shares: Sequence[float],
    progress: Callable[[], None],
    out_of_time: Callable[[], bool],
) -> None:
    """Every kind and share on one block at least; the blocks of the share asked for come first, evenly spread."""
    blocks = len(trials.dense)
    spread = sorted(range(blocks), key=lambda k: (f"{k:016b}"[::-1], k))
    nearest_first = sorted(shares, key=lambda share: abs(share - trials.settings.share))
    keys = [(kind, share) for share in nearest_first for kind in kinds]
    if "none" in probed.shapes:
        keys.append(("none", trials.settings.share))
    order = [(key, spread[0]) for key in keys]
    order += [(key, k) for share in nearest_first for k in spread[1:] for key in keys if key[1] == share]
    # In the order of the shares that were given: choices between equals do not depend on which was tried first.
    probed.measured = {key: {} for share in shares for key in keys if key[1] == share}
    for key in keys:
        probed.measured.setdefault(key, {})
    for key, block in order:
        kind, share = key
        fitted, late = probed.shapes[kind].fit(trials.dense[block], share), out_of_time()
        if fitted is not None and not (probed.measured[key] and late):
            probed.measured[key][block] = trials.try_out(block, fitted, pruned=kind == "pruned")
        progress()
