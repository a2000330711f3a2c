"""Which layer becomes what: candidates timed on this machine, tried on the captured rows, chosen under a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from fastff.convert.conversion_settings import ConversionSettings
from fastff.convert.student import describe_narrow, fit_experts, fit_tree, stored_neurons
from fastff.models.families import DenseWeights

TREES, DEPTHS = (8, 4, 2, 1), (3, 4, 5)
LEAF_WIDTHS = (16, 32, 64)  # of experts
PLAIN = ("narrow", "pruned", "none")
PARTS = (0.75, 0.5, 0.0)  # of a layer's work, for shared neurons: experiments/convert/README.md
LADDER = (0.25, 0.1, 0.05, 0.025)  # shares of a layer's work tried for a speedup
AROUND = (0.5, 1.0, 2.0)  # of the share asked for
SLOWER = 1.3  # a richer shape may take so much longer than the fastest
MOST_STORED = 4  # times the dense layer's neurons: outputs of more take too long to solve, and few rows see each
TRIED = 6  # shapes of a kind whose error is measured
BINS = 4000  # of the budget, in the search


class Candidate(Protocol):
    """A shape that can be made for any layer and share of its work."""

    @property
    def kind(self) -> str:
        """trees, experts, narrow, pruned or none."""
        ...

    @property
    def part(self) -> float:
        """Of its work, for shared neurons."""
        ...

    def fit(self, dense: DenseWeights, active: float) -> dict[str, Any] | None:
        """The widest such layer that spends at most `active` of the dense layer's work; None if there is none."""
        ...


@dataclass(frozen=True)
class Shape:
    """Trees and depth of a candidate, and its shared neurons: a number, or a part of its work."""

    kind: ClassVar[str] = "trees"
    trees: int
    depth: int
    shared: int = 0
    part: float = 0.0

    def fit(self, dense: DenseWeights, active: float) -> dict[str, Any] | None:
        """The widest such layer that spends at most `active` of the dense layer's work, of less depth where it would
        store more than MOST_STORED times its neurons; None if there is none."""
        shared = self.shared + round(self.part * active * dense.neurons / 8) * 8  # whole vectors
        for depth in range(self.depth, 0, -1):
            found = fit_tree(dense, active, trees=self.trees, depth=depth, shared=shared)
            if found is None or stored_neurons(found) <= MOST_STORED * dense.neurons:
                return found
        return None


@dataclass(frozen=True)
class Experts:
    """Neurons of a leaf, and those that are shared: a number, or a part of the work."""

    kind: ClassVar[str] = "experts"
    leaf_width: int
    shared: int = 0
    part: float = 0.0

    def fit(self, dense: DenseWeights, active: float) -> dict[str, Any] | None:
        """All neurons in leaves, but for a rest of less than one; as many leaves a row as the work allows."""
        shared = self.shared + round(self.part * active * dense.neurons / 8) * 8
        return fit_experts(dense, active, leaf_width=self.leaf_width, shared=shared)


@dataclass(frozen=True)
class Plain:
    """A layer without leaves: narrow (its outputs solved and taught), pruned (neurons as they are), or none."""

    kind: str
    part: ClassVar[float] = 0.0

    def fit(self, dense: DenseWeights, active: float) -> dict[str, Any] | None:
        """As many neurons as the work allows; none fits any work."""
        if self.kind == "none":
            return {"kind": "none"}
        neurons = int(active * dense.neurons)
        return None if neurons < 1 else describe_narrow(dense, neurons)


@dataclass(frozen=True)
class Option:
    """One way to make one block's feedforward. The first of a block is the dense layer itself, description None.

    kind           dense, or that of its candidate
    share          of the dense layer's floating-point operations
    times_us       at each of the timed shapes
    unexplained    share of the variance of its effect after the norm (`distil.unexplained`)
    loss_increase  of the model's output with this layer alone
    measured_on    the block that the last two were measured on: another where there was no time for each
    """

    description: dict[str, Any] | None
    share: float
    times_us: tuple[float, ...]
    unexplained: float = 0.0
    loss_increase: float = 0.0
    measured_on: int | None = None
    kind: str = "dense"


@dataclass(frozen=True)
class LatencyProfile:
    """Microseconds at each timed shape: of the whole dense model, and of each block's dense feedforward."""

    model_us: tuple[float, ...]
    dense_us: tuple[tuple[float, ...], ...]  # [block][shape]

    def rest_us(self, shape: int) -> float:
        """The model without its feedforwards."""
        return max(0.0, self.model_us[shape] - sum(block[shape] for block in self.dense_us))

    def ceilings(self) -> tuple[float, ...]:
        """Amdahl's limit a shape: how many times faster if the feedforwards took no time."""
        return tuple(total / max(self.rest_us(k), 1e-9) for k, total in enumerate(self.model_us))

    def reach(self, feedforward_us: Sequence[Sequence[float]]) -> float:
        """How many times faster the model is, at the worst shape, with feedforwards of [block][shape] microseconds."""
        return min(
            total / max(self.rest_us(k) + sum(block[k] for block in feedforward_us), 1e-9)
            for k, total in enumerate(self.model_us)
        )


def shapes_of(settings: ConversionSettings, dense: DenseWeights) -> list[Candidate]:
    """The conditional shapes that fit the budget: with the shared neurons asked for, or each of PARTS."""
    parts, shared = PARTS if settings.shared is None else (0.0,), settings.shared or 0
    shapes: list[Candidate] = [Shape(t, d, shared, part) for part in parts for t in TREES for d in DEPTHS]
    shapes += [Experts(width, shared, part) for part in parts for width in LEAF_WIDTHS]
    first: dict[str, Candidate] = {}  # of those that make the same layer
    for shape in shapes:
        if (made := shape.fit(dense, settings.share)) is not None:
            first.setdefault(str(made), shape)
    return list(first.values())


def shortlist(shapes: Sequence[Candidate], slowness: Sequence[float], stored: Sequence[int]) -> list[int]:
    """Indices of shapes worth trying: at most SLOWER times as slow as the fastest; of those, the ones that store most
    neurons, the parts of the work alternating, the largest first. slowness: relative time."""
    fast = [k for k, t in enumerate(slowness) if t <= SLOWER * min(slowness)]
    ranked: list[tuple[int, float, int]] = []
    for part in {shapes[k].part for k in fast}:
        mine = sorted((k for k in fast if shapes[k].part == part), key=lambda k: (-stored[k], slowness[k]))
        ranked += [(place, -part, k) for place, k in enumerate(mine)]
    return [k for _, _, k in sorted(ranked)][:TRIED]


def shares_of(settings: ConversionSettings) -> list[float]:
    """Shares of a layer's work to make candidates for, largest first."""
    if settings.speedup is not None:
        return list(LADDER)
    return [share * settings.share for share in sorted(AROUND, reverse=True) if share * settings.share <= 1.0]


def refuse(speedup: float, profile: LatencyProfile, best: float) -> ValueError:
    """The error for a speedup that no choice of layers reaches, with the best that is reachable."""
    return ValueError(
        f"speedup {speedup:.2f}x cannot be reached here: the fastest candidates give {best:.2f}x, and without any "
        f"feedforward work the model would be {min(profile.ceilings()):.2f}x faster"
    )


def largest(settings: ConversionSettings, dense: Sequence[DenseWeights]) -> list[dict[str, Any]]:
    """Of each block, the candidate that stores most neurons, at any of the shares that are tried."""
    shares = [*shares_of(settings), *settings.curve]
    fitted = [[d for s in shapes_of(settings, layer) for a in shares if (d := s.fit(layer, a))] for layer in dense]
    return [
        max(tried or [describe_narrow(layer, 1)], key=stored_neurons)
        for layer, tried in zip(dense, fitted, strict=True)
    ]


def choose(settings: ConversionSettings, options: Sequence[Sequence[Option]], profile: LatencyProfile) -> list[int]:
    """Index of the option of each block: the least loss within the budget. Raises ValueError if nothing keeps it."""
    loss_increases = [[max(0.0, option.loss_increase) for option in block] for block in options]
    if settings.speedup is None:
        # A dense layer is a choice, too: others then do with less. Where nothing pays it is none, and costs nothing.
        paying = [[0, *(k for k in range(1, len(block)) if pays(settings, block, k))] for block in options]
        work = [
            [block[k].share - settings.share if len(ks) > 1 else 0.0 for k in ks]
            for block, ks in zip(options, paying, strict=True)
        ]
        found = _least_increase(work, [[h[k] for k in ks] for h, ks in zip(loss_increases, paying, strict=True)], 0.0)
        if found is not None:
            return [ks[k] for ks, k in zip(paying, found, strict=True)]
        raise ValueError(f"no choice of layers keeps active {settings.share:.2%}")
    allowed = [total / settings.speedup - profile.rest_us(k) for k, total in enumerate(profile.model_us)]
    cost = [[_part(option.times_us, allowed) for option in block] for block in options]
    found = _least_increase(cost, loss_increases, 1.0)
    if found is None:
        fastest = [tuple(map(min, zip(*(option.times_us for option in block), strict=True))) for block in options]
        raise refuse(settings.speedup, profile, profile.reach(fastest))
    return found


def _part(times_us: Sequence[float], allowed_us: Sequence[float]) -> float:
    """Share of what is allowed for all feedforwards, at the worst shape."""
    return max(t / a if a > 0 else np.inf for t, a in zip(times_us, allowed_us, strict=True))


def pays(settings: ConversionSettings, block: Sequence[Option], k: int) -> bool:
    """Whether a candidate may stand in a block: it is not slower than the dense layer where rows are timed."""
    pairs = zip(block[k].times_us, block[0].times_us, strict=True)
    return settings.keep_slow or all(new < dense for new, dense in pairs)


def _least_increase(
    costs: Sequence[Sequence[float]], loss_increases: Sequence[Sequence[float]], budget: float
) -> list[int] | None:
    """One index a block so that the costs sum to at most `budget` and the loss_increases are least; None if impossible.

    Costs are rounded up to BINS steps, so the budget is kept, and used but for blocks / BINS of its span."""
    low = [min(block) for block in costs]
    room = budget - sum(low)
    if not room >= -1e-9 * max(1.0, abs(budget)):
        return None
    step = max(room, 1e-12) / BINS
    best = np.zeros(BINS + 1)
    taken: list[np.ndarray[Any, Any]] = []
    for block, loss_increase, least in zip(costs, loss_increases, low, strict=True):
        table = np.full((len(block), BINS + 1), np.inf)
        for k, cost in enumerate(block):
            steps = np.ceil((cost - least) / step - 1e-9)
            if steps <= BINS:
                table[k, int(steps) :] = best[: BINS + 1 - int(steps)] + loss_increase[k]
        taken.append(table.argmin(0))
        best = table.min(0)
    chosen: list[int] = []
    place = BINS
    for block, least, which in zip(reversed(costs), reversed(low), reversed(taken), strict=True):
        k = int(which[place])
        chosen.append(k)
        place -= int(max(0.0, np.ceil((block[k] - least) / step - 1e-9)))
    return chosen[::-1]
