"""What a run is: its sizes, the feedforwards it compares, and what may be chosen from outside."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cyclopts import Parameter

from fastff.config import TreeConfig

HIDDEN = 128
LAYERS = 2
HEADS = 4
LONGEST = 96  # pieces of a sentence; hardly any has more
WINDOW = 64  # pieces of a window of text
BATCH_TOKENS = 512  # of a pretraining step
START_BATCH_TOKENS = 256  # of a step of the shared start, which needs steps more than tokens
BATCH_SENTENCES = 32  # of a fine-tuning step
# Masked words are guessed from their neighbours only once attention has found out where neighbours are. Windows that
# grow from 8 pieces teach that in tens of thousands of tokens instead of millions: (length, share of the steps).
START_WINDOWS = ((8, 0.5), (16, 0.3), (32, 0.2))
START_LR = 2e-3  # peak learning rates
PRETRAIN_LR = 3e-3
FINETUNE_LR = 3e-3


@dataclass(frozen=True)
class Variant:
    """One feedforward that is trained and scored. narrow_of: the variant whose arithmetic a narrow baseline matches."""

    name: str
    title: str
    feedforward: dict[str, Any]
    note: str
    narrow_of: str | None = None

    @property
    def conditional(self) -> bool:
        return bool(self.feedforward["kind"] == "fff")


def equal_work(depth: int, **options: Any) -> int:
    """Neurons of the dense layer that does the arithmetic of a conditional one, routing included.

    A dense neuron costs a product with its input row and one with its output row: 4 * HIDDEN operations a token.
    """
    tree = TreeConfig(in_features=HIDDEN, out_features=HIDDEN, depth=depth, **options)
    return round(tree.flops_per_row / (4 * HIDDEN))


TREE: dict[str, Any] = {"depth": 9}
FOREST: dict[str, Any] = {"depth": 5, "trees": 16, "gate": "boundary"}
DENSE = "dense"

# The most expensive first: its cost is what the plan needs to know.
VARIANTS = (
    Variant(DENSE, "dense twin", {"kind": "dense", "intermediate_size": 1023}, "every neuron for every token"),
    Variant("forest", "FFF 16x5, gated", {"kind": "fff", **FOREST}, "16 trees of depth 5 with the boundary gate"),
    Variant("tree", "FFF 1x9", {"kind": "fff", **TREE}, "one tree of depth 9: UltraFastBERT as published"),
    Variant(
        "forest-narrow",
        f"dense {equal_work(**FOREST)}",
        {"kind": "dense", "intermediate_size": equal_work(**FOREST)},
        "dense baseline with the arithmetic of 16x5",
        narrow_of="forest",
    ),
    Variant(
        "tree-narrow",
        f"dense {equal_work(**TREE)}",
        {"kind": "dense", "intermediate_size": equal_work(**TREE)},
        "dense baseline with the arithmetic of 1x9",
        narrow_of="tree",
    ),
    Variant("none", "no feedforward", {"kind": "none"}, "attention alone"),
)
START = Variant("start", "shared start", {"kind": "none"}, "attention alone, from which every variant begins")

# A mask is one piece: here, one word.
MASKED_SENTENCE = "The old man was standing by [MASK] window, and he said [MASK] to her."


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user chooses. Raises ValueError for a time or seed that cannot be."""

    out: Path = Path("train-tiny-report")
    """Directory of the report."""
    seconds: float = 270.0
    """Seconds that the whole run may take, at least 60."""
    seed: int = 0
    """Seed of weights, order and masks."""
    quick: bool = False
    """Run a few steps only, to see that everything works."""

    def __post_init__(self) -> None:
        if self.seconds < 60.0:
            raise ValueError(f"seconds {self.seconds} is less than 60")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} is negative")

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a second run to continue a first one."""
        return {"seconds": self.seconds, "seed": self.seed, "quick": self.quick}

    @property
    def speed_seconds(self) -> float:
        """Timed seconds of each of the three layer cases."""
        return 0.4 if self.quick else min(6.0, self.seconds / 45)

    @property
    def variants(self) -> tuple[Variant, ...]:
        return tuple(a for a in VARIANTS if a.name in (DENSE, "tree", "tree-narrow")) if self.quick else VARIANTS

    @property
    def book_characters(self) -> int | None:
        """How much of each book is read; None for all."""
        return 12_000 if self.quick else None

    @property
    def valid_windows(self) -> int:
        return 48 if self.quick else 640

    @property
    def test_sentences(self) -> int:
        return 160 if self.quick else 2000
