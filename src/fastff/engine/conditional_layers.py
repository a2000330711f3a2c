"""Conditional feedforward layers in the native engine's terms: routers and leaves, one kind for a model's layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from fastff.conditional import ConditionalFeedforward
from fastff.config import ACTIVATIONS
from fastff.engine.native_file import StoredTensor
from fastff.errors import CheckpointError
from fastff.layers import FFF
from fastff.models.feedforward import ConvertedFeedforward
from fastff.ops.native_router import GATES, KINDS
from fastff.routers import Router


def settings(layer: ConditionalFeedforward) -> dict[str, Any]:
    """The header's description of such a layer (`csrc/model/conditional_load.cpp`).

    Raises CheckpointError for a router that is not one of fastff's.
    """
    config = layer.config
    made = _router(layer)
    router, weight, balance = made.config, made.weight, made.balance
    return {
        "kind": KINDS.index(router.kind),
        "trees": router.trees,
        "candidates": router.candidates,
        "chosen": router.chosen,
        "depth": router.depth,
        "gate": GATES.index(router.gate),
        "tau": float(router.tau),
        "leaves": config.leaves,
        "leaf_width": config.leaf_width,
        "activation": ACTIVATIONS.index(config.activation),
        "router_rows": weight.numel() // weight.shape[-1],
        "balanced": 0 if balance is None else balance.numel(),
    }


def _router(layer: ConditionalFeedforward) -> Router:
    if not isinstance(layer.router, Router):
        raise CheckpointError(f"the router {type(layer.router).__name__} is not one of fastff's: it cannot be exported")
    return layer.router


def common_settings(layers: Sequence[ConditionalFeedforward]) -> dict[str, Any]:
    """The settings of all layers. Raises CheckpointError for layers that differ."""
    kinds = [settings(layer) for layer in layers]
    if any(kind != kinds[0] for kind in kinds):
        raise CheckpointError("the conditional layers of the blocks differ: the native engine takes one kind for all")
    return kinds[0]


def layers_of(slots: Sequence[nn.Module]) -> list[ConditionalFeedforward]:
    """The conditional feedforwards of a model's blocks, from the modules in the slots; none for a dense model.

    Raises CheckpointError for a model with several kinds, or with trees, which the native engine does not have yet.
    """
    found = [slot for slot in slots if isinstance(slot, ConditionalFeedforward)]
    if len(found) not in (0, len(slots)):
        raise CheckpointError(
            f"{len(found)} of {len(slots)} blocks are conditional: the native engine takes all or none"
        )
    other = next((slot for slot in slots if isinstance(slot, FFF | ConvertedFeedforward)), None)
    if other is not None:
        raise CheckpointError(f"feedforwards of the kind {type(other).__name__} are not among the native engine's")
    return found


def tensors(layer: ConditionalFeedforward, prefix: str) -> Iterator[tuple[str, StoredTensor]]:
    """What is stored of a layer. Leaves are rounded to bfloat16 here and to 8 bits when they are packed; routers stay
    exact, so that they choose as in training."""
    router = _router(layer)

    def rows(tensor: Tensor) -> StoredTensor:
        return StoredTensor((tensor.numel() // tensor.shape[-1], tensor.shape[-1]), lambda: tensor.flatten(0, -2))

    def flat(tensor: Tensor) -> StoredTensor:
        return StoredTensor((tensor.numel(),), lambda: tensor.flatten())

    yield f"{prefix}router", rows(router.weight)
    if router.bias is not None:
        yield f"{prefix}router.bias", flat(router.bias)
    if router.balance is not None:
        yield f"{prefix}balance", flat(router.balance)
    for name in ("w_in", "w_out", "b_in", "b_out"):
        tensor = getattr(layer, name)
        if tensor is not None:
            yield f"{prefix}{name}", _leaves(tensor)


def _leaves(tensor: Tensor) -> StoredTensor:
    return StoredTensor(tuple(tensor.shape), lambda: tensor, "bf16")
