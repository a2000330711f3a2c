"""A student model: a copy of the dense model whose feedforwards are replaced, initialised and taught layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastff.convert.capture import Captured, Progress
from fastff.convert.distil import normaliser, teach_layer, use_masked_training
from fastff.models.converted import ConvertedFeedforward, make_converted
from fastff.models.families import DenseWeights, family_of
from fastff.tree import TreeConfig


def dense_layers(model: Any) -> list[DenseWeights]:
    """The dense feedforwards of a model, first block to last."""
    family = family_of(model.config.model_type)
    return [family.read(block, model.config) for block in family.blocks_of(model)]


def describe_tree(dense: DenseWeights, *, trees: int, depth: int, leaf_width: int) -> dict[str, Any]:
    """Description of a gated tree for a dense layer: its own activation, or swiglu leaves where it is gated."""
    gated = dense.v_in is not None
    return {
        "kind": "fff",
        "trees": trees,
        "depth": depth,
        "leaf_width": leaf_width,
        "node_output": not gated,
        "activation": "swiglu" if gated else dense.activation,
        "gate": "boundary",
        "bias": True,
    }


def describe_narrow(dense: DenseWeights, neurons: int) -> dict[str, Any]:
    """Description of the control: an ordinary layer of `neurons` neurons."""
    activation = dense.activation
    if dense.v_in is not None:
        activation = {"gelu": "geglu", "relu": "reglu"}.get(dense.activation, "swiglu")
    return {"kind": "dense", "intermediate_size": neurons, "activation": activation, "bias": True}


def tree_for(dense: DenseWeights, active: float) -> dict[str, Any]:
    """The tree that spends at most `active` of the dense layer's floating-point operations, routing included.

    Of 8, 6, 4, 3, 2 and 1 trees of depth 4 to 6, the one that stores most neurons up to the dense layer's number, and
    of those equal the one of more trees. Raises ValueError if none is small enough."""
    best: tuple[tuple[int, int], dict[str, Any]] | None = None
    for trees in (8, 6, 4, 3, 2, 1):
        for depth in (4, 5, 6):
            width = _widest_leaf(dense, trees, depth, active)
            if width < 2:
                continue
            stored = trees * 2**depth * width
            key = (min(stored, dense.neurons), trees)
            if best is None or key > best[0]:
                best = (key, describe_tree(dense, trees=trees, depth=depth, leaf_width=width))
    if best is None:
        least = min(flops(dense, describe_tree(dense, trees=1, depth=4, leaf_width=2)), dense.flops_per_row)
        raise ValueError(f"active {active:.2%} is below {least / dense.flops_per_row:.2%}, the least for this layer")
    return best[1]


def _widest_leaf(dense: DenseWeights, trees: int, depth: int, active: float) -> int:
    pair = 3 if dense.v_in is not None else 2
    rows = active * dense.flops_per_row / (2 * dense.w_in.shape[1])  # rows of width `hidden` that may be read
    path = depth * (1 if pair == 3 else 2)  # a routing node of a gated tree has no output row
    return min(int((rows / trees - path) // pair), dense.neurons // trees)


def flops(dense: DenseWeights, description: Mapping[str, Any]) -> int:
    """Floating-point operations of one row in the described layer, for a dense layer's widths."""
    hidden = dense.w_in.shape[1]
    if description["kind"] == "none":
        return 0
    if description["kind"] == "dense":
        return dense.flops_per_row // dense.neurons * int(description["intermediate_size"])
    options = {name: value for name, value in description.items() if name != "kind"}
    return int(TreeConfig(in_features=hidden, out_features=hidden, **options).flops_per_row)


def build_student(
    teacher: Any,
    descriptions: Sequence[Mapping[str, Any] | None],
    captured: Sequence[Captured],
    *,
    steps: int,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> tuple[Any, list[float | None]]:
    """Copy the teacher, replace its layers, teach each on captured rows. Returns the student and, per block, the share
    of the dense layer's effect that its new layer misses (`distil.missed`), None where the layer stayed dense."""
    dense = dense_layers(teacher)
    student = make_converted(teacher, descriptions)
    use_masked_training(student.modules(), student.device.type == "cuda")
    family = family_of(student.config.model_type)
    errors: list[float | None] = []
    for k, block in enumerate(family.blocks_of(teacher)):
        module = family.slot_of(family.blocks_of(student)[k])
        if not isinstance(module, ConvertedFeedforward):
            errors.append(None)
            continue
        norm = normaliser(teacher, block)
        for parameter in block.parameters():
            parameter.requires_grad_(False)
        with torch.enable_grad():
            errors.append(teach_layer(module, dense[k], norm, captured[k], steps=steps, seed=seed * 1000 + k))
        progress("layers", k + 1, len(dense))
    return student, errors
