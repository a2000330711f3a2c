"""What is measured: trees and the dense layers beside them, rows a call, and how weights are visited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fastff.config import TreeConfig
from fastff.named_values import named_value


@dataclass(frozen=True)
class DenseConfig:
    """A dense layer without biases: Linear, gelu, Linear; or for swiglu a gate and a value, each of `neurons`."""

    features: int = 768
    neurons: int = 3072
    activation: Literal["gelu", "swiglu"] = "gelu"

    @property
    def in_rows(self) -> int:
        return self.neurons * (2 if self.activation == "swiglu" else 1)

    @property
    def weights(self) -> int:
        """Elements of both matrices."""
        return self.features * (self.in_rows + self.neurons)

    @property
    def flops_per_row(self) -> int:
        return 2 * self.weights


Subject = DenseConfig | TreeConfig


def label(subject: Subject) -> str:
    """Name of a layer in tables and files; the width is told where it is not BERT-base's 768."""
    if isinstance(subject, DenseConfig):
        name, features = f"dense-{subject.neurons}", subject.features
        name += "-swiglu" if subject.activation == "swiglu" else ""
    else:
        name, features = subject.name, subject.in_features
    return name if features == 768 else f"{name}-d{features}"


def features_of(subject: Subject) -> int:
    """Width of a row before the layer."""
    return subject.features if isinstance(subject, DenseConfig) else subject.in_features


def weights_of(subject: Subject) -> int:
    """Elements of a layer's weights."""
    if isinstance(subject, DenseConfig):
        return subject.weights
    return subject.trees * (subject.in_rows * subject.in_features + subject.out_rows * subject.out_features)


def tree(depth: int, features: int = 768, **options: object) -> TreeConfig:
    return TreeConfig(in_features=features, out_features=features, depth=depth, **options)  # type: ignore[arg-type]


BERT = DenseConfig()
SWIGLU = DenseConfig(neurons=2048, activation="swiglu")  # stores as many weights as BERT's layer and as the trees
GPT3 = DenseConfig(features=12288, neurons=49152)
BERT_BASE = tree(11)
# Each tree with the dense layers that it is compared with.
TREES: dict[TreeConfig, tuple[DenseConfig, ...]] = {
    BERT_BASE: (BERT,),
    tree(6, trees=32): (BERT,),
    tree(4, trees=128): (BERT,),
    tree(4, trees=8, leaf_width=16, node_output=False, activation="swiglu"): (SWIGLU, BERT),
    # Those that trained best, as docs/training.md recommends them.
    tree(6, trees=18, leaf_width=8, node_output=False, activation="swiglu", gate="boundary"): (SWIGLU, BERT),
    tree(5, trees=36, leaf_width=4, node_output=False, activation="swiglu", gate="boundary"): (SWIGLU, BERT),
}
GPT3_TREE = tree(15, 12288)
TWINS: dict[str, tuple[str, ...]] = {
    label(config): tuple(label(dense) for dense in twins) for config, twins in {**TREES, GPT3_TREE: (GPT3,)}.items()
}


@dataclass(frozen=True)
class Workload:
    """What is timed side by side. layers: 1 keeps one layer's weights hot; 16 visits sixteen in turn, as a model does.
    training: forward and backward, else inference."""

    rows: int
    layers: int = 1
    threads: int = 1
    training: bool = False
    subjects: tuple[Subject, ...] = (BERT, BERT_BASE)

    @property
    def name(self) -> str:
        return f"{visits(self.layers, self.training)}-{self.rows}-rows-{self.threads}-threads"


def visits(layers: int, training: bool) -> str:
    return "train" if training else "hot" if layers == 1 else f"{layers}-layers"


@dataclass(frozen=True)
class Cell:
    """One provider on one layer of a workload."""

    subject: Subject
    provider: str
    rows: int
    layers: int
    threads: int
    training: bool

    @property
    def name(self) -> str:
        how = visits(self.layers, self.training)
        return f"{label(self.subject)}-{how}-{self.rows}-rows-{self.threads}-threads {self.provider}"


@dataclass(frozen=True)
class Only:
    """A choice of what to measure; an empty tuple of a kind means all of it. `layer` names a tree, whose dense layers
    come with it."""

    layer: tuple[str, ...] = ()
    provider: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    visits: tuple[str, ...] = ()
    threads: tuple[int, ...] = ()

    @classmethod
    def parse(cls, choices: Sequence[str]) -> Only:
        """From `kind=value,value` texts. Raises ValueError naming what is not understood."""
        found: dict[str, tuple[str, ...]] = {}
        for choice in choices:
            kind, values = named_value(choice, cls.__dataclass_fields__, form="KIND=VALUE[,VALUE]")
            found[kind] = (*found.get(kind, ()), *values.split(","))
        unknown = [name for name in found.get("layer", ()) if name not in TWINS]
        if unknown:
            raise ValueError(f"layer {unknown[0]!r} is not one of {', '.join(TWINS)}")
        numbers = {kind: _numbers(kind, found.get(kind, ())) for kind in ("rows", "threads")}
        texts = {kind: found.get(kind, ()) for kind in ("layer", "provider", "visits")}
        return cls(**texts, **numbers)  # type: ignore[arg-type]

    def allows(self, workload: Workload) -> bool:
        return (
            (not self.rows or workload.rows in self.rows)
            and (not self.threads or workload.threads in self.threads)
            and (not self.visits or visits(workload.layers, workload.training) in self.visits)
        )

    def subjects(self, trees: Mapping[TreeConfig, tuple[DenseConfig, ...]]) -> tuple[Subject, ...]:
        """The chosen trees after the dense layers that they are compared with."""
        chosen = {config: twins for config, twins in trees.items() if not self.layer or label(config) in self.layer}
        return (*dict.fromkeys(dense for twins in chosen.values() for dense in twins), *chosen)


def _numbers(kind: str, values: Sequence[str]) -> tuple[int, ...]:
    if not all(value.isdecimal() for value in values):
        raise ValueError(f"{kind}={','.join(values)} is not a list of whole numbers")
    return tuple(map(int, values))


@dataclass(frozen=True)
class Grid:
    """The workloads of the CPU table. threads: usually one and all cores."""

    threads: tuple[int, ...]
    rows: tuple[int, ...] = (1, 8, 128, 1024, 16384)
    layers: tuple[int, ...] = (16, 1)
    gpt3_rows: tuple[int, ...] = (1,)
    train_rows: tuple[int, ...] = (4096,)
    only: Only = field(default_factory=Only)

    def workloads(self) -> list[Workload]:
        """The published layer first and by itself: more processes at a time would share the caches. Ordered so that
        processes with one number of threads and set of layers serve many workloads."""
        plain = self.only.subjects({BERT_BASE: TREES[BERT_BASE]})
        others = self.only.subjects({config: twins for config, twins in TREES.items() if config != BERT_BASE})
        wide = self.only.subjects({GPT3_TREE: (GPT3,)})
        found = []
        for threads in self.threads:
            for trees in (plain, others):
                found += [Workload(n, layers, threads, False, trees) for layers in self.layers for n in self.rows]
            found += [Workload(n, 1, threads, True, plain) for n in self.train_rows]
            found += [Workload(n, 1, threads, False, wide) for n in self.gpt3_rows]
        return [workload for workload in found if workload.subjects and self.only.allows(workload)]
