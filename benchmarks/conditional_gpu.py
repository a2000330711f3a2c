"""Layers behind routers on a GPU beside the compiled dense layer: forward, forward and backward, memory.

python benchmarks/conditional_gpu.py --out benchmarks/results/<gpu> [--seconds 200] [--rows 65536,4096]
python benchmarks/conditional_gpu.py --compare --out <folder>    every form of the kernels beside the others

Every layer stores 3,072 SwiGLU neurons or less and uses 96 for a row, routing included in its time; the dense layer has
2,048 SwiGLU neurons. bf16, width 768, all compiled with torch.compile (with --compare the dense layer alone, which
gains from it) and replayed as CUDA graphs, in turn, the second-level cache flushed before every call. Outputs, routes
and gradients of 512 of the rows are checked against float64 before anything is timed. Microseconds are medians; low
and high are the quarters.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor, nn

from fastff.bench.gpu_device import Cuda
from fastff.conditional import ConditionalFeedforward
from fastff.io import write_json
from fastff.models.feedforward import build_feedforward, complete
from fastff.ops import choose_ops
from fastff.ops.triton_kernels import conditional_plan, conditional_products, router_kernels
from fastff.timing import quartiles

WIDTH, CHECKED = 768, 512
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
COMPARED = ("flat-96x32-top3", "1x6-leaf48-paths2", "1x8-leaf12-paths8")
ALLOWED = 0.04  # error of a tensor, relative to its largest element
ROUTED = 0.998  # of the rows take the leaves of float64, where scores are not rounded
ROUNDS = 4  # of all providers in turn

Tile = Callable[[int, int, bool], tuple[int, int]]


@dataclass(frozen=True)
class Variant:
    """How kernels are chosen. form, columns, height: of conditional products, None: as it comes; fused: whether one
    kernel routes; tile: rows and warps of that kernel."""

    form: conditional_products.Form | None = None
    columns: int | None = None
    height: int | None = None
    fused: bool = True
    tile: tuple[int, int] | None = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While kernels are chosen and recorded."""
        plan_before, tile_before = conditional_products.plan, router_kernels.tile

        def plan(rows: int, slots: int, leaves: int, width: int, features: int) -> conditional_plan.Plan:
            chosen = plan_before(rows, slots, leaves, width, features, self.form or "slots")
            height = self.height or chosen.tiles.rows
            tiles = replace(chosen.tiles, rows=height, columns=self.columns or chosen.tiles.columns,
                            inner=128 if height < 64 else 64, warps=8 if height > 64 else 4)  # fmt: skip
            if chosen.form != "slots":
                return replace(chosen, tiles=tiles)
            if self.height is None:
                return chosen
            high = {"rows": height, "warps": 8 if height > 64 else 4}
            return replace(chosen, tiles=replace(chosen.tiles, **high), spread=replace(chosen.spread, **high))

        with (
            mock.patch.object(conditional_products, "plan", plan),
            mock.patch.object(router_kernels, "tile", lambda *sizes: self.tile or tile_before(*sizes)),
            mock.patch.object(choose_ops, "can_route", choose_ops.can_route if self.fused else lambda *_: False),
        ):
            yield


DEFAULT = {"default": Variant()}
FORMS = {
    512: {"scan": Variant("scan"), "scan 16": Variant("scan", columns=16), "scan high": Variant("scan", height=64),
          "pairs": Variant("pairs"), "slots": Variant("slots"), "before": Variant("slots", fused=False)},
    4096: {"pairs": Variant("pairs"), "pairs 32": Variant("pairs", height=32), "slots": Variant("slots"),
           "before": Variant("slots", fused=False)},
    65536: {"slots": Variant("slots"), "slots 128": Variant("slots", height=128), "pairs": Variant("pairs"), "pairs 128": Variant("pairs", height=128),
            "before": Variant("slots", fused=False)},
}  # fmt: skip
TILES = {"32 rows, 4 warps": (32, 4), "64 rows, 4 warps": (64, 4), "64 rows, 8 warps": (64, 8),
         "128 rows, 8 warps": (128, 8)}  # fmt: skip


def make(name: str) -> nn.Module:
    """The layer on the GPU, in bf16, without balancing: every call does the same work."""
    torch.manual_seed(0)
    layer = build_feedforward(complete(LAYERS[name]), WIDTH)
    assert layer is not None
    return layer.to("cuda", torch.bfloat16).eval()


def gradients(layer: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """y, and the gradients of x and of every weight."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], grad.to(y.dtype))]


def check(name: str, variant: Variant, rows: int) -> dict[str, float]:
    """Largest relative errors of y and the gradients of a layer against float64, over some of the rows.

    Raises RuntimeError where one is too large, or too many rows take other leaves."""
    layer = make(name)
    exact = copy.deepcopy(layer).double()
    x, grad = torch.randn(rows, WIDTH, device="cuda").bfloat16(), torch.zeros(rows, WIDTH, device="cuda")
    seen = torch.randperm(rows, device="cuda")[:CHECKED].sort().values
    with variant.applied():
        if name != DENSE:
            exact.backend = "reference"  # type: ignore[assignment]
            same = (layer.route(x)[seen] == exact.route(x[seen].double())).all(1)  # type: ignore[operator]
            share = float(same.double().mean())
            if variant.fused and isinstance(layer, ConditionalFeedforward) and share < ROUTED:
                raise RuntimeError(f"{name}: {share:.2%} of the rows take the leaves of float64")
            seen = seen[same]
        grad[seen] = torch.randn(len(seen), WIDTH, device="cuda").bfloat16().float()
        got = gradients(layer, x, grad)
    want = gradients(exact, x[seen].double(), grad[seen].double())
    elsewhere = torch.ones(rows, dtype=torch.bool, device="cuda").index_fill_(0, seen, False)
    if got[1][elsewhere].count_nonzero():
        raise RuntimeError(f"{name}: rows without a gradient of y have one of x")
    got[:2] = [tensor[seen] for tensor in got[:2]]
    names = ["y", "x", *(label for label, _ in layer.named_parameters())]
    errors = {
        label: float((one.double() - other).abs().max() / other.abs().max())
        for label, one, other in zip(names, got, want, strict=True)
    }
    if not max(errors.values()) <= ALLOWED:
        raise RuntimeError(f"{name}, {rows} rows, {variant}: relative errors {errors}, expected {ALLOWED} at most")
    return errors


@dataclass
class Cell:
    """A layer ready to be timed, and what is known of it. A graph reads the tensors that it was captured with, and does
    not hold them: `run` does."""

    replay: Callable[[], object]
    run: Callable[[], object]
    facts: dict[str, Any]
    times: list[float]


def prepare(
    device: Cuda, name: str, label: str, variant: Variant, rows: int, *, training: bool, compiled: bool
) -> Cell:
    """Checked, compiled, captured; the memory that a backward needs is measured."""
    errors = check(name, variant, rows)
    layer = make(name).requires_grad_(training)
    torch.compiler.reset()
    call = torch.compile(layer, dynamic=False) if compiled else layer
    x = torch.randn(rows, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=training)
    grad = torch.randn_like(x)
    weights = [p for p in layer.parameters() if p.requires_grad]

    def run() -> object:
        if not training:
            with torch.no_grad():
                return call(x)
        return torch.autograd.grad(call(x), [x, *weights], grad, allow_unused=True)

    with variant.applied():
        run()
        torch.cuda.synchronize()
        before = device.allocated()
        kept = call(x) if training else None  # what a backward needs is alive now
        activations = device.allocated() - before
        del kept
        replay = device.capture(run)
    facts = {
        "layer": name, "variant": label, "rows": rows, "training": training, "compiled": compiled,
        "activation_bytes": activations if training else None, "errors": errors,
    }  # fmt: skip
    return Cell(replay, run, facts, [])


def variants(name: str, rows: int, compare: bool) -> dict[str, Variant]:
    """What to time of a layer; where forms are compared, fewer layers."""
    if not compare or name not in COMPARED:
        return {} if compare and name != DENSE else DEFAULT
    return {label: variant for label, variant in FORMS[rows].items() if variant.fused or name == COMPARED[0]}


def measure(device: Cuda, rows: int, *, training: bool, compare: bool, seconds: float) -> list[dict[str, Any]]:
    """All layers of a number of rows, timed in turn."""
    cells = []
    for name in LAYERS:
        for label, variant in variants(name, rows, compare).items():
            compiled = not compare or name == DENSE
            cells.append(prepare(device, name, label, variant, rows, training=training, compiled=compiled))
    for _ in range(ROUNDS):
        for cell in cells:
            cell.times += device.times_us(cell.replay, seconds / ROUNDS, cold=True)
    dense_us = statistics.median(cells[0].times)
    found = []
    for cell in cells:
        low, middle, high = quartiles(cell.times)
        found.append({**cell.facts, "us": middle, "low_us": low, "high_us": high, "times_dense": dense_us / middle})
        name, label, error = cell.facts["layer"], cell.facts["variant"], max(cell.facts["errors"].values())
        print(f"{name:24} {label:10} {rows:6} {'train' if training else 'forward':8} {middle:8.1f} us "
              f"{dense_us / middle:5.2f}x  error {error:.1e}", flush=True)  # fmt: skip
    return found


def measure_routers(device: Cuda, rows: int, seconds: float) -> list[dict[str, Any]]:
    """Routing alone, for inference, by tiles of the kernel, and as it was before there was one."""
    variants = {label: Variant(tile=tile) for label, tile in TILES.items()} | {"before": Variant(fused=False)}
    found = []
    x = torch.randn(rows, WIDTH, device="cuda", dtype=torch.bfloat16)
    for name in COMPARED:
        layer = make(name)
        for label, variant in variants.items():
            call: Any = layer.router
            with variant.applied(), torch.no_grad():
                replay = device.capture(functools.partial(call, x))
            us = statistics.median(device.times_us(replay, seconds, cold=True))
            found.append({"router": name, "variant": label, "rows": rows, "us": us})
            print(f"router {name:24} {label:18} {rows:6} {us:8.1f} us", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of conditional.json, or with --compare of compare.json"
    )
    parser.add_argument("--seconds", type=float, default=200, help="begin nothing after so long")
    parser.add_argument("--rows", default="65536,4096,512", help="rows of a call")
    parser.add_argument("--compare", action="store_true", help="every form of the kernels")
    options = parser.parse_args()
    device, start = Cuda(), time.monotonic()
    cells: list[dict[str, Any]] = []
    routers: list[dict[str, Any]] = []
    for rows in map(int, options.rows.split(",")):
        if options.compare:
            routers += measure_routers(device, rows, 0.05)
        for training in (False, True):
            if time.monotonic() - start < options.seconds:
                cells += measure(device, rows, training=training, compare=options.compare, seconds=0.2)
                device.settle()
    record = {
        "gpu": device.name, "torch": torch.__version__, "triton": triton.__version__, "dtype": "bf16", "width": WIDTH,
        "cells": cells, "routers": routers,
    }  # fmt: skip
    write_json(options.out / f"{'compare' if options.compare else 'conditional'}.json", record)


if __name__ == "__main__":
    main()
