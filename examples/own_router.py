"""A router of your own: any module that gives every row its leaves and a gate for each.

    python examples/own_router.py

This one sends a row to the leaves whose centres are nearest to it. The layer behind it trains like any module; here it
learns a function that differs from region to region.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import fastff


class NearestCentre(nn.Module):
    """leaf (..., k) int64, ascending, and gate (..., k), which gradients pass through."""

    def __init__(self, in_features: int, leaves: int, k: int) -> None:
        super().__init__()
        self.leaves, self.k = leaves, k
        self.centre = nn.Parameter(torch.randn(leaves, in_features))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        closeness = -torch.cdist(x.reshape(-1, x.shape[-1]), self.centre)
        leaf = closeness.topk(self.k, dim=-1).indices.sort(-1).values
        gate = closeness.gather(-1, leaf).softmax(-1) * self.k
        shape = (*x.shape[:-1], self.k)
        return leaf.reshape(shape), gate.reshape(shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()

    torch.manual_seed(0)
    router = NearestCentre(in_features=8, leaves=16, k=2)
    layer = fastff.ConditionalFeedforward(8, router=router, leaves=16, leaf_width=8)
    with torch.no_grad():
        layer.w_in.normal_(std=8**-0.5)
        layer.w_out.normal_(std=0.3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    for step in range(options.steps):
        x = torch.randn(256, 8)
        wanted = x.roll(1, -1) * x.sign()[:, :1]  # turns round where the first number is negative
        loss = (layer(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, options.steps // 5) == 0 or step == options.steps - 1:
            print(f"step {step}: loss {float(loss):.3f}")
    leaf, _ = router(torch.randn(4096, 8))
    print("rows a leaf:", leaf.flatten().bincount(minlength=16).tolist())


if __name__ == "__main__":
    main()
