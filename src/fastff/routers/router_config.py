"""What a router is, on plain integers: its kind, how many leaves it knows and chooses, and what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from fastff.config import GATES, MAX_DEPTH, check_addressable
from fastff.errors import ShapeError

Kind = Literal["tree", "paths", "flat", "product_key"]
RouterGate = Literal["boundary", "boundary_min", "normalised"]

KINDS: tuple[str, ...] = get_args(Kind)
_SIZES = {  # what a kind is sized by, beside in_features, and the least of each
    "tree": {"depth": 0, "trees": 1},
    "paths": {"depth": 0, "trees": 1, "chosen": 1},
    "flat": {"candidates": 1, "chosen": 1},
    "product_key": {"candidates": 1, "chosen": 1},
}
_LEAST = {"in_features": 1, "depth": 0, "trees": 1, "candidates": 0, "chosen": 1}  # of a kind that does not use it


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Everything about a router but its weights.

    kind         tree         each tree's leaf by a greedy descent: score > 0 turns right
                 paths        of each tree the `chosen` best leaves by a beam that keeps as many nodes a level; a leaf's
                              score is the sum along its path of +score where it turns right, -score where left
                 flat         the `chosen` best of `candidates` leaves, one score each
                 product_key  the `chosen` best of candidates**2 leaves: leaf a * candidates + b scores
                              first[a] + second[b], each of them of one half of the row
    in_features  width of a row; even for product_key
    depth, trees of tree and paths
    candidates   of flat and product_key
    chosen       leaves of a row, in each tree; 1 for tree
    gate         None: 1. tree: "boundary" or "boundary_min", as of TreeConfig. Others: "normalised",
                 sigmoid(score) over the sum of those chosen (in a tree), times their number
    tau          scale of a boundary gate, in score units
    bias         whether scores have one

    Raises ShapeError (a ValueError) for a value outside its range.
    """

    kind: Kind
    in_features: int
    depth: int = 0
    trees: int = 1
    candidates: int = 0
    chosen: int = 1
    gate: RouterGate | None = None
    tau: float = 0.5
    bias: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ShapeError(f"router kind {self.kind!r} is not one of {', '.join(KINDS)}")
        for name, least in {**_LEAST, **_SIZES[self.kind]}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ShapeError(f"{name} {value!r} of a {self.kind} router is not an integer of at least {least}")
        if self.depth > MAX_DEPTH:
            raise ShapeError(f"depth {self.depth} is not 0 to {MAX_DEPTH}")
        if self.chosen > self.leaves // self.trees:
            raise ShapeError(f"{self.chosen} leaves cannot be chosen of {self.leaves // self.trees}")
        if self.kind == "product_key" and self.in_features % 2:
            raise ShapeError(f"in_features {self.in_features} of a product_key router is odd: it reads a row in halves")
        gates = (None, *(GATES if self.kind == "tree" else ("normalised",)))
        if self.gate not in gates:
            raise ShapeError(f"gate {self.gate!r} of a {self.kind} router is not {' or '.join(map(repr, gates))}")
        if not 0.0 < self.tau < float("inf"):
            raise ShapeError(f"tau {self.tau} is not a positive finite number")
        check_addressable(math.prod(self.shape_of_weight))

    @property
    def is_tree(self) -> bool:
        """Whether it descends trees."""
        return self.kind in ("tree", "paths")

    @property
    def nodes(self) -> int:
        """Routing nodes of a tree; 0 without trees."""
        return int(2**self.depth - 1)

    @property
    def leaves(self) -> int:
        """Leaves that it knows, over all trees."""
        if self.is_tree:
            return int(self.trees * 2**self.depth)
        return self.candidates if self.kind == "flat" else self.candidates**2

    @property
    def k(self) -> int:
        """Leaves of a row, over all trees."""
        return self.trees * self.chosen

    @property
    def shape_of_weight(self) -> tuple[int, ...]:
        """(trees, nodes, in_features), (leaves, in_features) or, of product keys, (2, candidates, in_features / 2)."""
        if self.is_tree:
            return (self.trees, self.nodes, self.in_features)
        if self.kind == "flat":
            return (self.candidates, self.in_features)
        return (2, self.candidates, self.in_features // 2)

    @property
    def shape_of_bias(self) -> tuple[int, ...] | None:
        """None without bias."""
        return self.shape_of_weight[:-1] if self.bias else None

    @property
    def shape_of_balance(self) -> tuple[int, ...] | None:
        """Of what is added to selections: every node of the trees in heap order, leaves last, for paths; the leaves for
        flat and product_key; None for tree, which has nothing to choose among."""
        if self.kind == "tree":
            return None
        return (self.trees, 2 * 2**self.depth - 1) if self.kind == "paths" else (self.leaves,)

    @property
    def scores_per_row(self) -> int:
        """Scores of in_features products that a row needs."""
        if self.is_tree:
            return self.trees * sum(min(1 << level, self.chosen) for level in range(self.depth))
        return self.candidates  # product_key: two halves of a row each

    @property
    def flops_per_row(self) -> int:
        """Floating-point operations of one row's matrix work (a multiply and an add are two)."""
        return 2 * self.scores_per_row * self.in_features
