"""How much a decoder's distribution changes when one of its feedforwards is made narrower, and no other.

python experiments/convert/decoder_loss_increase.py GGUF TRAIN.npy OUT.json

A layer keeps the neurons that do most on 8,192 rows, or none; its outputs are their ridge regression. The increase is
how far the model's distribution then is from the dense one's on 2,048 other tokens, in nats a token (divergence).
`decoder_variants.py` shares out the work by it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from decoder import LENGTH, blocks, load
from decoder_variants import NARROW
from torch import Tensor

MEASURED, SEEN = 8, 32  # blocks of text
APART = 97  # blocks between two of them
RIDGE = 1e-3  # of the mean diagonal


class Measured:
    """A model, what its blocks read on some text, and its distribution there."""

    @torch.no_grad()
    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model, self.layers = model, model.model.layers
        self.into: list[Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(
                lambda _, args, inputs: self.into.append(args[0] if args else inputs["hidden_states"]), with_kwargs=True
            )
            for layer in self.layers
        ]
        self.log_p = model(input_ids=ids).logits.log_softmax(-1)
        for hook in hooks:
            hook.remove()
        self.inputs = {
            "attention_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(len(ids), 1, LENGTH, LENGTH),
            "position_ids": torch.arange(LENGTH)[None],
        }
        self.inputs["position_embeddings"] = model.model.rotary_emb(self.into[0], self.inputs["position_ids"])

    @torch.no_grad()
    def divergence(self, first: int) -> float:
        """Of the distribution, when blocks from `first` on run again."""
        h = self.into[first]
        for layer in self.layers[first:]:
            given = layer(h, **self.inputs)
            h = given if isinstance(given, Tensor) else given[0]
        log_q = self.model.lm_head(self.model.model.norm(h)).log_softmax(-1)
        return float((self.log_p.exp() * (self.log_p - log_q)).sum(-1).mean())


@torch.no_grad()
def rows_of(model: Any, ids: Tensor) -> list[Tensor]:
    """What every feedforward reads (rows, hidden)."""
    seen: list[list[Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, k=k: seen[k].append(args[0].flatten(0, 1)))
        for k, layer in enumerate(model.model.layers)
    ]
    for part in ids.split(8):
        model(input_ids=part)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in seen]


@torch.no_grad()
def narrower(mlp: Any, x: Tensor, neurons: int) -> Callable[[Tensor], Tensor]:
    """The layer with its so many neurons that do most on rows x."""
    values = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    does = values.square().sum(0) * mlp.down_proj.weight.square().sum(0)
    kept = does.argsort(descending=True)[:neurons]
    known = torch.cat((values[:, kept], torch.ones(len(x), 1)), 1)
    gram = known.t() @ known
    damping = torch.zeros(neurons + 1)
    if neurons:
        damping[:neurons] = RIDGE * gram.diagonal()[:neurons].mean()
    out = torch.linalg.solve((gram + damping.diag()).double(), (known.t() @ mlp.down_proj(values)).double()).float()
    gate, up = mlp.gate_proj.weight[kept], mlp.up_proj.weight[kept]
    return lambda z: (F.silu(F.linear(z, gate)) * F.linear(z, up)) @ out[:-1] + out[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("train")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    model = load(args.gguf).cpu()
    ids = blocks(args.train).batch(np.arange(MEASURED + SEEN) * APART, model.device)["input_ids"]
    measured, rows = Measured(model, ids[:MEASURED]), rows_of(model, ids[MEASURED:])
    found = []
    for k, layer in enumerate(model.model.layers):
        dense, increase = layer.mlp.forward, {}
        for share, neurons in (*NARROW.items(), (0, 0)):
            layer.mlp.forward = narrower(layer.mlp, rows[k], neurons)
            increase[str(share)] = measured.divergence(k)
        layer.mlp.forward = dense
        found.append(increase)
        print(k, increase, flush=True)
        args.out.write_text(json.dumps({"model": args.gguf.name, "layers": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
