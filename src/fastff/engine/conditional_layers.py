"""Conditional feedforward layers in the native engine's terms: routers and leaves, one kind for a model's layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastff.conditional import ConditionalFeedforward
from fastff.config import ACTIVATIONS
from fastff.engine.native_file import StoredTensor
from fastff.errors import CheckpointError
from fastff.ops.native_linear import MatrixForm
from fastff.ops.native_router import GATES, KINDS
from fastff.routers import Router


def settings(layer: ConditionalFeedforward) -> dict[str, Any]:
    """The header's description of such a layer (`csrc/model/feedforward.cpp`).

    Raises CheckpointError for a router that is not one of fastff's.
    """
    config = layer.config
    router = _router(layer).config
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
    }


def _router(layer: ConditionalFeedforward) -> Router:
    if not isinstance(layer.router, Router):
        raise CheckpointError(f"the router {type(layer.router).__name__} is not one of fastff's: it cannot be exported")
    return layer.router


def tensors(layer: ConditionalFeedforward, prefix: str) -> Iterator[tuple[str, StoredTensor]]:
    """What is stored of a layer. Leaves are rounded to bfloat16 here and to 8 bits when they are packed; routers stay
    exact, so that they choose as in training."""
    yield from _router_tensors(layer, prefix)
    for name in ("w_in", "w_out", "b_in", "b_out"):
        tensor = getattr(layer, name)
        if tensor is not None:
            yield f"{prefix}{name}", _leaves(tensor)


def _router_tensors(layer: ConditionalFeedforward, prefix: str) -> Iterator[tuple[str, StoredTensor]]:
    router = _router(layer)
    weight = routing_weight(layer, router).flatten(0, -2)

    def flat(tensor: Tensor) -> StoredTensor:
        return StoredTensor((tensor.numel(),), lambda: tensor.flatten())

    yield f"{prefix}router", StoredTensor(tuple(weight.shape), lambda: weight)
    if router.bias is not None:
        yield f"{prefix}router.bias", flat(router.bias)
    if router.balance is not None:
        yield f"{prefix}balance", flat(router.balance)


def routing_weight(layer: ConditionalFeedforward, router: Router) -> Tensor:
    """The router's weight for whole rows, as the core's routers read them: zeros for features that it leaves unread.

    Raises CheckpointError for product keys that leave some: each of their halves would be of other features.
    """
    unread = layer.config.in_features - router.in_features
    if unread and router.config.kind == "product_key":
        raise CheckpointError(f"product keys that leave {unread} features unread cannot be exported")
    weight: Tensor = router.weight.detach()
    return pad(weight, (0, unread)) if unread else weight


def _leaves(tensor: Tensor) -> StoredTensor:
    return StoredTensor(tuple(tensor.shape), lambda: tensor, "bf16")


# ---- weights in groups of 32 inputs (`csrc/model/grouped_leaves.h`) ----

_PANEL = 64  # output rows of a panel; of gated pairs half as many


def filled_width(layer: ConditionalFeedforward) -> int:
    """Neurons of a leaf with those that fill its panels up."""
    panel = _PANEL // 2 if layer.config.activation == "swiglu" else _PANEL
    return -(-layer.config.leaf_width // panel) * panel


def takes_4_bits(layer: ConditionalFeedforward) -> bool:
    """Whether 4 bits save memory: narrow leaves fill a small part of a panel, and stay in 8."""
    return 4.5 * filled_width(layer) < 0.9 * 8 * layer.config.leaf_width


def grouped_tensors(layer: ConditionalFeedforward, prefix: str, form: MatrixForm) -> Iterator[tuple[str, StoredTensor]]:
    """What is stored of a layer whose leaves are matrices of this form, one after another."""
    yield from _router_tensors(layer, prefix)
    config, width = layer.config, filled_width(layer)
    gated, hidden = config.activation == "swiglu", -(-config.out_features // _PANEL) * _PANEL

    def rows_in(of: Tensor) -> Tensor:
        """(leaves, rows of a leaf, ...) to (all rows, ...): all gates, then all values, filled up."""
        parts = of.detach().float().split(config.leaf_width, 1)
        end = (*(0, 0) * (of.dim() - 2), 0, width - config.leaf_width)
        return torch.cat([pad(part, end).flatten(0, 1) for part in parts])

    def rows_out() -> Tensor:
        turned = layer.w_out.detach().float().transpose(1, 2)
        return pad(turned, (0, width - config.leaf_width, 0, hidden - config.out_features)).flatten(0, 1)

    shape = (config.leaves * width, config.in_features)
    yield f"{prefix}w_in", StoredTensor(shape, lambda: rows_in(layer.w_in), form, gated)
    yield f"{prefix}w_out", StoredTensor((config.leaves * hidden, width), rows_out, form)
    b_in, b_out = layer.b_in, layer.b_out
    if b_in is not None:
        yield f"{prefix}b_in", StoredTensor((config.leaves * width * (1 + gated),), lambda: rows_in(b_in))
    if b_out is not None:
        yield f"{prefix}b_out", StoredTensor(tuple(b_out.shape), lambda: b_out)
