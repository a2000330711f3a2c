"""A training step of a whole transformer: what conditional layers are worth beside attention and the optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastff.bench.gpu_device import Device, Run
from fastff.bench.timed_layers import make_layer
from fastff.bench.workloads import Subject, features_of


@dataclass(frozen=True)
class Sizes:
    """Of the model and its batch; the width is the feedforward's."""

    layers: int = 12
    heads: int = 12
    sequence: int = 128
    batch: int = 256


class Block(nn.Module):
    """Pre-norm transformer block around a given feedforward layer."""

    def __init__(self, width: int, heads: int, feedforward: nn.Module, **make: Any) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width, **make) for _ in range(2)])
        self.qkv, self.out = (
            nn.Linear(width, 3 * width, bias=False, **make),
            nn.Linear(width, width, bias=False, **make),
        )
        self.heads, self.feedforward = heads, feedforward

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norms[0](x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return cast(Tensor, x + self.feedforward(self.norms[1](x)))


def training_step(feedforward: Subject, sizes: Sizes, device: Device, seed: int) -> Run:
    """Forward, backward and AdamW of the model, in bf16."""
    make: dict[str, Any] = {"device": device.torch_device, "dtype": torch.bfloat16}
    width = features_of(feedforward)
    torch.manual_seed(seed)
    layers = [make_layer(feedforward, index, seed=seed, **make) for index in range(sizes.layers)]
    model = nn.Sequential(*(Block(width, sizes.heads, layer.train(), **make) for layer in layers))
    on_gpu = device.torch_device == "cuda"  # whose optimiser must not ask the host for its step, to be captured
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=on_gpu)
    x = torch.randn(sizes.batch, sizes.sequence, width, **make)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
