"""Conditional layers on the CPU beside the fastest dense int8 layer: fp32, bf16 and int8, few rows and many.

python benchmarks/conditional_cpu.py --out benchmarks/results/<machine> [--layer 36x5-leaf4,...] [--rows 1,128]
python benchmarks/conditional_cpu.py --out benchmarks/results/<machine> --training --layer 36x5-leaf4 --rows 4096

Each layer is the C function on packed weights, called through ctypes. The dense layers are SwiGLU of OpenVINO and ONNX
Runtime in int8: one of 2,048 neurons, which is BERT-base's feedforward in size, and one that stores as many weights as
the conditional layer. Every output is checked against float64 before anything is timed. All that is compared takes
turns in one process. A model has several layers, and so do those measured here: a sample goes through them untimed for
20 ms at most, then as many whole times as fill 20 ms. All are sampled until each has had its timed seconds, and at
least five times. Microseconds a row are medians, low and high the quarters. Cells already in the file are replaced,
others stay. With --training: forward and backward of the layer in fp32, to x and all weights, beside the same of
PyTorch for a dense SwiGLU layer that stores as many weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastff
from fastff.bench import onnx_models
from fastff.bench.cpu_providers import ERROR_LIMITS, PROVIDERS, onnxruntime_calls, openvino_calls
from fastff.bench.timed_layers import DenseLayer, expected, make_layer, train_step
from fastff.bench.workloads import DenseConfig
from fastff.conditional import ConditionalFeedforward
from fastff.io import write_json
from fastff.machine import commit, machine
from fastff.models.feedforward import build_feedforward
from fastff.ops.native_router import JoinedLayer
from fastff.timing import quartiles

WIDTH = 768
ALL = ("fp32", "bf16", "int8")
# Name in a model's configuration, precisions, and the SwiGLU neurons of a dense layer that stores as many weights.
LAYERS: dict[str, tuple[str, tuple[str, ...], int]] = {
    "36x5-leaf4": ("36x5-leaf4-swiglu-gate", ALL, 4980),
    "8x4-leaf16": ("8x4-leaf16-swiglu-gate", ("int8",), 2048),
    "96x32-top3": ("flat-96x32-top3", ("int8",), 3104),
    "256x12-paths8": ("1x8-leaf12-paths8", ("int8",), 3104),
    "1x11": ("1x11", ALL, 2730),
}
SMALL = 2048  # neurons of the other dense layer
ENGINES = {"openvino int8": openvino_calls, "onnxruntime int8": onnxruntime_calls}
MODELS = {"openvino int8": onnx_models.static_int8, "onnxruntime int8": onnx_models.dynamic_int8}
VISITED = {1: 16, 8: 16}  # layers in turn, by rows of a call; 12 of others
POOL_ROWS = 4096  # different rows that the calls go through
LEAST_SAMPLES = 5
CHECKED_ROWS = 64  # of a training step's gradient
SAMPLE_SECONDS, REST_SECONDS = 0.02, 0.005  # after a rest, threads of other pools have stopped spinning


@dataclass(frozen=True)
class Cell:
    """One layer in one precision, or one dense layer in one engine. error: relative, of norms, against float64."""

    layer: str
    precision: str
    rows: int
    layers: int
    threads: int
    us: float
    low_us: float
    high_us: float
    error: float

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.layer, self.precision, self.rows, self.threads


class Contestant:
    """Something that is timed: functions of layers that are called in turn, each with other rows."""

    def __init__(self, name: str, precision: str, calls: list[Callable[[Any], Any]], error: float) -> None:
        self.name, self.precision, self.calls, self.error = name, precision, calls, error
        self.pool = "numpy" if precision in ENGINES else "torch"
        self.us: list[float] = []
        self._turn = 0

    def sample(self, pool: list[Any], rows: int) -> float:
        """Adds a sample; returns its timed seconds."""
        start = time.perf_counter()
        for call in self.calls:
            self._call(call, pool)
            if time.perf_counter() - start > SAMPLE_SECONDS:
                break
        start = now = time.perf_counter()
        passes = 0
        while now - start < SAMPLE_SECONDS:
            for call in self.calls:
                self._call(call, pool)
            passes += 1
            now = time.perf_counter()
        self.us.append((now - start) / passes / len(self.calls) / rows * 1e6)
        return now - start

    def _call(self, call: Callable[[Any], Any], pool: list[Any]) -> None:
        self._turn = (self._turn + 7) % len(pool)
        call(pool[self._turn])


def dense_models(neurons: int) -> tuple[DenseLayer, dict[str, bytes]]:
    """A dense layer and its int8 model for each engine."""
    layer = make_layer(DenseConfig(WIDTH, neurons, "swiglu"), 0, seed=0)
    assert isinstance(layer, DenseLayer)
    return layer, {engine: made(layer) for engine, made in MODELS.items()}


def dense_contestants(neurons: int, models: tuple[DenseLayer, dict[str, bytes]], x: Tensor) -> list[Contestant]:
    """The engines' int8 layers on as many copies of the weights as layers are visited in turn."""
    layer, bytes_of = models
    found = []
    for engine, calls_of in ENGINES.items():
        copies = [layer] * VISITED.get(len(x), 12)
        model = bytes_of[engine]
        calls = calls_of(lambda _, model=model: model)(copies, len(x))
        output = PROVIDERS[engine].output(calls[0](PROVIDERS[engine].inputs(x)))
        error = relative_error(output, expected(layer, x).y.detach(), f"dense-{neurons} {engine}", "int8")
        found.append(Contestant(f"dense-{neurons}", engine, calls, error))
    return found


def conditional_contestant(name: str, precision: str, x: Tensor) -> Contestant:
    """The packed layer, as many copies of it as layers are visited in turn."""
    torch.manual_seed(0)
    layer = build_feedforward(LAYERS[name][0], WIDTH)
    assert isinstance(layer, ConditionalFeedforward | fastff.FFF)
    layer = layer.eval().requires_grad_(False)
    quantization = None if precision == "fp32" else precision
    calls: list[Callable[[Any], Any]] = []
    for _ in range(VISITED.get(len(x), 12)):
        if isinstance(layer, fastff.FFF):
            provider = PROVIDERS["fastff C" + ("" if quantization is None else f" {quantization}")]
            calls += provider.make([layer], len(x))
        else:
            router = (layer.router.weight, layer.router.bias, layer.router.balance)
            leaves, activation = (layer.w_in, None, layer.w_out, None), layer.config.activation
            calls.append(
                JoinedLayer(layer.router.config, router, leaves, activation=activation, quantization=quantization)
            )
    with torch.inference_mode():
        got = calls[0](x).clone()
    exact = build_feedforward(LAYERS[name][0], WIDTH)
    assert exact is not None
    exact.load_state_dict(layer.state_dict())
    exact = exact.double().eval().requires_grad_(False)
    exact.backend = "eager" if isinstance(exact, ConditionalFeedforward) else "reference"
    error = relative_error(got, exact(x.double()), name, precision)
    return Contestant(name, precision, calls, error)


def training_contestants(name: str, x: Tensor) -> list[Contestant]:
    """Forward and backward in fp32: the layer in its native kernels, and PyTorch's dense layer of as many weights."""
    torch.manual_seed(0)
    conditional = build_feedforward(LAYERS[name][0], WIDTH)
    assert isinstance(conditional, ConditionalFeedforward | fastff.FFF)
    neurons, few = LAYERS[name][2], x[:CHECKED_ROWS]
    found = []
    for of, layer in (
        (name, conditional),
        (f"dense-{neurons}", make_layer(DenseConfig(WIDTH, neurons, "swiglu"), 0, seed=0)),
    ):
        exact = deepcopy(layer).double()
        if isinstance(exact, ConditionalFeedforward | fastff.FFF):
            exact.backend = "eager" if isinstance(exact, ConditionalFeedforward) else "reference"
        step = train_step(layer, list(layer.parameters()))
        wanted = train_step(exact, list(exact.parameters()))(few.double())
        error = relative_error(step(few), wanted, of, "fp32")
        found.append(Contestant(of, "fp32 training", [step], error))
    return found


def relative_error(got: Tensor, exact: Tensor, name: str, precision: str) -> float:
    error = float((got.double() - exact).norm() / exact.norm())
    if not error <= ERROR_LIMITS[precision]:
        raise RuntimeError(f"{name} in {precision} errs by {error:.1e}, at most {ERROR_LIMITS[precision]} is allowed")
    return error


def measure(
    contestants: list[Contestant], rows: int, threads: int, seconds: float, training: bool = False
) -> list[Cell]:
    """All in turn, until each has had so many timed seconds in at least LEAST_SAMPLES samples."""
    x = torch.randn(max(POOL_ROWS, rows), WIDTH)
    plain = [x[at : at + rows] for at in range(0, len(x), rows)]
    pools = {"torch": plain, "numpy": [part.numpy() for part in plain]}
    left = dict.fromkeys(contestants, seconds)
    with torch.inference_mode(not training):
        for contestant in contestants:  # the first sample finds memory to be had and caches to be filled
            contestant.sample(pools[contestant.pool], rows)
            contestant.us.clear()
        while unfinished := [c for c in contestants if left[c] > 0 or len(c.us) < LEAST_SAMPLES]:
            for contestant in unfinished:
                left[contestant] -= contestant.sample(pools[contestant.pool], rows)
                time.sleep(REST_SECONDS)
    cells = []
    for contestant in contestants:
        low, middle, high = quartiles(contestant.us)
        layers = len(contestant.calls)
        cells.append(
            Cell(contestant.name, contestant.precision, rows, layers, threads, middle, low, high, contestant.error)
        )
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of conditional_cpu.json")
    parser.add_argument("--layer", default=",".join(LAYERS), help="layers to measure")
    parser.add_argument("--rows", default="1,8,32,128,1024", help="rows of a call")
    parser.add_argument("--threads", type=int, default=1, help="of every call")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="timed seconds of a cell, where five samples take no longer"
    )
    parser.add_argument("--training", action="store_true", help="forward and backward in fp32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = options.out / "conditional_cpu.json"
    kept = [Cell(**cell) for cell in json.loads(path.read_text())["cells"]] if path.exists() else []
    names = options.layer.split(",")
    neurons = () if options.training else dict.fromkeys((SMALL, *(LAYERS[name][2] for name in names)))
    models = {n: dense_models(n) for n in neurons}
    for rows in map(int, options.rows.split(",")):
        torch.manual_seed(1)
        x = torch.randn(rows, WIDTH)
        if options.training:
            contestants = [c for name in names for c in training_contestants(name, x)]
        else:
            contestants = [c for neurons, made in models.items() for c in dense_contestants(neurons, made, x)]
            contestants += [conditional_contestant(name, p, x) for name in names for p in LAYERS[name][1]]
        cells = measure(contestants, rows, options.threads, options.seconds, options.training)
        for cell in cells:
            print(f"{cell.layer:14} {cell.precision:17} {rows:5} rows {cell.us:8.2f} us a row "
                  f"({cell.low_us:.2f}-{cell.high_us:.2f}), error {cell.error:.0e}", flush=True)  # fmt: skip
        measured = {cell.key for cell in cells}
        kept = [cell for cell in kept if cell.key not in measured] + cells
        record = {"machine": machine(), "commit": commit(), "width": WIDTH, "cells": [asdict(cell) for cell in kept]}
        write_json(path, record)


if __name__ == "__main__":
    main()
