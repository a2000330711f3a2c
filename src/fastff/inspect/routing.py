"""Routing statistics of the conditional layers of a model, by the name of the module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from fastff.conditional import ConditionalFeedforward
from fastff.layers import FFF
from fastff.routers import Router, Usage
from fastff.routers.usage import path_of


@dataclass(frozen=True)
class Routing:
    """One layer. counts (trees, 2**(depth + 1) - 1) int64: rows that visited each node, heap order, leaves last; a node
    on several of a row's paths counts it as often. Of a router without trees depth is 0 and counts (1, leaves).
    chosen: leaves that a row takes of each tree."""

    depth: int
    counts: Tensor
    chosen: int = 1

    @classmethod
    def of(cls, layer: FFF | ConditionalFeedforward) -> Routing:
        """What the layer has counted."""
        usage = layer.usage()
        if isinstance(layer, FFF):
            return cls(layer.config.depth, usage.visits, layer.config.chosen)
        router = cast(Router, layer.router).config
        return cls(router.depth, usage.visits if router.is_tree else usage.counts, router.chosen)

    @property
    def rows(self) -> int:
        return int(self.usage.counts[0].sum()) // self.chosen

    @property
    def usage(self) -> Usage:
        """Counts, entropy in bits and dead leaves of the leaves."""
        return Usage.of(self.counts[:, 2**self.depth - 1 :])

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        usage = self.usage
        return {
            "depth": self.depth,
            "trees": self.counts.shape[0],
            "chosen": self.chosen,
            "rows": self.rows,
            "counts": self.counts.tolist(),
            "entropy_bits": [round(float(bits), 4) for bits in usage.entropy_bits],
            "dead_leaves": usage.dead_leaves.tolist(),
        }


def conditional_layers(model: nn.Module) -> dict[str, FFF | ConditionalFeedforward]:
    """The conditional layers behind any router by the name of the module, in order."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, FFF | ConditionalFeedforward)}


def routed_layers(model: nn.Module) -> dict[str, FFF | ConditionalFeedforward]:
    """Those of `conditional_layers` whose router is one of fastff's, which counts its rows."""
    layers = conditional_layers(model)
    return {name: layer for name, layer in layers.items() if isinstance(layer, FFF) or isinstance(layer.router, Router)}


def collect(model: nn.Module, run: Callable[[], object]) -> dict[str, Routing]:
    """Count the leaves that every layer of `routed_layers` sends rows to while `run()` evaluates the model.

    What the layers had counted before is forgotten.
    """
    layers = routed_layers(model)
    for layer in layers.values():
        layer.reset_usage()
        layer.track_usage()
    try:
        run()
        return {name: Routing.of(layer) for name, layer in layers.items()}
    finally:
        for layer in layers.values():
            layer.track_usage(False)


def visited(model: nn.Module, run: Callable[[], object]) -> dict[str, Tensor]:
    """The nodes (..., k, levels) int64 that every row takes in each layer of `routed_layers` during `run()`.

    k: leaves of a row, those of the first tree first; one of each tree of an FFF. Heap indices, root first and leaf
    last; the leaf alone where no trees route. Of a layer called more than once, those of the last call.
    """
    seen: dict[str, Tensor] = {}
    hooks = []
    for name, layer in routed_layers(model).items():

        def note(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            assert isinstance(module, FFF | ConditionalFeedforward)
            seen[name] = _path(module, inputs[0])

        hooks.append(layer.register_forward_pre_hook(note))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _path(layer: FFF | ConditionalFeedforward, x: Tensor) -> Tensor:
    if isinstance(layer, FFF):
        return layer.path(x)
    leaf, router = layer.route(x), cast(Router, layer.router).config
    return path_of(leaf % 2**router.depth, router.depth) if router.is_tree else leaf.unsqueeze(-1)


def decisions(path: Tensor) -> str:
    """The decisions of one path (levels,) of heap indices, such as `LRRL`: a right child has an even index."""
    return "".join("R" if int(node) % 2 == 0 else "L" for node in path[1:])
