"""Which kernels serve a call, and with what tiles: a pure function of the configuration, the rows and the dtype."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from fastff.config import TreeConfig
from fastff.ops.explanation import Explanation


@dataclass(frozen=True)
class PerTokenPlan:
    """One program a row (and tree). ahead: levels fetched at once; fused: one launch where there is one tree;
    block_*: elements of a program's tile along features in and out, leaf neurons and path entries."""

    ahead: int
    fused: bool
    block_in: int
    block_out: int
    block_leaf: int = 4
    block_entries: int = 16
    warps: int = 4


@dataclass(frozen=True)
class SpeculativePlan:
    """One program a node, a launch for every `levels` levels. block_in, block_out: as in PerTokenPlan."""

    levels: int
    block_in: int
    block_out: int
    warps: int


@dataclass(frozen=True)
class Tiles:
    """Tile of a grouped GEMM: rows, columns of all joint trees together, steps along features in and out."""

    rows: int
    columns: int
    inner: int
    outer: int
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Stage:
    """A block of levels: after `level` decisions, `levels` more are scored, `joint` trees at a time."""

    level: int
    levels: int
    joint: int


@dataclass(frozen=True)
class GroupedPlan:
    """Routing stages, then rows grouped by the first `level` decisions in each of `joint` trees for all that follows.

    leaf_routed: the last stage scores the leaves too. one_pass: groups share their leaves, and one kernel computes
    them."""

    stages: tuple[Stage, ...]
    level: int
    joint: int
    leaf_routed: bool
    one_pass: bool
    tiles: Tiles


@dataclass(frozen=True)
class BackwardPlan:
    """Groups of the two linear kernels (`level`, `joint`) and of the weight gradients (`outer_level`, one tree).

    chunk: most rows that one program of a weight gradient sums; outer_tiles: its tile, `inner` being rows;
    outer_turned: whether features are the rows of its product."""

    level: int
    joint: int
    outer_level: int
    chunk: int
    tiles: Tiles
    outer_tiles: Tiles
    outer_turned: bool = False


ForwardPlan = SpeculativePlan | PerTokenPlan | GroupedPlan
_FORMS = {SpeculativePlan: "speculative", PerTokenPlan: "per_token", GroupedPlan: "grouped"}


def per_token_plan(config: TreeConfig, rows: int) -> PerTokenPlan:
    """Few rows wait for memory: fetch ahead. Many rows fill the machine: fetch only what is used."""
    wide = config.in_features > 2048
    few = rows * config.trees <= (16 if wide else 64)
    ahead = (2 if wide else 4) if few else (1 if wide else 2)
    most_in = (2048 if few else 4096) if wide else 256
    entries = config.depth * config.node_output + config.leaf_width
    return PerTokenPlan(
        ahead=min(ahead, max(1, config.depth + (config.leaf_in_rows == 1))),
        fused=config.trees == 1 and not wide and config.out_features <= 2048,
        block_in=_block(config.in_features, most_in),
        block_out=_block(config.out_features, 1024 if config.out_features > 2048 else 256),
        block_leaf=min(power_of_two(config.leaf_width), 4),
        block_entries=min(power_of_two(entries), 4 if wide else 16),
        warps=(8 if few else 16) if wide else (2 if few else 1),
    )


def _block(features: int, most: int) -> int:
    """Step along features: a power of two that divides them when one of 128 or more does, so that nothing is masked."""
    divisor = features & -features
    return min(most, divisor if divisor >= 128 else power_of_two(features))


def power_of_two(n: int) -> int:
    """The least that is n or more. Triton's own function costs the host several microseconds a call."""
    return 1 << max(0, n - 1).bit_length()


def tau_of(config: TreeConfig) -> float:
    """tau as the kernels take it, in float32: a normal number, so that a score of 0 has gate 0."""
    return max(config.tau, torch.finfo(torch.float32).tiny)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def grouped_plan(config: TreeConfig, rows: int, itemsize: int, *, tiles: Tiles | None = None) -> GroupedPlan:
    """Routing in blocks of up to six levels, then the grouping that moves the fewest bytes for the rows at hand."""
    single = config.leaf_in_rows == 1
    if config.trees == 1 and single:
        level, joint = sum(_cut(config.depth + 1)[:-1]), 1
    else:
        level, joint = grouping(config, rows, itemsize)
    # Where a leaf is one row, the last block scores it, provided that block is the subtree of the final groups.
    width = joint << (config.depth + 1 - level)
    fused = single and width <= 256 and (joint > 1 or config.depth + 1 - level <= 6)
    parts = [*_cut(level), config.depth + 1 - level] if fused else _cut(config.depth)
    stages, at = [], 0
    for part in parts:
        together = min(power_of_two(config.trees), max(1, 128 >> part)) if at == 0 else 1
        stages.append(Stage(at, part, joint if fused and at == level and at else together))
        at += part
    one_pass = not fused and level == config.depth and leaf_columns(config, joint) <= 128
    if tiles is None:
        tiles = _tiles(config, rows, itemsize, level, joint)
        if one_pass and itemsize == 2 and tiles.rows > 16:
            tiles = replace(tiles, inner=64, outer=128, stages=3)
    return GroupedPlan(tuple(stages), level, joint, fused, one_pass, tiles)


def leaf_columns(config: TreeConfig, joint: int) -> int:
    """Columns of a product with one leaf of each of `joint` trees, every leaf a power of two wide."""
    return joint * max(power_of_two(config.leaf_width), 16 // joint)


@functools.lru_cache(maxsize=4096)
def backward_plan(
    config: TreeConfig, rows: int, itemsize: int, *, tiles: Tiles | None = None, outer_tiles: Tiles | None = None
) -> BackwardPlan:
    """The grouping of `grouped_plan` for the linear kernels; one tree at a time for the weight gradients."""
    if config.trees == 1 and config.leaf_in_rows == 1:
        level, joint = sum(_cut(config.depth + 1)[:-1]), 1
    else:
        level, joint = grouping(config, rows, itemsize)
    level = min(level, MOST_BITS // joint)
    outer_level = level if config.trees == 1 else min(_single_level(config, 16), MOST_BITS)
    chunk = min(4096, max(128, power_of_two(2 * rows >> outer_level)))
    narrow = _columns(config, outer_level) <= 64
    turned = itemsize == 2 and outer_level == config.depth and narrow and not config.node_output
    if turned and outer_tiles is None:
        outer_tiles = Tiles(0, 128, 64, 256, 4, 3)
    outer = (256 if narrow else 128) if itemsize == 2 else (64 if narrow else 32)
    outer_tiles = outer_tiles or Tiles(0, 128, 256 // itemsize, outer, 4 if narrow else 8, 3 if narrow else 2)
    return BackwardPlan(
        level, joint, outer_level, chunk,
        tiles or _tiles(config, rows, itemsize, level, joint),
        outer_tiles, turned,
    )  # fmt: skip


def grouping(config: TreeConfig, rows: int, itemsize: int) -> tuple[int, int]:
    """(level, joint): decisions and trees of a group's number, by bytes moved and products made for one row.

    Every pass over `joint` trees reads a row and reads and writes its output, three times its width, at BANDWIDTH;
    its products are those of the joint subtrees, at PRODUCTS. More groups than rows / 64 would leave tiles empty."""
    best, choice = float("inf"), (_single_level(config), 1)
    bits = max(1, (max(rows, 1) // 64).bit_length() - 1)
    for joint in (1, 2, 4):
        for level in range(config.depth + 1):
            columns = joint * max(power_of_two(_columns(config, level)), 16 // joint)
            if joint > config.trees or level * joint > bits or columns > 256:
                continue
            passes = ceil_div(config.trees, joint)
            features = config.in_features + config.out_features
            moved = passes * 3 * features / 2 * itemsize / BANDWIDTH
            cost = max(moved, passes * columns * features * 2 / PRODUCTS) + passes * level * 1e-12
            if cost < best:
                best, choice = cost, (level, joint)
    return choice


MOST_BITS = 12  # of a group's number: every program that looks up its group reads the table of all of them
BANDWIDTH = 3.5e12  # bytes per second, H200
PRODUCTS = 1.2e14  # floating-point operations per second that small grouped products reached there in bf16


def _columns(config: TreeConfig, level: int) -> int:
    """Rows of w_in in a subtree after `level` decisions."""
    left = config.depth - level
    return int(2**left - 1 + 2**left * config.leaf_in_rows)


def _single_level(config: TreeConfig, columns: int = 64) -> int:
    """Fewest decisions after which one tree's subtree has no more columns than these; all of them if none has."""
    return next((level for level in range(config.depth) if _columns(config, level) <= columns), config.depth)


def _cut(levels: int) -> list[int]:
    """Levels in balanced blocks of at most six, larger ones first."""
    if levels == 0:
        return []
    blocks = ceil_div(levels, 6)
    return [levels // blocks + (block < levels % blocks) for block in range(blocks)]


def _tiles(config: TreeConfig, rows: int, itemsize: int, level: int, joint: int) -> Tiles:
    """64 rows where groups have as many; a third stage in flight where shared memory allows it."""
    used = min(1 << (level * joint), rows)
    height = next((tile for tile in (64, 32) if rows >= tile * used), 16)
    columns = joint * power_of_two(_columns(config, level))
    single = itemsize == 4
    outer = 32 if columns > 128 and single else 64
    if config.trees > 1 and not single and height > 16 and columns <= 128:  # many passes: long pieces of each row
        return Tiles(height, 256 if joint > 1 else 128, 128, 128, 4, 2)
    return Tiles(
        rows=height,
        columns=256 if joint > 1 else 128,
        inner=32 if single else 64 if height > 16 else 128,
        outer=outer if height > 16 or single else 128,
        warps=8 if columns > 128 else 4,
        stages=2 if columns > 128 or single else 3,
    )


def speculative_plan(config: TreeConfig) -> SpeculativePlan | None:
    """Blocks of at most six levels; None where that form does not apply."""
    if config.trees > 1 or config.leaf_in_rows > 1 or config.depth < 4:
        return None
    wide = config.in_features > 2048
    return SpeculativePlan(
        levels=min(6, config.depth + 1),
        block_in=_block(config.in_features, 2048 if wide else 256),
        block_out=min(power_of_two(config.out_features), 128 if wide else 32),
        warps=16 if wide else 1,
    )


@functools.lru_cache(maxsize=4096)  # every call asks
def forward_plan(config: TreeConfig, rows: int, itemsize: int) -> ForwardPlan:
    """The form that was faster where it was measured: on an H200, in bf16 (benchmarks/results/nvidia-h200)."""
    return _forward_choice(config, rows, itemsize)[0]


def _forward_choice(config: TreeConfig, rows: int, itemsize: int) -> tuple[ForwardPlan, str]:
    """The plan, and why it was chosen."""
    speculative, handful = speculative_plan(config), 4 if config.in_features > 2048 else 8
    if speculative is not None and rows <= handful:
        return (
            speculative,
            f"at most {handful} rows of one tree: scoring whole blocks of levels hides their loads' latency",
        )
    # Rows and blocks met at 8192 rows of 12 neurons; what a row costs alone grows with its neurons.
    neurons = config.trees * (config.path_scores + config.depth * config.node_output + config.leaf_width) // 2
    work, enough = rows * neurons, 8192 * 12
    if work < enough:
        why = f"{rows} rows of {neurons} neurons are fewer than the {enough} from which sorting rows by node pays"
        return per_token_plan(config, rows), why
    grouped = grouped_plan(config, rows, itemsize)
    bits = max((s.level * s.joint for s in grouped.stages), default=0)
    if max(bits, grouped.level * grouped.joint) > MOST_BITS:
        return per_token_plan(config, rows), f"the tree would need more than 2**{MOST_BITS} groups of rows"
    return grouped, f"{rows} rows of {neurons} neurons are enough to sort by node and use matrix products"


def explain(config: TreeConfig, rows: int, dtype: torch.dtype, used: ForwardPlan) -> Explanation:
    """The kernels and tiles of a call with so many rows; those of its backward pass are prefixed `backward.`.

    used: the plan that serves the call, which differs from this module's where it was tuned."""
    shipped, reason = _forward_choice(config, rows, dtype.itemsize)
    if used != shipped:
        reason += "; its sizes were tuned on this machine"
    choices = _sizes(used) | _sizes(backward_plan(config, rows, dtype.itemsize), "backward.")
    return Explanation("triton", _FORMS[type(used)], reason, choices)


def _sizes(value: Any, prefix: str = "") -> dict[str, int | float | str]:
    """The fields of a plan, those of its tiles and stages after a dot."""
    if isinstance(value, tuple):
        parts: list[tuple[str, Any]] = [(f"{index}", part) for index, part in enumerate(value)]
    else:
        parts = list(vars(value).items())
    sizes: dict[str, int | float | str] = {}
    for name, part in parts:
        nested = isinstance(part, (tuple, Tiles, Stage))
        sizes |= _sizes(part, f"{prefix}{name}.") if nested else {f"{prefix}{name}": part}
    return sizes


AnyPlan = TypeVar("AnyPlan", GroupedPlan, BackwardPlan)


def smaller(plan: AnyPlan) -> AnyPlan | None:
    """The same plan with tiles that need about half the shared memory; None when they are the smallest."""
    shrunk = {name: _shrink(value) for name, value in vars(plan).items() if isinstance(value, Tiles)}
    kept: dict[str, Any] = {name: value for name, value in shrunk.items() if value is not None}
    return replace(plan, **kept) if kept else None


def _shrink(tiles: Tiles) -> Tiles | None:
    if tiles.stages > 1:
        return replace(tiles, stages=tiles.stages - 1)
    for name in ("outer", "inner", "rows"):
        if getattr(tiles, name) > 16:
            return replace(tiles, **{name: getattr(tiles, name) // 2})
    return None
