"""A picture of a tree: one row a level, each node as wide as the share of leaves below it, coloured by its use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from numpy.typing import NDArray

SPREAD = 4.0  # colours end at 2**4 times more or less use than in an evenly used tree
# From rarely to often used, through a middle that is light on dark and dark on light paper alike.
COLOURS = LinearSegmentedColormap.from_list("use", ["#08306b", "#2171b5", "#9ecae1", "#fdd49e", "#ec7014", "#7f2704"])
DEAD = "#8a8a8a"


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


def draw_tree(axes: Axes, counts: Sequence[int], depth: int) -> Any:
    """Draw one tree's use, root on top; returns the image for a colour bar. Grey: no row came."""
    colours = COLOURS.with_extremes(bad=DEAD)
    image = axes.imshow(
        relative_use(counts, depth),
        cmap=colours,
        vmin=-SPREAD,
        vmax=SPREAD,
        aspect="auto",
        interpolation="nearest",
        extent=(0, 2**depth, depth + 0.5, -0.5),
    )
    axes.set_xticks([])
    return image


def draw_path(axes: Axes, path: Sequence[int], depth: int, **line: Any) -> None:
    """Draw one token's way through a tree that `draw_tree` drew. path: heap indices, root first."""
    middles = []
    for level, node in enumerate(path):
        width = 2 ** (depth - level)
        middles.append((node - (2**level - 1) + 0.5) * width)
    axes.plot(middles, range(len(path)), **line)
