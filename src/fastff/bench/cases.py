"""What is measured: a conditional layer, the dense layer it replaces, rows a call, and how weights are visited."""

from __future__ import annotations

from dataclasses import dataclass

from fastff.tree import TreeConfig

BERT_BASE = TreeConfig(in_features=768, out_features=768, depth=11)
DENSE_NEURONS = 3072  # of BERT-base's feedforward layer


@dataclass(frozen=True)
class Case:
    """layers: 1 keeps one layer's weights hot; 16 visits sixteen layers in turn, as a model does.
    training: forward and backward, else inference."""

    rows: int
    layers: int = 1
    training: bool = False
    config: TreeConfig = BERT_BASE
    dense_neurons: int = DENSE_NEURONS
    threads: int = 1

    @property
    def name(self) -> str:
        visits = "hot" if self.layers == 1 else f"{self.layers}-layers"
        return f"{self.config.name}-{'train' if self.training else visits}-{self.rows}-rows-{self.threads}-threads"


CASES = (
    Case(rows=1),
    Case(rows=1, layers=16),
    Case(rows=8, layers=16),
    Case(rows=128, layers=16),
    Case(rows=1024),
    Case(rows=4096, training=True),
)
