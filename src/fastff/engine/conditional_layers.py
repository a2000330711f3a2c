"""Conditional feedforward layers in the native engine's terms: routers and leaves, one kind for a model's layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fastff.conditional import ConditionalFeedforward
from fastff.config import ACTIVATIONS
from fastff.engine.native_file import StoredTensor
from fastff.errors import CheckpointError
from fastff.ops.native_router import GATES, KINDS
from fastff.routers import Router


def settings(layer: ConditionalFeedforward) -> dict[str, Any]:
    """The header's description of such a layer (`csrc/model/feedforward.cpp`).

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
