"""A picture of a tree: one row a level, each node as wide as the share of leaves below it, coloured by its use."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastff.report import svg

SPREAD = 4.0  # colours end at 2**4 times more or less use than in an evenly used tree
# From rarely to often used, through a middle that is light on dark and dark on light paper alike.
COLOURS = ("#08306b", "#15529a", "#2171b5", "#6ab0d8", "#cfd3b8", "#fdb870", "#ec7014", "#b6490c", "#7f2704")
STYLE = "\n".join(
    [
        ".fastff-chart .unused { fill: #8a8a8a }",
        *(f".fastff-chart .u{k} {{ fill: {c} }}" for k, c in enumerate(COLOURS)),
    ]
)


def relative_use(counts: Sequence[int], depth: int) -> NDArray[np.float64]:
    """log2 of each node's visits over those in an evenly used tree, (levels, 2**depth); NaN where nobody came.

    counts: visits in heap order, 2**(depth + 1) - 1 of them.
    """
    levels = []
    for level in range(depth + 1):
        row = np.asarray(counts[2**level - 1 : 2 ** (level + 1) - 1], dtype=float)
        with np.errstate(divide="ignore", invalid="ignore"):
            use = np.log2(row * 2**level / counts[0])
        levels.append(np.repeat(use, 2 ** (depth - level)))
    grid = np.stack(levels)
    grid[~np.isfinite(grid)] = np.nan
    return grid


def colour(use: float) -> str:
    """The class of a node that is used 2**use times as often as in an evenly used tree; NaN: never."""
    if math.isnan(use):
        return "unused"
    step = round((len(COLOURS) - 1) * (use + SPREAD) / (2 * SPREAD))
    return f"u{min(max(step, 0), len(COLOURS) - 1)}"


@dataclass(frozen=True)
class Box:
    """Where a tree is drawn, in pixels."""

    x: float
    y: float
    width: float
    height: float

    def node(self, level: int, index: int, depth: int) -> tuple[float, float, float, float]:
        """Left, top, width and height of a node, by its index in its level."""
        width, height = self.width / 2**level, self.height / (depth + 1)
        return self.x + index * width, self.y + level * height, width, height


def draw_tree(counts: Sequence[int], depth: int, box: Box) -> Iterator[str]:
    """One tree's use, root on top. Grey: no row came. The drawing needs STYLE."""
    use = relative_use(counts, depth)
    for level in range(depth + 1):
        for index in range(2**level):
            kind = colour(float(use[level, index * 2 ** (depth - level)]))
            yield svg.rect(*box.node(level, index, depth), kind)


def draw_path(path: Sequence[int], depth: int, box: Box, kind: str) -> str:
    """One token's way through a tree drawn in the same box. path: heap indices, root first."""
    points = []
    for level, node in enumerate(path):
        x, y, width, height = box.node(level, node - (2**level - 1), depth)
        points.append((x + width / 2, y + height / 2))
    return svg.polyline(points, kind)


def draw_scale(x: float, y: float, width: float) -> Iterator[str]:
    """What the colours mean."""
    each = width / len(COLOURS)
    for index in range(len(COLOURS)):
        yield svg.rect(x + index * each, y, each, 12, f"u{index}")
    for tick in (-SPREAD, -SPREAD / 2, 0.0, SPREAD / 2, SPREAD):
        place = x + each / 2 + (width - each) * (tick + SPREAD) / (2 * SPREAD)
        yield svg.text(place, y + 27, f"{2**tick:g}", anchor="middle", kind="soft")
    yield svg.text(x + width / 2, y + 44, "visits, relative to even use (grey: none)", anchor="middle")
