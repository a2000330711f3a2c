"""A student model: a copy of the dense model whose feedforwards are replaced and trained layer by layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from fastff.convert.capture import Captured
from fastff.convert.distil import normaliser, prune_layer, teach_layer, use_masked_training
from fastff.models.converted import make_converted
from fastff.models.families import DenseWeights, family_of
from fastff.models.feedforward import ConvertedFeedforward
from fastff.report.progress import Progress, silent


def dense_layers(model: Any) -> list[DenseWeights]:
    """The dense feedforwards of a model, first block to last."""
    family = family_of(model.config.model_type)
    return [family.read(block, model.config) for block in family.blocks_of(model)]


GATED_NAMES = {"gelu": "geglu", "relu": "reglu"}  # of a gated layer whose gate has that activation; others: swiglu


def describe_tree(dense: DenseWeights, *, trees: int, depth: int, leaf_width: int, shared: int = 0) -> dict[str, Any]:
    """Description of a gated tree for a dense layer: its own activation, or swiglu leaves where it is gated; and of
    `shared` neurons of the dense layer's own kind beside it."""
    gated = dense.v_in is not None
    description = {
        "kind": "fff",
        "trees": trees,
        "depth": depth,
        "leaf_width": leaf_width,
        "node_output": not gated,
        "activation": "swiglu" if gated else dense.activation,
        "gate": "boundary",
        "bias": True,
    }
    return description | ({"shared": shared, "shared_activation": _plain_activation(dense)} if shared else {})


def describe_experts(
    dense: DenseWeights, *, leaves: int, leaf_width: int, chosen: int, shared: int = 0
) -> dict[str, Any]:
    """Description of leaves of a dense layer's own neurons, of which each row takes the `chosen` best, beside `shared`
    neurons for all rows."""
    description = {
        "kind": "flat",
        "leaves": leaves,
        "k": chosen,
        "leaf_width": leaf_width,
        "activation": dense.activation if dense.v_in is None else "swiglu",
        "bias": dense.b_in is not None,
        "balance_step": 0.0,
    }
    return description | ({"shared": shared, "shared_activation": _plain_activation(dense)} if shared else {})


def describe_narrow(dense: DenseWeights, neurons: int) -> dict[str, Any]:
    """Description of the baseline: an ordinary layer of `neurons` neurons."""
    return {"kind": "dense", "intermediate_size": neurons, "activation": _plain_activation(dense), "bias": True}


def _plain_activation(dense: DenseWeights) -> str:
    return dense.activation if dense.v_in is None else GATED_NAMES.get(dense.activation, "swiglu")


def fit_tree(dense: DenseWeights, active: float, *, trees: int, depth: int, shared: int = 0) -> dict[str, Any] | None:
    """The tree of widest leaves that, with its shared neurons, spends at most `active` of the dense layer's
    floating-point operations, routing included; None if its leaves would have fewer than two neurons."""
    pair = 2 if dense.v_in is None else 3
    rows = active * dense.flops_per_row / (2 * dense.w_in.shape[1]) - pair * shared  # of width `hidden`, to be read
    path = depth * (2 if pair == 2 else 1)  # a routing node of a gated tree has no output row
    width = min(int((rows / trees - path) // pair), (dense.neurons - shared) // trees)
    if width < 2:
        return None
    return describe_tree(dense, trees=trees, depth=depth, leaf_width=width, shared=shared)


def fit_experts(dense: DenseWeights, active: float, *, leaf_width: int, shared: int = 0) -> dict[str, Any] | None:
    """All neurons beside the shared ones in leaves of that width, of which a row takes as many as spend, with the
    shared neurons and routing, at most `active` of the dense layer's work; None if that is no choice."""
    pair = 2 if dense.v_in is None else 3  # rows of a neuron; a leaf is routed by one
    leaves = (dense.neurons - shared) // leaf_width
    chosen = int((active * dense.neurons - shared - leaves / pair) / leaf_width)
    if not 0 < chosen < leaves:
        return None
    return describe_experts(dense, leaves=leaves, leaf_width=leaf_width, chosen=chosen, shared=shared)


def flops(dense: DenseWeights, description: Mapping[str, Any] | None) -> int:
    """Floating-point operations of one row in the described layer, for a dense layer's widths; None: the layer."""
    hidden = dense.w_in.shape[1]
    each = dense.flops_per_row // dense.neurons
    if description is None:
        return dense.flops_per_row
    if description["kind"] == "none":
        return 0
    if description["kind"] == "dense":
        return each * int(description["intermediate_size"])
    return ConvertedFeedforward(description, hidden, device="meta").flops_per_row


def stored_neurons(description: Mapping[str, Any]) -> int:
    """Neurons that a described layer stores, in its leaves and its shared part."""
    if description["kind"] in ("dense", "none"):
        return int(description.get("intermediate_size", 0))
    leaves = description["leaves"] if "leaves" in description else description["trees"] * 2 ** description["depth"]
    return int(leaves * description["leaf_width"] + description.get("shared", 0))


def build_student(
    teacher: Any,
    descriptions: Sequence[Mapping[str, Any] | None],
    captured: Sequence[Captured],
    *,
    steps: int,
    seed: int = 0,
    progress: Progress = silent,
    pruned: Collection[int] = (),
) -> tuple[Any, list[float | None]]:
    """Copy the teacher, replace its layers, teach each on captured rows; in the pruned blocks only leave neurons out.

    Returns the student and, per block, the share of the dense layer's effect that is unexplained
    (`distil.unexplained`), None where the layer stayed dense."""
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
        if k in pruned:
            errors.append(prune_layer(module, dense[k], norm, captured[k]))
        else:
            with torch.enable_grad():
                errors.append(teach_layer(module, dense[k], norm, captured[k], steps=steps, seed=seed * 1000 + k))
        progress("layers", k + 1, len(dense))
    return student, errors
