"""Layers behind routers on a GPU beside the compiled dense layer: forward, forward and backward, memory.

python benchmarks/conditional_gpu.py --out benchmarks/results/<gpu> [--only 65536:forward]

With --only, what the file holds of other rows and directions stays, if it is of the same GPU and versions.

At width 768 every layer stores 3,072 SwiGLU neurons or less and uses 96 for a row, routing included in its time; the
dense layer has 2,048 SwiGLU neurons. bf16, all compiled with torch.compile and replayed as CUDA graphs, in turn, the
second-level cache flushed before every call. Outputs, routes and gradients of 512 of the rows are checked against
float64 before anything is timed. Microseconds are medians; low and high are the quarters. Every number of rows and
direction has a process of its own: all check and compile at once, and then they time one after another.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor, nn

from fastff.bench.gpu_device import Cuda
from fastff.bench.result_cells import kept_cells
from fastff.conditional import ConditionalFeedforward
from fastff.io import read_json, write_json
from fastff.models.feedforward import build_feedforward, complete
from fastff.ops.choose_ops import MOST_CHOSEN
from fastff.timing import quartiles

CHECKED = 512  # rows
ALLOWED = 0.04  # error of a tensor, relative to its largest element
ROUTED = 0.998  # of the rows take the leaves of float64, where one kernel routes and rounds no scores
ROUTED_ROUNDED = 0.95  # and where scores are rounded to bf16
SECONDS = 0.2  # of a layer's timing
ROUNDS = 4  # of all layers in turn
PATIENCE = 150  # seconds that a process waits for the others to be ready

Layers = dict[str, dict[str, Any]]
_TREE = {"kind": "fff", "node_output": False, "activation": "swiglu", "gate": "boundary"}
LAYERS: Layers = {
    "dense-swiglu 2048": {"kind": "dense", "intermediate_size": 2048, "activation": "swiglu"},
    "flat-96x32-top3": {"kind": "flat", "leaves": 96, "k": 3, "leaf_width": 32},
    "1x6-leaf48-paths2": {"kind": "paths", "depth": 6, "paths": 2, "leaf_width": 48},
    "1x7-leaf24-paths4": {"kind": "paths", "depth": 7, "paths": 4, "leaf_width": 24},
    "1x8-leaf12-paths8": {"kind": "paths", "depth": 8, "paths": 8, "leaf_width": 12},
    "8x4-leaf16-swiglu-gate": {**_TREE, "trees": 8, "depth": 4, "leaf_width": 16},
}
NARROW: Layers = {
    "dense-swiglu 1365": {"kind": "dense", "intermediate_size": 1365, "activation": "swiglu"},
    "24x5-leaf4-swiglu-gate": {**_TREE, "trees": 24, "depth": 5, "leaf_width": 4},
}
STUDIES = {65536: (768, LAYERS), 4096: (768, LAYERS), 512: (768, LAYERS), 32768: (512, NARROW)}  # by rows
WAYS = ("forward", "backward")


def make(description: dict[str, Any], width: int) -> nn.Module:
    """The layer on the GPU, in bf16, without balancing: every call does the same work."""
    torch.manual_seed(0)
    layer = build_feedforward(complete(description), width)
    assert layer is not None
    return layer.to("cuda", torch.bfloat16).eval()


def gradients(layer: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """y, and the gradients of x and of every weight."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], grad.to(y.dtype))]


def check(name: str, layer: nn.Module, rows: int, width: int) -> dict[str, float]:
    """Largest relative errors of y and the gradients of a layer against float64, over some of the rows.

    Raises RuntimeError where one is too large, or too many rows take other leaves."""
    exact = copy.deepcopy(layer).double()
    x, grad = torch.randn(rows, width, device="cuda").bfloat16(), torch.zeros(rows, width, device="cuda")
    seen = torch.randperm(rows, device="cuda")[:CHECKED].sort().values
    if hasattr(layer, "route"):
        exact.backend = "reference"  # type: ignore[assignment]
        same = (layer.route(x)[seen] == exact.route(x[seen].double())).all(1)  # type: ignore[operator]
        share = float(same.double().mean())
        if isinstance(layer, ConditionalFeedforward):
            one_kernel = layer.config.chosen <= MOST_CHOSEN
            if share < (ROUTED if one_kernel else ROUTED_ROUNDED):
                raise RuntimeError(f"{name}: {share:.2%} of the rows take the leaves of float64")
        seen = seen[same]
    grad[seen] = torch.randn(len(seen), width, device="cuda").bfloat16().float()
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
        raise RuntimeError(f"{name}, {rows} rows: relative errors {errors}, expected {ALLOWED} at most")
    return errors


@dataclass
class Cell:
    """A layer ready to be timed, and what is known of it. A graph reads the tensors that it was captured with, and does
    not hold them: `run` does."""

    replay: Callable[[], object]
    run: Callable[[], object]
    facts: dict[str, Any]
    times: list[float]


def prepare(device: Cuda, name: str, description: dict[str, Any], rows: int, width: int, *, training: bool) -> Cell:
    """Checked, compiled, captured; the memory that a backward needs is measured."""
    errors = check(name, make(description, width), rows, width)
    layer = make(description, width).requires_grad_(training)
    torch.compiler.reset()
    call = torch.compile(layer, dynamic=False, fullgraph=True)
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=training)
    grad = torch.randn_like(x)
    weights = [p for p in layer.parameters() if p.requires_grad]

    def run() -> object:
        if not training:
            with torch.no_grad():
                return call(x)
        return torch.autograd.grad(call(x), [x, *weights], grad, allow_unused=True)

    run()
    torch.cuda.synchronize()
    before = device.allocated()
    kept = call(x) if training else None  # what a backward needs is alive now
    activations = device.allocated() - before
    del kept
    facts = {
        "layer": name, "rows": rows, "width": width, "training": training,
        "activation_bytes": activations if training else None, "errors": errors,
    }  # fmt: skip
    return Cell(device.capture(run), run, facts, [])


def measure(device: Cuda, rows: int, *, training: bool, turn: Path) -> list[dict[str, Any]]:
    """All layers of a number of rows, timed in turn."""
    width, layers = STUDIES[rows]
    cells = [prepare(device, name, layers[name], rows, width, training=training) for name in layers]
    with alone(turn):
        for _ in range(ROUNDS):
            for cell in cells:
                cell.times += device.times_us(cell.replay, SECONDS / ROUNDS, cold=True)
    dense_us = statistics.median(cells[0].times)
    found = []
    for cell in cells:
        low, middle, high = quartiles(cell.times)
        found.append({**cell.facts, "us": middle, "low_us": low, "high_us": high, "times_dense": dense_us / middle})
        print(f"{cell.facts['layer']:24} {rows:6} {WAYS[training]:8} {middle:8.1f} us {dense_us / middle:5.2f}x  "
              f"error {max(cell.facts['errors'].values()):.1e}", flush=True)  # fmt: skip
    return found


@contextmanager
def alone(turn: Path) -> Iterator[None]:
    """Once all processes are ready (the folder holds a file named after each, and their number), one at a time."""
    torch.cuda.synchronize()
    (turn / f"ready-{time.monotonic_ns()}").touch()
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and len(list(turn.glob("ready-*"))) < int((turn / "expected").read_text()):
        time.sleep(0.05)
    with (turn / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def one_process(only: str, out: Path, turn: Path) -> None:
    rows, way = only.split(":")
    cells = measure(Cuda(), int(rows), training=way == WAYS[1], turn=turn)
    write_json(out, {"cells": cells})


def all_processes(asked: list[str], turn: Path) -> list[dict[str, Any]]:
    """Cells of all that is asked for; raises RuntimeError where a process failed, when all have ended."""
    (turn / "expected").write_text(str(len(asked)))
    running = [
        subprocess.Popen([sys.executable, __file__, "--only", only, "--turn", str(turn), "--out", str(turn)])
        for only in asked
    ]
    waiting = dict(zip(asked, running, strict=True))
    while waiting:
        for only in [only for only, process in waiting.items() if process.poll() is not None]:
            del waiting[only]
            (turn / f"ready-{only}").touch()  # nobody waits for one that failed
        time.sleep(0.1)
    failed = [only for only, process in zip(asked, running, strict=True) if process.returncode]
    if failed:
        raise RuntimeError(f"{', '.join(failed)} failed")
    return [cell for only in asked for cell in read_json(turn / f"{only}.json", needs={"cells": list})["cells"]]


def check_machine(path: Path, machine: dict[str, str]) -> None:
    """Raises RuntimeError where the file's record, if there is one, is of another machine."""
    before = read_json(path, needs={"cells": list}) if path.is_file() else machine
    if any(before[name] != value for name, value in machine.items()):
        raise RuntimeError(f"the record is of {[before[name] for name in machine]}, not of {list(machine.values())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of conditional.json")
    parser.add_argument("--only", action="append", help="ROWS:forward or ROWS:backward; may be repeated")
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)  # folder where processes wait for one another
    options = parser.parse_args()
    if options.turn is not None:
        [only] = options.only
        return one_process(only, options.out / f"{only}.json", options.turn)
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    path = options.out / "conditional.json"
    if options.only:
        check_machine(path, machine)
    asked = options.only or [f"{rows}:{way}" for rows in STUDIES for way in WAYS]
    with tempfile.TemporaryDirectory() as turn:
        cells = all_processes(asked, Path(turn))
    others = kept_cells(path, cells, ("rows", "training")) if options.only else []
    write_json(path, {**machine, "dtype": "bf16", "cells": [*others, *cells]})
    return None


if __name__ == "__main__":
    main()
