"""Ways to compute a layer on a GPU, as functions that run a whole chain of layers once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

import fastff
from fastff import ops
from fastff.bench.gpu_cases import Cell
from fastff.bench.gpu_device import Device, Run
from fastff.bench.timed_layers import DenseLayer, dense, make_layer
from fastff.ops import reference
from fastff.ops.reference import Routed
from fastff.ops.weights import Weights

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Layer = DenseLayer | fastff.FFF
Call = Callable[[Tensor], Tensor]


def layers_of(cell: Cell, device: Device, seed: int, count: int) -> list[Layer]:
    """The first layers of the chain, on the device and in the case's dtype."""
    make: dict[str, Any] = {"device": device.torch_device, "dtype": DTYPES[cell.case.dtype]}
    made = [make_layer(cell.subject, index, seed=seed, **make) for index in range(count)]
    return [layer.requires_grad_(cell.case.training) for layer in made]


def rows_of(cell: Cell, device: Device, seed: int, most: int | None = None) -> Tensor:
    """Normal rows (rows, features) of the case; its first `most`."""
    features = cell.case.pair.tree.in_features
    generator = torch.Generator(device.torch_device).manual_seed(seed)
    count = cell.case.rows if most is None else min(most, cell.case.rows)
    x = torch.randn(count, features, generator=generator, device=device.torch_device)
    return x.to(DTYPES[cell.case.dtype]).requires_grad_(cell.case.training)


def routed(cell: Cell, layer: Layer, device: Device) -> Callable[[Tensor], Routed]:
    """What a conditional provider computes, with leaves."""
    layer = cast(fastff.FFF, layer)
    weights = Weights(layer.w_in, None, layer.w_out, None)
    if cell.provider == "torch gather+bmm":
        return lambda x: reference.forward(x, weights, config=layer.config)
    if cell.provider == "torch masked":
        return lambda x: reference.forward_masked(x, weights, config=layer.config)
    return lambda x: ops.forward(x, *weights, config=layer.config, backend=device.backend)


def call_of(cell: Cell, layer: Layer, device: Device) -> Call:
    """One layer as a function of its rows."""
    if isinstance(layer, DenseLayer):
        if "compiled" not in cell.provider:
            return layer
        # A function of the weights: the layers of a chain share what is compiled.
        compiled, up, down = torch.compile(dense, dynamic=False), layer.up.weight, layer.down.weight
        return lambda x: compiled(x, up, down, layer.config.activation)
    conditional = routed(cell, layer, device)
    return lambda x: conditional(x).y


def step(call: Call, x: Tensor, weights: Sequence[Tensor], grad: Tensor | None) -> Tensor:
    """Forward, and with `grad` backward to x and the weights."""
    y = call(x)
    if grad is not None:
        torch.autograd.grad(y, [x, *weights], grad)
    return y


def chain(cell: Cell, device: Device, seed: int) -> tuple[Run, Run]:
    """A function that runs the chain once, and one that only runs its first layer's forward."""
    x = rows_of(cell, device, seed)
    grad = torch.ones_like(x) if cell.case.training else None
    layers = [
        (call_of(cell, layer, device), list(layer.parameters()))
        for layer in layers_of(cell, device, seed, cell.case.layers)
    ]

    def run() -> None:
        for call, weights in layers:
            step(call, x, weights, grad)

    return run, lambda: layers[0][0](x)
