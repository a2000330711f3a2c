"""What a decoder's layers become: experts of several shapes, narrow layers, trees; one shape for all, or layers that
matter more keep more of their work."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastff.convert.student import describe_experts, describe_narrow, describe_tree
from fastff.models.families import DenseWeights

LOSS_INCREASE = Path(__file__).parent / "decoder-loss-increase.json"
EXPERTS = {  # name: shared, leaves, leaf_width, chosen; at a share of the work, routing included, of 1536 neurons
    "experts-50-a": (256, 80, 16, 30),
    "experts-50-b": (512, 64, 16, 14),
    "experts-50-c": (640, 56, 16, 6),
    "experts-50-d": (512, 32, 32, 7),
    "experts-50-e": (384, 288, 4, 72),
    "experts-50-f": (512, 16, 64, 3),
    "experts-25-a": (128, 88, 16, 14),
    "experts-25-b": (256, 80, 16, 6),
    "experts-25-c": (320, 38, 32, 1),
    "experts-25-d": (192, 42, 32, 5),
    "experts-25-e": (192, 21, 64, 2),
    "experts-12-b": (112, 88, 16, 3),
}
NARROW = {50: 768, 25: 384, 12: 192}  # neurons
TREES = {
    "trees-50": {"trees": 24, "depth": 4, "leaf_width": 17, "shared": 320},
    "trees-25": {"trees": 24, "depth": 4, "leaf_width": 9, "shared": 128},
}
WORK = {100: 8, 50: 4, 25: 2, 12: 1}  # eighths of a dense layer's
Description = dict[str, Any] | None


def sizes_of(variant: str) -> dict[str, int]:
    return dict(zip(("shared", "leaves", "leaf_width", "chosen"), EXPERTS[variant], strict=True))


def describe(dense: DenseWeights, variant: str) -> dict[str, Any]:
    if variant in EXPERTS:
        return describe_experts(dense, **sizes_of(variant))
    if variant in TREES:
        return describe_tree(dense, **TREES[variant])
    return describe_narrow(dense, NARROW[int(variant.split("-")[1])])


def describe_all(dense: Sequence[DenseWeights], variant: str) -> list[Description]:
    """What every layer becomes; None: it stays dense.

    FAMILY-SHARE-mixed is of as much work in all as FAMILY-SHARE, but layers keep all, half or a quarter of theirs, at a
    quarter in all also an eighth, by what LOSS_INCREASE has of them. A last word `kept` says how layers begin, not what
    they are."""
    name = variant.removesuffix("-kept")
    if not name.endswith("-mixed"):
        return [describe(layer, name) for layer in dense]
    family, share, _ = name.split("-")
    increase = json.loads(LOSS_INCREASE.read_text())["layers"]
    kept = shares_of([{int(k): float(v) for k, v in row.items()} for row in increase], int(share))
    return [
        None if part == 100 else describe(layer, f"{family}-{part}" + ("-b" if family == "experts" else ""))
        for layer, part in zip(dense, kept, strict=True)
    ]


def shares_of(increase: Sequence[Mapping[int, float]], share: int) -> list[int]:
    """A share of its work in percent for every layer, of which they get at least half, so that the increases sum least
    and the work is at most `share` of all. increase: of every layer, by share."""
    parts = {part: work for part, work in WORK.items() if 2 * work >= WORK[share]}
    most = WORK[share] * len(increase)
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for layer in increase:
        found: dict[int, tuple[float, list[int]]] = {}
        for spent, (total, chosen) in best.items():
            for part, work in parts.items():
                sum_of = spent + work
                value = total + (0.0 if part == 100 else layer[part])
                if sum_of <= most and value < found.get(sum_of, (float("inf"), []))[0]:
                    found[sum_of] = (value, [*chosen, part])
        best = found
    return min(best.values())[1]
