"""What is measured on a GPU, the most important first: device time is scarce and a run may end at any cell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastff.bench.workloads import DenseConfig, Subject, label, tree
from fastff.config import TreeConfig

CORE = ("dense graph", "dense compiled graph", "fastff graph")
EXTRA = ("dense eager", "dense compiled", "fastff eager", "torch gather+bmm", "torch masked")


@dataclass(frozen=True)
class Pair:
    """A tree, and the dense layer that stores as many weights."""

    tree: TreeConfig
    dense: DenseConfig


def _swiglu(neurons: int) -> DenseConfig:
    return DenseConfig(neurons=neurons, activation="swiglu")


BERT = Pair(tree(11), DenseConfig(neurons=4096))
FOREST = Pair(tree(7, trees=16), _swiglu(2720))
BUSHES = Pair(tree(6, trees=32), _swiglu(2710))
LEAVES = Pair(tree(4, trees=8, leaf_width=16, node_output=False, activation="swiglu"), _swiglu(2048))
WIDE_1024 = Pair(tree(11, 1024), DenseConfig(1024, 4096))
WIDE_4096 = Pair(tree(13, 4096), DenseConfig(4096, 16384))
GPT3 = Pair(tree(15, 12288), DenseConfig(12288, 49152))


@dataclass(frozen=True)
class Case:
    """One pair at one batch. layers: a chain of so many layers with weights of their own is timed, so that a handful
    of rows finds none of them in the cache. training: forward and backward."""

    pair: Pair
    rows: int
    layers: int = 1
    dtype: str = "bf16"
    training: bool = False


@dataclass(frozen=True)
class Cell:
    """One provider on one case. cold: the second-level cache is flushed before every call."""

    case: Case
    provider: str
    cold: bool

    @property
    def subject(self) -> Subject:
        return self.case.pair.dense if self.provider.startswith("dense") else self.case.pair.tree

    @property
    def key(self) -> str:
        case = self.case
        mode, cache = "train" if case.training else "forward", "cold" if self.cold else "warm"
        name = f"{label(case.pair.tree)} {case.rows} rows {case.dtype} {mode} {cache} {case.layers} layers"
        return f"{name}: {self.provider}"


@dataclass(frozen=True)
class StepCell:
    """A training step of a whole model whose feedforward layers are of one kind, eager or as a CUDA graph."""

    kind: str
    feedforward: Subject
    graph: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}, graph" if self.graph else self.kind

    @property
    def key(self) -> str:
        return f"training step: {self.name}"


STEPS = tuple(
    StepCell(kind, feedforward, graph)
    for graph in (False, True)
    for kind, feedforward in (
        ("1x11-gate", tree(11, gate="boundary")),
        ("dense-4096", DenseConfig(neurons=4096)),
        ("dense-3072", DenseConfig(neurons=3072)),
    )
)
# What the figures of the goals come from.
FIRST = (
    Case(BERT, 65536),
    Case(BERT, 65536, training=True),
    Case(BERT, 1, layers=16),
    Case(BERT, 16384),
    Case(GPT3, 1, layers=4),
    Case(GPT3, 1024),
    Case(LEAVES, 65536),
    Case(LEAVES, 65536, training=True),
    Case(FOREST, 65536),
    Case(FOREST, 65536, training=True),
    Case(GPT3, 16384),
    Case(BERT, 262144),
    Case(BERT, 1024),
)
THEN = (
    *(Case(BERT, rows, layers=16) for rows in (8,)),
    *(Case(BERT, rows, layers=4) for rows in (64, 512)),
    *(Case(BERT, rows) for rows in (4096, 8192)),
    *(Case(BERT, rows, training=True) for rows in (4096, 16384)),
    Case(BUSHES, 65536),
    Case(BUSHES, 65536, training=True),
    Case(FOREST, 1, layers=16),
    Case(LEAVES, 1, layers=16),
    Case(GPT3, 128),
    Case(WIDE_1024, 1, layers=16),
    *(Case(WIDE_1024, rows) for rows in (16384, 65536)),
    Case(WIDE_4096, 1, layers=8),
    *(Case(WIDE_4096, rows) for rows in (1024, 16384)),
    Case(BERT, 1, layers=16, dtype="fp32"),
    *(Case(BERT, rows, dtype="fp32") for rows in (1024, 16384, 65536)),
    Case(BERT, 16384, dtype="fp32", training=True),
    *(Case(pair, 16384, dtype="fp32") for pair in (LEAVES, FOREST)),
    *(Case(BERT, rows, training=True) for rows in (262144,)),
)


def cells() -> Iterator[Cell | StepCell]:
    """All of them, by importance: the goals, the model, the other batches, the slower providers, the warm cache."""
    yield from (Cell(case, provider, True) for case in FIRST for provider in CORE)
    yield from STEPS
    yield from (Cell(case, provider, True) for case in THEN for provider in CORE)
    yield from (Cell(case, provider, True) for case in (*FIRST, *THEN) for provider in EXTRA)
    yield from (Cell(case, provider, False) for case in (*FIRST, *THEN) if case.layers == 1 for provider in CORE)
