"""Routing statistics of the conditional layers of a model, by the name of the module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastff.conditional import ConditionalFeedforward
from fastff.layers import FFF
from fastff.routers import Router, Usage


@dataclass(frozen=True)
class Routing:
    """One layer. counts (trees, 2**(depth + 1) - 1) int64: rows that visited each node, heap order, leaves last."""

    depth: int
    counts: Tensor

    @property
    def rows(self) -> int:
        return int(self.counts[0, 0])

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
            "rows": self.rows,
            "counts": self.counts.tolist(),
            "entropy_bits": [round(float(bits), 4) for bits in usage.entropy_bits],
            "dead_leaves": usage.dead_leaves.tolist(),
        }


def conditional_layers(model: nn.Module) -> dict[str, FFF]:
    """The layers of trees by the name of the module, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FFF)}


def routed_layers(model: nn.Module) -> dict[str, FFF | ConditionalFeedforward]:
    """As `conditional_layers`, with the layers behind routers of fastff, which count their rows too."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FFF) or (isinstance(module, ConditionalFeedforward) and isinstance(module.router, Router))
    }


def collect(model: nn.Module, run: Callable[[], object]) -> dict[str, Routing]:
    """Count the leaves that every conditional layer of `model` sends rows to while `run()` evaluates it.

    What the layers had counted before is forgotten.
    """
    layers = conditional_layers(model)
    for layer in layers.values():
        layer.reset_usage()
        layer.track_usage()
    try:
        run()
        return {name: Routing(layer.config.depth, layer.usage().visits) for name, layer in layers.items()}
    finally:
        for layer in layers.values():
            layer.track_usage(False)


def visited(model: nn.Module, run: Callable[[], object]) -> dict[str, Tensor]:
    """The nodes (..., trees, levels) int64 that every row takes in each conditional layer during `run()`.

    Heap indices, root first and leaf last; of a layer called more than once, those of the last call.
    """
    seen: dict[str, Tensor] = {}
    hooks = []
    for name, layer in conditional_layers(model).items():

        def note(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            assert isinstance(module, FFF)
            seen[name] = module.path(inputs[0])

        hooks.append(layer.register_forward_pre_hook(note))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def decisions(path: Tensor) -> str:
    """The decisions of one path (levels,) of heap indices, such as `LRRL`: a right child has an even index."""
    return "".join("R" if int(node) % 2 == 0 else "L" for node in path[1:])
