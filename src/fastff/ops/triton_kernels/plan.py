"""Which kernels serve a call, and with what tiles: a pure function of the configuration, the rows and the dtype."""

from __future__ import annotations

from dataclasses import dataclass

from fastff.tree import TreeConfig


@dataclass(frozen=True)
class RowsPlan:
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
class ScoutPlan:
    """One program a node, a launch for every `levels` levels. block_in, block_out: as in RowsPlan."""

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
    """A block of levels: after `level` turns, `levels` more are scored, `joint` trees at a time."""

    level: int
    levels: int
    joint: int


@dataclass(frozen=True)
class BlockedPlan:
    """Routing stages, then rows grouped by the first `level` turns in each of `joint` trees for all that follows.

    leaf_routed: the last stage scores the leaves too."""

    stages: tuple[Stage, ...]
    level: int
    joint: int
    leaf_routed: bool
    tiles: Tiles


@dataclass(frozen=True)
class BackwardPlan:
    """Groups of the two linear kernels (`level`, `joint`) and of the weight gradients (`outer_level`, one tree).

    chunk: most rows that one program of a weight gradient sums; outer_tiles: its tile, `inner` being rows."""

    level: int
    joint: int
    outer_level: int
    chunk: int
    tiles: Tiles
    outer_tiles: Tiles


def rows_plan(config: TreeConfig, rows: int, itemsize: int) -> RowsPlan:
    """Few rows wait for memory: fetch ahead. Many rows fill the machine: fetch only what is used."""
    levels = config.depth + (config.leaf_in_rows == 1)
    ahead = 4 if rows <= 64 else 1
    if config.in_features > 2048:
        ahead = min(ahead, 2)
    block_in = _block(config.in_features, 256 if ahead > 1 else 1024)
    few = rows * config.trees <= 64
    return RowsPlan(
        ahead=max(1, min(ahead, levels)),
        fused=config.trees == 1 and config.out_features <= 2048,
        block_in=block_in,
        block_out=_block(config.out_features, 256),
        block_leaf=min(_power(config.leaf_width), 4),
        block_entries=min(_power(config.depth * config.node_output + config.leaf_width), 16),
        warps=_rows_warps(config.in_features, few),
    )


def _rows_warps(features: int, few: bool) -> int:
    if features > 2048:
        return 16
    return 4 if few else 1


def _block(features: int, most: int) -> int:
    """Step along features: a power of two that divides them when one of 128 or more does, so that nothing is masked."""
    divisor = features & -features
    return min(most, divisor if divisor >= 128 else _power(features))


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def blocked_plan(config: TreeConfig, rows: int, itemsize: int, *, tiles: Tiles | None = None) -> BlockedPlan:
    """Routing in blocks of up to six levels, then the grouping that moves the fewest bytes for the rows at hand."""
    single = config.leaf_in_rows == 1
    if config.trees == 1 and single:
        level, joint = sum(_cut(config.depth + 1)[:-1]), 1
    else:
        level, joint = grouping(config, rows, itemsize, weights=3)
    # Where a leaf is one row, the last block scores it, provided that block is the subtree of the final groups.
    width = joint << (config.depth + 1 - level)
    fused = single and width <= 256 and (joint > 1 or config.depth + 1 - level <= 6)
    parts = [*_cut(level), config.depth + 1 - level] if fused else _cut(config.depth)
    stages, at = [], 0
    for part in parts:
        together = min(_power(config.trees), max(1, 128 >> part)) if at == 0 else 1
        stages.append(Stage(at, part, joint if fused and at == level and at else together))
        at += part
    return BlockedPlan(tuple(stages), level, joint, fused, tiles or _tiles(config, rows, itemsize, level, joint))


def backward_plan(
    config: TreeConfig, rows: int, itemsize: int, *, tiles: Tiles | None = None, outer_tiles: Tiles | None = None
) -> BackwardPlan:
    """The grouping of `blocked_plan` for the linear kernels; one tree at a time for the weight gradients."""
    if config.trees == 1 and config.leaf_in_rows == 1:
        level, joint = sum(_cut(config.depth + 1)[:-1]), 1
    else:
        level, joint = grouping(config, rows, itemsize, weights=3)
    outer_level = level if joint == 1 else _single_level(config)
    chunk = min(4096, max(128, _power(2 * rows >> outer_level)))
    wide = 64 if itemsize == 2 else 32
    return BackwardPlan(
        level, joint, outer_level, chunk,
        tiles or _tiles(config, rows, itemsize, level, joint),
        outer_tiles or Tiles(0, 128, 2 * wide, 256 if itemsize == 2 else 64, 4, 3),
    )  # fmt: skip


def grouping(config: TreeConfig, rows: int, itemsize: int, *, weights: int) -> tuple[int, int]:
    """(level, joint): turns and trees of a group's number, by bytes moved and products made for one row.

    Every pass over `joint` trees reads a row and reads and writes its output (`weights` features in all) at BANDWIDTH;
    its products are those of the joint subtrees, at PRODUCTS. More groups than rows / 64 would leave tiles empty."""
    best, choice = float("inf"), (_single_level(config), 1)
    bits = max(1, (max(rows, 1) // 64).bit_length() - 1)
    for joint in (1, 2, 4):
        for level in range(config.depth + 1):
            columns = joint * max(_power(_columns(config, level)), 16 // joint)
            if joint > config.trees or level * joint > bits or columns > 256:
                continue
            passes = -(-config.trees // joint)
            features = config.in_features + config.out_features
            moved = passes * weights * features / 2 * itemsize / BANDWIDTH
            cost = max(moved, passes * columns * features * 2 / PRODUCTS) + passes * level * 1e-12
            if cost < best:
                best, choice = cost, (level, joint)
    return choice


BANDWIDTH = 3.5e12  # bytes per second, H200
PRODUCTS = 4e14  # floating-point operations per second that small grouped products reach in bf16 there


def _columns(config: TreeConfig, level: int) -> int:
    """Rows of w_in in a subtree after `level` turns."""
    left = config.depth - level
    return int(2**left - 1 + 2**left * config.leaf_in_rows)


def _single_level(config: TreeConfig) -> int:
    """Fewest turns after which one tree's subtree has at most 64 columns; all of them if none has."""
    return next((level for level in range(config.depth) if _columns(config, level) <= 64), config.depth)


def _cut(levels: int) -> list[int]:
    """Levels in balanced blocks of at most six, larger ones first."""
    if levels == 0:
        return []
    blocks = -(-levels // 6)
    return [levels // blocks + (block < levels % blocks) for block in range(blocks)]


def _tiles(config: TreeConfig, rows: int, itemsize: int, level: int, joint: int) -> Tiles:
    groups = 1 << (level * joint)
    height = next((tile for tile in (128, 64, 32) if rows >= 2 * tile * max(groups, 132)), 16)
    if rows >= 64 * groups:
        height = max(height, 64)
    columns = joint * _power(_columns(config, level))
    narrow = columns > 128 or itemsize == 4
    outer = 32 if columns > 128 and itemsize == 4 else 64 if narrow else 128
    stages = 2 if narrow else 3
    return Tiles(min(height, 64) if narrow else height, 256 if joint > 1 else 128, 32 if itemsize == 4 else 64,
                 outer, 8 if columns > 128 else 4, stages)  # fmt: skip


def scout_plan(config: TreeConfig) -> ScoutPlan | None:
    """Blocks of at most six levels; None where that form does not apply."""
    if config.trees > 1 or config.leaf_in_rows > 1 or config.depth < 4:
        return None
    wide = config.in_features > 2048
    return ScoutPlan(
        levels=_cut(config.depth + 1)[0],
        block_in=_block(config.in_features, 4096 if wide else 256),
        block_out=min(_power(config.out_features), 128 if wide else 64),
        warps=8 if wide else 1,
    )


def forward_plan(config: TreeConfig, rows: int, itemsize: int) -> ScoutPlan | RowsPlan | BlockedPlan:
    """The form that was faster where it was measured (results/gpu)."""
    scout = scout_plan(config) if rows <= SCOUT_ROWS else None
    if scout is not None:
        return scout
    return rows_plan(config, rows, itemsize) if rows < BLOCKED_ROWS else blocked_plan(config, rows, itemsize)


SCOUT_ROWS = 2
BLOCKED_ROWS = 8192
