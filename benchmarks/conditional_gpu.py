"""Layers behind routers on a GPU beside the compiled dense layer: forward, forward and backward, memory.

python benchmarks/conditional_gpu.py --out benchmarks/results/<gpu> [--seconds 200] [--rows 65536,4096]

Every layer stores 3,072 SwiGLU neurons or less and uses 96 for a row, routing included in its time; the dense layer has
2,048 SwiGLU neurons. bf16, width 768, all compiled with torch.compile and replayed as CUDA graphs, the second-level
cache flushed before every call. Outputs and gradients are checked against float32 before anything is timed.
Microseconds are medians; low and high are the quarters. Cells already in the file are measured anew.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor, nn

from fastff.bench.gpu_device import Cuda
from fastff.io import write_json
from fastff.models.feedforward import build_feedforward, complete
from fastff.timing import quartiles

WIDTH = 768
LAYERS: dict[str, dict[str, Any]] = {
    "dense-swiglu 2048": {"kind": "dense", "intermediate_size": 2048, "activation": "swiglu"},
    "flat-96x32-top3": {"kind": "flat", "leaves": 96, "k": 3, "leaf_width": 32},
    "1x6-leaf48-paths2": {"kind": "paths", "depth": 6, "paths": 2, "leaf_width": 48},
    "1x7-leaf24-paths4": {"kind": "paths", "depth": 7, "paths": 4, "leaf_width": 24},
    "1x8-leaf12-paths8": {"kind": "paths", "depth": 8, "paths": 8, "leaf_width": 12},
    "8x4-leaf16-swiglu-gate": {
        "kind": "fff", "trees": 8, "depth": 4, "leaf_width": 16, "node_output": False, "activation": "swiglu",
        "gate": "boundary",
    },
}  # fmt: skip
DENSE = next(iter(LAYERS))


def make(name: str) -> nn.Module:
    """The layer on the GPU, in bf16, without balancing: every call does the same work."""
    torch.manual_seed(0)
    layer = build_feedforward(complete(LAYERS[name]), WIDTH)
    assert layer is not None
    return layer.to("cuda", torch.bfloat16).eval()


def check(name: str, layer: nn.Module, call: Callable[[Tensor], Tensor]) -> float:
    """Largest error of the output, relative to the largest output, of rows whose route bf16 did not change."""
    x = torch.randn(512, WIDTH, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        got, exact = call(x).float(), layer.float()(x.float())
        layer.to(torch.bfloat16)
    errors = (got - exact).abs().amax(1) / exact.abs().max()
    same = errors < 0.05
    if same.double().mean() < 0.85:
        raise RuntimeError(f"{name}: only {same.double().mean():.0%} of the rows agree with float32")
    return float(errors[same].max())


def measure(device: Cuda, name: str, rows: int, *, training: bool, seconds: float) -> dict[str, Any]:
    """One cell."""
    layer = make(name).requires_grad_(training)
    compiled = torch.compile(layer, dynamic=False)
    error = check(name, layer, compiled)
    x = torch.randn(rows, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=training)
    grad = torch.randn_like(x)
    weights = [p for p in layer.parameters() if p.requires_grad]

    def run() -> object:
        if not training:
            with torch.no_grad():
                return compiled(x)
        return torch.autograd.grad(compiled(x), [x, *weights], grad, allow_unused=True)

    run()
    torch.cuda.synchronize()
    before = device.allocated()
    device.peak()
    kept = compiled(x) if training else None  # what a backward needs is alive now
    activations = device.allocated() - before
    del kept
    times = device.times_us(device.capture(run), seconds, cold=True)
    low, middle, high = quartiles(times)
    return {
        "layer": name, "rows": rows, "training": training, "us": middle, "low_us": low, "high_us": high,
        "activation_bytes": activations if training else None, "largest_error": error,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of conditional.json")
    parser.add_argument("--seconds", type=float, default=200, help="stop after so long")
    parser.add_argument("--rows", default="65536,4096,512", help="rows of a call")
    options = parser.parse_args()
    device, start = Cuda(), time.monotonic()
    cells: list[dict[str, Any]] = []
    for rows in map(int, options.rows.split(",")):
        for training in (False, True):
            for name in LAYERS:
                if time.monotonic() - start > options.seconds:
                    break
                torch.compiler.reset()
                cell = measure(device, name, rows, training=training, seconds=0.2)
                if name == DENSE:
                    dense_us = cell["us"]
                cell["times_dense"] = dense_us / cell["us"]
                cells.append(cell)
                print(f"{name:24} {rows:6} {'train' if training else 'forward':8} {cell['us']:8.1f} us "
                      f"{cell['times_dense']:5.2f}x", flush=True)  # fmt: skip
                device.settle()
    record = {
        "gpu": device.name, "torch": torch.__version__, "triton": triton.__version__, "dtype": "bf16", "width": WIDTH,
        "cells": cells,
    }  # fmt: skip
    write_json(options.out / "conditional.json", record)


if __name__ == "__main__":
    main()
