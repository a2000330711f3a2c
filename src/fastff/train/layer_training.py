"""What training does with the decisions of trees: their statistics, how fast they learn, and their balance."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastff.conditional import ConditionalFeedforward
from fastff.errors import TrainingError
from fastff.inspect import conditional_layers, routed_layers
from fastff.layers import FFF
from fastff.named_values import named_value
from fastff.routers import TreeRouter, Usage

_SCALES = ("lr_scale", "level_lr_scale", "output_scale", "routing_scale", "routing_lr_scale")


@dataclass(frozen=True)
class LayerTraining:
    """How conditional layers learn; the defaults change nothing.

    lr_scale       factor on the learning rate of all weights of a conditional layer
    level_lr_scale factor on each update of the routing rows, once a level below the root: 0.5 halves it at every level;
                   of the nodes of a TreeRouter too, while routers without trees have no levels
    freeze_after   share of the budget after which the routing rows stay as they are, so that leaves learn on fixed
                   regions; with node_output=True those rows are neurons too, which then stop learning their inputs.
                   Of ConditionalFeedforward the router's parameters stay; its balance goes on
    balance        with bias=True: after every step a node's bias moves to the side that got fewer rows, by this much
                   times the difference of the two sides' shares
    output_scale   factor on the initial output weights
    routing_scale  factor on the initial weights of routers and routing nodes: louder scores, so larger gates at first
    routing_lr_scale  factor on `lr` for the weights of the routers of ConditionalFeedforward, beside lr_scale
    feedforward_init  "published" or "fan_in", as in UltraFastBertConfig
    """

    lr_scale: float = 1.0
    level_lr_scale: float = 1.0
    freeze_after: float = 1.0
    balance: float = 0.0
    output_scale: float = 1.0
    routing_scale: float = 1.0
    routing_lr_scale: float = 1.0
    feedforward_init: str = "published"

    def __post_init__(self) -> None:
        for name in _SCALES:
            if not 0.0 < getattr(self, name) < math.inf:
                raise TrainingError(f"{name} {getattr(self, name)} is not a positive finite number")
        if not 0.0 <= self.freeze_after <= 1.0:
            raise TrainingError(f"freeze_after {self.freeze_after} is not in [0, 1]")
        if not 0.0 <= self.balance < math.inf:
            raise TrainingError(f"balance {self.balance} is not a finite number of at least 0")

    @property
    def scales_routing(self) -> bool:
        """Whether routing rows have a learning rate of their own."""
        return self.level_lr_scale != 1.0 or self.freeze_after < 1.0


_RENAMED = {"rate": "lr_scale", "level_rate": "level_lr_scale"}  # since version 0.1


def layer_training(options: list[str]) -> LayerTraining:
    """From `NAME=VALUE` words. Raises TrainingError for an unknown name or a value that is not a number."""
    given: dict[str, Any] = {}
    for option in options:
        try:
            name, value = named_value(option, [*LayerTraining.__dataclass_fields__, *_RENAMED])
        except ValueError as error:
            raise TrainingError(str(error)) from error
        name = _current(name)
        try:
            given[name] = value if name == "feedforward_init" else float(value)
        except ValueError as error:
            raise TrainingError(f"{name} {value!r} is not a number") from error
    return LayerTraining(**given)


def _current(name: str) -> str:
    """The name of an option that had another one in version 0.1."""
    current = _RENAMED.get(name, name)
    if current != name:
        warnings.warn(
            f"{name} is now called {current}; the old name will be refused later", FutureWarning, stacklevel=3
        )
    return current


@torch.no_grad()
def scale_start(model: nn.Module, options: LayerTraining) -> None:
    """Multiply the initial weights of conditional layers by output_scale and routing_scale."""
    for layer in conditional_layers(model).values():
        layer.w_out.mul_(options.output_scale)
        if isinstance(layer, FFF):
            layer.w_in[:, : layer.config.nodes].mul_(options.routing_scale)
        else:
            for parameter in layer.router.parameters():
                parameter.mul_(options.routing_scale)


class RoutingStats:
    """Rows that took each leaf, over all processes, since the last report."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = routed_layers(model)
        self.total: dict[str, Tensor] = {}  # made when something is counted: by then the model is on its device

    def collect(self) -> dict[str, Usage]:
        """What the layers have counted since the last call, summed over processes; they begin anew."""
        new = {}
        for name, layer in self.layers.items():
            counts = layer.usage().counts
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(counts)
            layer.reset_usage()
            self.total[name] = self.total[name] + counts if name in self.total else counts
            new[name] = Usage.of(counts)
        return new

    def report(self) -> dict[str, dict[str, float]]:
        """Per layer, means over its trees: leaf entropy in bits (and at most), share of dead leaves, share of nodes
        that send 99 % of 100 or more rows to one side (None if no node saw as many, or there are none). The counting
        then begins anew."""
        self.collect()
        found: dict[str, Any] = {}
        for name, counts in self.total.items():
            usage = Usage.of(counts)
            tree = has_nodes(self.layers[name])
            one_sided = usage.one_sided() if tree else math.nan
            found[name] = {
                "leaf_entropy_bits": round(float(usage.entropy_bits.mean()), 4),
                "most_bits": counts.shape[1].bit_length() - 1 if tree else round(math.log2(counts.shape[1]), 4),
                "dead_leaves": round(float(usage.dead_leaves.double().mean()) / counts.shape[1], 4),
                "one_sided_nodes": None if math.isnan(one_sided) else round(one_sided, 4),
            }
        self.total.clear()
        return found


def has_nodes(layer: FFF | ConditionalFeedforward) -> bool:
    """Whether trees route its rows."""
    return isinstance(layer, FFF) or isinstance(layer.router, TreeRouter)


class RoutingRows:
    """What decides in all conditional layers of a model, and how far an optimiser step may move it: the rows of w_in
    and b_in of an FFF's nodes, and the parameters of other layers' routers.

    Adam's steps do not depend on a gradient's scale, so a step is shortened after it was taken."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = list(conditional_layers(model).values())
        self._before: list[Tensor] = []

    @torch.no_grad()
    def remember(self) -> None:
        """Before a step."""
        self._before = [rows.clone() for layer in self._layers for rows in self._of(layer)]

    @torch.no_grad()
    def shorten(self, share: float, *, per_level: float = 1.0) -> None:
        """After it: keep `share` of the way at the root, and `per_level` times as much at every level below. All that
        decides where no trees route goes the way of a root."""
        before = iter(self._before)
        for layer in self._layers:
            for rows in self._of(layer):
                old = next(before)
                kept = torch.full_like(rows, share)
                if has_nodes(layer):
                    levels = torch.arange(1, rows.shape[1] + 1, device=rows.device).log2().floor()
                    kept *= (per_level**levels).to(rows.dtype).view(1, -1, *(1,) * (rows.dim() - 2))
                rows.copy_(torch.lerp(old, rows, kept))

    @staticmethod
    def _of(layer: FFF | ConditionalFeedforward) -> list[Tensor]:
        """Of trees (trees, nodes, ...)."""
        if isinstance(layer, ConditionalFeedforward):
            return list(layer.router.parameters())
        nodes = layer.config.nodes
        return [tensor[:, :nodes] for tensor in (layer.w_in, layer.b_in) if tensor is not None]


class RoutingLrScale:
    """Hooks on an optimiser that scale its updates of the routing rows, level by level, and stop them in the end."""

    def __init__(self, model: nn.Module, options: LayerTraining, progress: Callable[[], float]) -> None:
        self.rows, self.options, self.progress = RoutingRows(model), options, progress

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Take effect on every step of `optimizer` from now on."""
        optimizer.register_step_pre_hook(lambda *_: self.rows.remember())
        optimizer.register_step_post_hook(lambda *_: self._scale())

    def _scale(self) -> None:
        if self.progress() > self.options.freeze_after:
            self.rows.shorten(0.0)
        elif self.options.level_lr_scale != 1.0:
            self.rows.shorten(1.0, per_level=self.options.level_lr_scale)


@torch.no_grad()
def balance(layers: Mapping[str, FFF | ConditionalFeedforward], usage: dict[str, Usage], step: float) -> None:
    """Move every node's bias towards the side that got fewer rows, by `step` times (left - right) / (left + right).

    In proportion, so that it is strong where a node sends all rows to one side, which the gate rewards, and still where
    both sides get the same. Raises TrainingError for a layer with decisions but without biases.
    """
    for name, layer in layers.items():
        if not isinstance(layer, FFF) or layer.config.depth == 0 or layer.config.paths is not None:
            continue  # routers balance their leaves themselves
        if layer.b_in is None:
            raise TrainingError(f"balance needs bias=True in the feedforward, {name} has bias=False")
        nodes = layer.config.nodes
        left, right = usage[name].visits[:, 1:].unflatten(1, (nodes, 2)).unbind(-1)
        layer.b_in[:, :nodes] += step * (left - right) / (left + right).clamp(min=1)
