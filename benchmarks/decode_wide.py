"""A decoder of two layers of GPT-3's width, dense, with one tree of depth 15, and without feedforwards
(`decode.py --wide`). Weights are random: a block of rows, repeated."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import decode

HIDDEN, HEADS, LAYERS, VOCABULARY, POSITIONS = 12288, 96, 2, 1024, 64
TREE = {"kind": "fff", "depth": 15}
CONTEXT, TOKENS, BLOCK = 16, 8, 1024  # tokens before those that are timed, these; random rows


def random_rows(rows: int, features: int) -> Tensor:
    """(rows, features), the same ones after BLOCK, so that making them takes no time."""
    block = torch.randn(min(rows, BLOCK), features, generator=torch.Generator().manual_seed(rows)) * features**-0.5
    return block.repeat(-(-rows // BLOCK), 1)[:rows]


class RandomWeights(Mapping[str, Tensor]):
    """Of a GPT-2 of these sizes, by Transformers' names; each made when it is asked for."""

    def __init__(self) -> None:
        from transformers import GPT2Config

        self.config = GPT2Config(
            vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=POSITIONS
        )
        blocks = {"attn.c_attn": 3 * HIDDEN, "attn.c_proj": HIDDEN, "mlp.c_fc": 4 * HIDDEN, "mlp.c_proj": HIDDEN}
        self._outputs = {f"transformer.h.{i}.{name}.weight": n for i in range(LAYERS) for name, n in blocks.items()}
        norms = [f"transformer.h.{i}.{name}" for i in range(LAYERS) for name in ("ln_1", "ln_2")]
        self._vectors = [f"{name}.weight" for name in (*norms, "transformer.ln_f")]
        self._tables = {"transformer.wte.weight": VOCABULARY, "transformer.wpe.weight": POSITIONS}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._vectors:
            return torch.ones(HIDDEN)
        if name in self._tables:
            return random_rows(self._tables[name], HIDDEN)
        return random_rows(self._outputs[name], 4 * HIDDEN if name.endswith("mlp.c_proj.weight") else HIDDEN).t()

    def __contains__(self, name: object) -> bool:
        return name in self._outputs or name in self._vectors or name in self._tables

    def __iter__(self) -> Any:
        yield from (*self._tables, *self._vectors, *self._outputs)

    def __len__(self) -> int:
        return len(self._tables) + len(self._vectors) + len(self._outputs)


def build(folder: Path) -> None:
    """Write the three models."""
    from fastff.engine import decoders, native_export
    from fastff.layers import FFF

    folder.mkdir(parents=True, exist_ok=True)
    weights = RandomWeights()
    described = {
        "dense": decoders.describe(weights.config, weights),
        "none": decoders.describe(weights.config, weights, [None] * LAYERS),
        "1x15": decoders.describe(weights.config, weights, [FFF(HIDDEN, depth=15, device="meta")] * LAYERS),
    }
    for name, tensor in described["1x15"].tensors.items():
        if name.endswith((".w_in", ".w_out")):  # what is on the meta device has no numbers
            rows, shape = tensor.shape[1], tensor.shape
            made = decoders.StoredTensor(shape, lambda rows=rows, shape=shape: random_rows(rows, HIDDEN).view(shape))
            described["1x15"].tensors[name] = made
    for name, model in described.items():
        native_export.write(model, None, [], folder / name)
        print(f"wrote {folder / name}", flush=True)


def tree_alone(threads: int, rounds: int) -> list[float]:
    """Milliseconds of calls of one such tree in int8 with one row each, every row of another path."""
    from fastff.layers import FFF

    layer = FFF(HIDDEN, depth=TREE["depth"], device="meta")
    for name in ("w_in", "w_out"):
        shape = getattr(layer, name).shape
        setattr(layer, name, torch.nn.Parameter(random_rows(shape[1], HIDDEN).view(shape)))
    layer.eval().quantize("int8")
    torch.set_num_threads(threads)
    samples = []
    with torch.inference_mode():
        layer(torch.randn(1, HIDDEN))  # packs
        for row in torch.randn(rounds * TOKENS, 1, HIDDEN):
            start = time.perf_counter()
            layer(row)
            samples.append((time.perf_counter() - start) * 1000)
    return samples


def measure(folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Milliseconds a token of all models, and how many times faster one tree is than a dense feedforward: a tree takes
    less than what runs of whole models differ by, so it is timed alone, and the dense one is what its model takes more
    than the one without feedforwards, for each layer."""
    from fastff.timing import quartiles

    workers = [decode.Worker(name, folder, threads, "WIDE") for name in decode.WIDE]
    turns = decode.in_turns(workers, rounds, "decode", CONTEXT, TOKENS)
    taken = {name: [ms / TOKENS for ms in samples] for name, samples in turns.items()}
    cells = {name: dict(zip(("q1", "ms", "q3"), quartiles(ms), strict=True)) for name, ms in taken.items()}
    for worker in workers:
        worker.close()
    dense, none, tree = (cells[f"fastff int8, {name}"]["ms"] for name in ("dense", "none", "1x15"))
    alone = dict(zip(("q1", "ms", "q3"), quartiles(tree_alone(threads, rounds)), strict=True))
    result = {
        "hidden": HIDDEN,
        "layers": LAYERS,
        "threads": threads,
        "cells": cells,
        "dense_feedforward_ms": (dense - none) / LAYERS,
        "tree_alone": alone,
        "feedforward_times_faster": (dense - none) / LAYERS / alone["ms"],
        "whole_model_times_faster": dense / tree,
    }
    print(result, flush=True)
    return result
