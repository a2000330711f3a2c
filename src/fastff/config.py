"""Shape and cost arithmetic of a conditional feedforward layer, on plain integers.

Node `k` of a tree has the children `2k + 1` (left) and `2k + 2` (right); level `d` of a tree occupies the heap
indices `[2**d - 1, 2**(d + 1) - 1)`. After `depth` decisions a row is at leaf `heap index - (2**depth - 1)`.
Source: Belcak & Wattenhofer 2023, arXiv:2308.14711 and arXiv:2311.10770.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Protocol, cast, get_args

from fastff.errors import ShapeError

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "identity", "swiglu", "abs"]
Gate = Literal["boundary", "boundary_min", "normalised"]
Quantization = Literal["bf16", "int8"]

ACTIVATIONS: tuple[str, ...] = get_args(Activation)
GATES: tuple[str, ...] = ("boundary", "boundary_min")  # of a greedy descent
_GATES_BY_NAME: dict[str, Gate | None] = {"": None, "-gate": "boundary", "-gate-min": "boundary_min"}
_PATHS_GATES_BY_NAME: dict[str, Gate | None] = {"": None, "-gate": "normalised"}
_LEAF = r"(?P<trees>\d+)x(?P<depth>\d+)(-leaf(?P<leaf>\d+)(?=-|$))?"
_NAME = re.compile(_LEAF + r"(-swiglu(?P<swiglu>\d*))?(?P<gate>-gate(-min)?)?")
_PATHS_NAME = re.compile(_LEAF + rf"-(?P<activation>{'|'.join(ACTIVATIONS)})-paths(?P<paths>\d+)(?P<gate>-gate)?")
MAX_DEPTH = 24
ADDRESSABLE_BYTES = 2**47  # user space of a 64-bit process


def check_addressable(values: int) -> None:
    """Raise ShapeError if a weight of so many values is more than any address can name, whatever its dtype."""
    if 8 * values > ADDRESSABLE_BYTES:
        raise ShapeError(f"a weight of {8 * values} bytes is more than can be addressed, {ADDRESSABLE_BYTES}")


def check_quantization(quantization: str | None) -> None:
    """Raise ValueError unless this is None or the name of a form of quantized weights."""
    if quantization not in (None, *get_args(Quantization)):
        raise ValueError(f"quantization {quantization!r} is not None, 'bf16' or 'int8'")


class Sizes(Protocol):
    """What the configuration of every layer tells."""

    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def neurons(self) -> int: ...


class SizedLayer:
    """The sizes of a layer, which its configuration tells."""

    config: Sizes

    @property
    def in_features(self) -> int:
        return self.config.in_features

    @property
    def out_features(self) -> int:
        return self.config.out_features

    @property
    def neurons(self) -> int:
        """Neurons stored."""
        return self.config.neurons


@dataclass(frozen=True, kw_only=True)
class TreeConfig:
    """Everything about a layer but its weights.

    in_features, out_features  widths of a row before and after the layer
    depth        decisions from root to leaf, 0 to 24
    trees        trees that read the same input; their outputs are summed
    leaf_width   neurons of a leaf
    node_output  routing nodes on the path are neurons too (UltraFastBERT) or only route (FFF 2023)
    activation   gelu (exact), gelu_tanh, relu, silu, identity, abs, or swiglu (leaves only, so node_output=False)
    gate         None, or a factor on all that hangs below a node, from `tanh(|score| / tau)` of each ancestor:
                 "boundary" takes their product, "boundary_min" the least of them (not on backend "triton");
                 with paths None or "normalised", the sigmoid of a leaf's score over the sum of those chosen in its
                 tree, times their number
    tau          scale of a boundary gate, in score units
    bias         whether the layer has b_in (and, with node_output=False, b_out)
    paths        None: one leaf of each tree, by a greedy descent. k: the k best leaves of each tree by the sum along
                 their path of +score where it turns right and -score where left, found by a beam that keeps k nodes a
                 level (node_output=False only)

    Raises ShapeError (a ValueError) for a value outside its range.
    """

    in_features: int
    out_features: int
    depth: int
    trees: int = 1
    leaf_width: int = 1
    node_output: bool = True
    activation: Activation = "gelu"
    gate: Gate | None = None
    tau: float = 0.5
    bias: bool = False
    paths: int | None = None

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features", "trees", "leaf_width"):
            _check_int(name, getattr(self, name), 1, None)
        _check_int("depth", self.depth, 0, MAX_DEPTH)
        for name in ("node_output", "bias"):
            if not isinstance(getattr(self, name), bool):
                raise ShapeError(f"{name} {getattr(self, name)!r} is not True or False")
        if self.activation not in ACTIVATIONS:
            raise ShapeError(f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        self._check_paths()
        gates = GATES if self.paths is None else ("normalised",)
        if self.gate not in (None, *gates):
            chosen = "" if self.paths is None else f" with paths={self.paths}"
            raise ShapeError(f"gate {self.gate!r}{chosen} is not None, {' or '.join(map(repr, gates))}")
        if self.activation == "swiglu" and self.node_output:
            raise ShapeError("activation 'swiglu' needs node_output=False, got node_output=True")
        if not 0.0 < self.tau < float("inf"):
            raise ShapeError(f"tau {self.tau} is not a positive finite number")
        check_addressable(self.trees * max(self.in_rows * self.in_features, self.out_rows * self.out_features))

    def _check_paths(self) -> None:
        if self.paths is None:
            return
        _check_int("paths", self.paths, 1, self.leaves)
        if self.node_output:
            raise ShapeError(f"paths {self.paths} needs node_output=False, got node_output=True")

    @property
    def nodes(self) -> int:
        """Routing nodes of a tree."""
        return int(2**self.depth - 1)

    @property
    def leaves(self) -> int:
        """Leaves of a tree."""
        return int(2**self.depth)

    @property
    def levels(self) -> int:
        """Nodes and leaf on one path."""
        return self.depth + 1

    @property
    def gated_pair(self) -> bool:
        """Whether a leaf neuron has two input rows (swiglu)."""
        return self.activation == "swiglu"

    @property
    def leaf_in_rows(self) -> int:
        """Rows of w_in that belong to one leaf."""
        return self.leaf_width * (2 if self.gated_pair else 1)

    @property
    def in_rows(self) -> int:
        """Rows of w_in in a tree: nodes in heap order, then the leaves."""
        return self.nodes + self.leaves * self.leaf_in_rows

    @property
    def out_rows(self) -> int:
        """Rows of w_out in a tree: nodes too if node_output, then the leaf neurons."""
        return (self.nodes if self.node_output else 0) + self.leaves * self.leaf_width

    @property
    def path_scores(self) -> int:
        """Scores a row computes on a greedy descent of one tree: depth decisions, then the rows of its leaf."""
        return self.depth + self.leaf_in_rows

    @property
    def chosen(self) -> int:
        """Leaves of a row in each tree."""
        return 1 if self.paths is None else self.paths

    @property
    def neurons(self) -> int:
        """Neurons stored, over all trees."""
        return self.trees * self.out_rows

    @property
    def active_neurons(self) -> int:
        """Neurons evaluated for one row, over all trees."""
        return self.trees * (self.depth * self.node_output + self.chosen * self.leaf_width)

    @property
    def routing_scores(self) -> int:
        """Scores that make a decision of one row, over all trees."""
        return self.trees * sum(min(1 << level, self.chosen) for level in range(self.depth))

    @property
    def routing_features(self) -> int:
        """Features of a row that a decision reads: all."""
        return self.in_features

    @property
    def flops_per_row(self) -> int:
        """Floating-point operations of one row's matrix work, routing included (a multiply and an add are two)."""
        scores = (self.routing_scores + self.trees * self.chosen * self.leaf_in_rows) * self.in_features
        outputs = self.active_neurons * self.out_features
        return 2 * (scores + outputs)

    @property
    def shape_of_w_in(self) -> tuple[int, int, int]:
        """(trees, in_rows, in_features)."""
        return (self.trees, self.in_rows, self.in_features)

    @property
    def shape_of_w_out(self) -> tuple[int, int, int]:
        """(trees, out_rows, out_features)."""
        return (self.trees, self.out_rows, self.out_features)

    @property
    def shape_of_b_in(self) -> tuple[int, int] | None:
        """None without bias."""
        return (self.trees, self.in_rows) if self.bias else None

    @property
    def shape_of_b_out(self) -> tuple[int, int, int] | None:
        """None without bias, and with node_output=True, where no leaf has an output bias."""
        return (self.trees, self.leaves, self.out_features) if self.bias and not self.node_output else None

    @classmethod
    def parse(cls, text: str, in_features: int, out_features: int | None = None) -> TreeConfig:
        """The layer with this name, as `name` writes it; `-swiglu4` is also read as `-leaf4-swiglu`.

        A name says nothing of widths, tau and biases, and of activations other than gelu and swiglu only with paths;
        nodes are neurons unless leaves are swiglu or there are paths. Raises ShapeError for text that names no layer.
        """
        out_features = in_features if out_features is None else out_features
        found = _PATHS_NAME.fullmatch(text)
        if found is not None:
            return cls(
                in_features=in_features,
                out_features=out_features,
                trees=int(found["trees"]),
                depth=int(found["depth"]),
                leaf_width=int(found["leaf"] or 1),
                node_output=False,
                activation=cast(Activation, found["activation"]),
                gate=_PATHS_GATES_BY_NAME[found["gate"] or ""],
                paths=int(found["paths"]),
            )
        found = _NAME.fullmatch(text)
        if found is None or (found["leaf"] and found["swiglu"]):
            forms = "1x11, 32x6-gate, 36x5-leaf4-swiglu-gate or 1x8-leaf12-swiglu-paths8-gate"
            raise ShapeError(f"layer {text!r} is not like {forms}")
        part = found.groupdict()
        swiglu = part["swiglu"] is not None
        return cls(
            in_features=in_features,
            out_features=out_features,
            trees=int(part["trees"]),
            depth=int(part["depth"]),
            leaf_width=int(part["leaf"] or part["swiglu"] or 1),
            node_output=not swiglu,
            activation="swiglu" if swiglu else "gelu",
            gate=_GATES_BY_NAME[part["gate"] or ""],
        )

    @property
    def name(self) -> str:
        """`1x11` for one tree of depth 11; leaf width, swiglu and gate are appended when they are not the default, and
        activation and number of paths where there are some."""
        leaf = f"-leaf{self.leaf_width}" if self.leaf_width > 1 else ""
        gates = _GATES_BY_NAME if self.paths is None else _PATHS_GATES_BY_NAME
        gate = next(name for name, gate in gates.items() if gate == self.gate)
        if self.paths is None:
            return f"{self.trees}x{self.depth}{leaf}{'-swiglu' if self.gated_pair else ''}{gate}"
        return f"{self.trees}x{self.depth}{leaf}-{self.activation}-paths{self.paths}{gate}"


def _check_int(name: str, value: object, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ShapeError(f"{name} {value!r} is not an integer")
    if value < low or (high is not None and value > high):
        raise ShapeError(f"{name} {value} is not {'at least ' + str(low) if high is None else f'{low} to {high}'}")
