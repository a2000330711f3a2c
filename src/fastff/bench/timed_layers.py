"""The layers that are timed, with weights that every process draws alike, and what they should compute in float64."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastff
from fastff.bench.workloads import DenseConfig, Subject, label
from fastff.config import TreeConfig
from fastff.ops import reference
from fastff.ops.reference import Routed
from fastff.ops.weights import Weights

_BLOCK = 2**24 + 1  # weights drawn at once; larger matrices repeat them, shifted, because drawing takes seconds


class DenseLayer(nn.Module):
    """Linear, activation, Linear without biases; for swiglu `up` holds the gate's rows, then the value's."""

    def __init__(self, config: DenseConfig, **make: Any) -> None:
        super().__init__()
        self.config = config
        # Built without torch's own initialisation, which takes seconds at the widest layers.
        self.up = nn.utils.skip_init(nn.Linear, config.features, config.in_rows, bias=False, **make)
        self.down = nn.utils.skip_init(nn.Linear, config.neurons, config.features, bias=False, **make)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down(activate(self.up(x), self.config.activation)))


def activate(scores: Tensor, activation: str) -> Tensor:
    """gelu or swiglu of scores (rows, in_rows) to (rows, neurons)."""
    return reference.activate(scores, activation)


def dense(x: Tensor, w_in: Tensor, w_out: Tensor, activation: str) -> Tensor:
    """The dense layer as a function: w_in (in_rows, features), w_out (features, neurons)."""
    return F.linear(activate(F.linear(x, w_in), activation), w_out)


def make_layer(subject: Subject, index: int, *, seed: int, **make: Any) -> DenseLayer | fastff.FFF:
    """Layer number `index` of a model, the same in every process. make: device and dtype."""
    key = zlib.crc32(f"{label(subject)} {index} {seed}".encode())
    generator = torch.Generator(make.get("device", "cpu")).manual_seed(key)
    with torch.no_grad():
        if isinstance(subject, DenseConfig):
            layer = DenseLayer(subject, **make)
            _normal(layer.up.weight, subject.features**-0.5, generator)
            _normal(layer.down.weight, subject.neurons**-0.5, generator)
            return layer
        tree = empty_tree(subject, **make)
        _normal(tree.w_in, subject.in_features**-0.5, generator)
        _normal(tree.w_out, subject.active_neurons**-0.5, generator)
    return tree


def empty_tree(config: TreeConfig, **make: Any) -> fastff.FFF:
    """A layer of this configuration whose weights are not set."""
    names = ("depth", "trees", "leaf_width", "node_output", "activation", "gate", "tau", "bias")
    options = {name: getattr(config, name) for name in names}
    device = make.pop("device", "cpu")
    layer = fastff.FFF(config.in_features, config.out_features, **options, device="meta", **make)
    layer = layer.to_empty(device=device)
    layer.reset_usage()
    return layer


def _normal(out: Tensor, scale: float, generator: torch.Generator) -> None:
    flat = out.view(-1)
    block = torch.randn(min(_BLOCK, len(flat)), generator=generator, device=out.device).mul_(scale).to(out.dtype)
    for start in range(0, len(flat), len(block)):
        part = flat[start : start + len(block)]
        part.copy_(block[: len(part)])


class _Exact:
    """Weights that are read as float64, only where they are read."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __getitem__(self, index: Any) -> Tensor:
        return self.weight[index].double()


def expected(layer: DenseLayer | fastff.FFF, x: Tensor) -> Routed:
    """What the layer should give for x (rows, features), in float64. A dense layer has no leaves and never turns."""
    x = x.double()
    if isinstance(layer, DenseLayer):
        no_leaf = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
        return Routed(_dense_in_float64(layer, x), no_leaf, x.new_full((len(x),), float("inf")))
    w_in, w_out = (cast(Tensor, _Exact(weight)) for weight in (layer.w_in, layer.w_out))
    if layer.config.depth == 0:
        w_in, w_out = layer.w_in.double(), layer.w_out.double()
    return reference.forward(x, Weights(w_in, None, w_out, None), config=layer.config)


def _dense_in_float64(layer: DenseLayer, x: Tensor, step: int = 4096) -> Tensor:
    """Neurons in steps, so that the widest layers need no float64 copy."""
    config, total = layer.config, torch.zeros_like(x)
    for start in range(0, config.neurons, step):
        ids = torch.arange(start, min(start + step, config.neurons), device=x.device)
        rows = torch.cat((ids, ids + config.neurons)) if config.activation == "swiglu" else ids
        values = activate(F.linear(x, layer.up.weight[rows].double()), config.activation)
        total = total + F.linear(values, layer.down.weight[:, ids].double())
    return total


def train_step(call: Callable[[Tensor], Tensor], parameters: list[nn.Parameter]) -> Callable[[Tensor], Tensor]:
    """Forward and backward, to x and the weights, for an upstream gradient of ones: x's gradient."""

    def step(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = call(x)
        return torch.autograd.grad(y, [x, *parameters], torch.ones_like(y))[0]

    return step
