"""The harness: check, then time interleaved, then report medians with their spread and ratios within one run."""

from __future__ import annotations

import csv
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastff
from fastff.bench import providers
from fastff.bench.cases import Case
from fastff.bench.providers import Call, DenseWeights
from fastff.ops import native, reference

CACHE_BYTES = 64 * 2**20  # inputs rotate over more than a core's private caches hold
MAX_INPUTS = 512
ROUND_SECONDS = 0.15  # a provider's share of one round


@dataclass(frozen=True)
class Timing:
    """One provider on one case. Latencies are microseconds a row and layer; errors are against float64."""

    case: str
    provider: str
    kind: str  # dense or conditional
    rows: int
    layers: int
    threads: int
    training: bool
    latency_us_p20: float
    latency_us_p50: float
    latency_us_p80: float
    max_abs_error: float
    samples: int


def machine() -> dict[str, Any]:
    """The machine, instruction set and versions that a result belongs to."""
    names = ("torch", "onnxruntime", "openvino")
    versions = {name: metadata.version(name) for name in names if providers.missing(name) is None}
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": native.isa(),
        "python": platform.python_version(),
        "fastff": fastff.__version__,
        **versions,
    }


def cpu_name() -> str:
    """Model name of the processor with its widest vector extensions, as the system reports them."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
    known = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(known.get("flags", "").split())
    wide = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if flag in flags]
    return f"{known.get('model name', platform.machine())} ({', '.join(wide) or 'no vector extensions'})"


def run_cases(
    cases: Iterable[Case],
    *,
    seconds: float = 8.0,
    seed: int = 0,
    skip: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[list[Timing], dict[str, str]]:
    """Measure every provider that can run. seconds: wall time of one case's timed part.

    Returns the timings and, by provider, why some were left out. Raises RuntimeError if an output is wrong."""
    timings: list[Timing] = []
    left_out = {name: why for name in providers.DENSE if (why := providers.missing(name))}
    left_out |= dict.fromkeys(skip, "skipped on request")
    threads_before = torch.get_num_threads()
    try:
        for case in cases:
            progress(case.name)
            torch.set_num_threads(case.threads)
            timings += _run_case(case, seconds, seed, left_out)
    finally:
        torch.set_num_threads(threads_before)
    return timings, left_out


def _run_case(case: Case, seconds: float, seed: int, left_out: Mapping[str, str]) -> list[Timing]:
    torch.manual_seed(seed)
    width, neurons = case.config.in_features, case.dense_neurons
    weights = [
        (torch.randn(neurons, width) / width**0.5, torch.randn(width, neurons) / neurons**0.5)
        for _ in range(case.layers)
    ]
    layers = [_layer(case) for _ in range(case.layers)]
    count = max(2, min(MAX_INPUTS, CACHE_BYTES // (case.rows * width * 4)))
    inputs = [torch.randn(case.rows, width) for _ in range(count)]
    with torch.set_grad_enabled(case.training):
        calls = _build(case, weights, layers, left_out)
        errors = {name: _check(name, call, case, weights, layers, inputs[0]) for name, call in calls.items()}
        samples = _interleave(calls, case, inputs, seconds)
    return [_timing(case, name, samples[name], errors[name]) for name in calls]


def _layer(case: Case) -> fastff.FFF:
    c = case.config
    options = {
        name: getattr(c, name)
        for name in ("depth", "trees", "leaf_width", "node_output", "activation", "gate", "tau", "bias")
    }
    return fastff.FFF(c.in_features, c.out_features, **options).train(case.training)


def _build(
    case: Case, weights: DenseWeights, layers: Sequence[fastff.FFF], left_out: Mapping[str, str]
) -> dict[str, Call]:
    if case.training:
        return {name: make(weights, layers) for name, make in providers.TRAIN.items() if name not in left_out}
    dense = {name: make(weights) for name, make in providers.DENSE.items() if name not in left_out}
    conditional = {
        name: make(layers)
        for name, make in providers.CONDITIONAL.items()
        if name not in left_out and providers.applies(name, case.config)
    }
    return {**dense, **conditional}


def _check(name: str, call: Call, case: Case, weights: DenseWeights, layers: Sequence[fastff.FFF], x: Tensor) -> float:
    """Largest error against float64 over rows whose path float32 decides safely. Raises RuntimeError above 1e-3."""
    x = x[:64]
    got = call(0, x).detach()
    exact_x = x.double().requires_grad_(case.training)
    if name in providers.DENSE:
        want = providers.dense(exact_x, *(w.double() for w in weights[0]))
        clear = torch.ones(x.shape[0], dtype=torch.bool)
    else:
        exact = [None if w is None else w.double() for w in layers[0]._weights()]
        routed = reference.forward(exact_x, *exact, config=case.config)  # type: ignore[arg-type]
        want, clear = routed.y, routed.margin > 1e-4
    if case.training:
        (want,) = torch.autograd.grad(want.sum(), exact_x)
    error = float((got.double() - want)[clear].abs().max()) if case.rows else 0.0
    if not error < 1e-3:
        raise RuntimeError(f"{name} is wrong on {case.name}: error {error} against float64, expected below 1e-3")
    return error


def _interleave(
    calls: Mapping[str, Call], case: Case, inputs: Sequence[Tensor], seconds: float
) -> dict[str, list[float]]:
    """Rounds over all providers, so that a slow second of the machine hits each; microseconds a row and layer."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    position, layers = 0, range(case.layers)
    calls_a_sample = 16 if case.rows == case.layers == 1 else 1  # a clock reading costs as much as a few microseconds
    batches = [inputs[i : i + calls_a_sample] for i in range(0, len(inputs) - calls_a_sample + 1, calls_a_sample)]
    for call in calls.values():  # warm up: compile, pack, fill caches
        for layer in layers:
            call(layer, inputs[0])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, samples.values())) < 3:
        for name, call in calls.items():
            stop = time.perf_counter() + ROUND_SECONDS
            while True:
                start = time.perf_counter()
                for x in batches[position % len(batches)]:
                    for layer in layers:
                        call(layer, x)
                now = time.perf_counter()
                position += 1
                samples[name].append((now - start) * 1e6 / (case.rows * case.layers * calls_a_sample))
                if now > stop:
                    break
    return samples


def _timing(case: Case, name: str, latencies_us: Sequence[float], error: float) -> Timing:
    p20, *_, p80 = statistics.quantiles(latencies_us, n=5)
    return Timing(
        case=case.name,
        provider=name,
        kind="dense" if name in providers.DENSE else "conditional",
        rows=case.rows,
        layers=case.layers,
        threads=case.threads,
        training=case.training,
        latency_us_p20=p20,
        latency_us_p50=statistics.median(latencies_us),
        latency_us_p80=p80,
        max_abs_error=error,
        samples=len(latencies_us),
    )


def fastest_dense(timings: Sequence[Timing], case: str) -> Timing:
    """The dense provider with the lowest median on a case."""
    return min((t for t in timings if t.case == case and t.kind == "dense"), key=lambda t: t.latency_us_p50)


def ratios(timings: Sequence[Timing]) -> dict[str, float]:
    """By case, how many times fastff is faster than the fastest dense provider of the same run."""
    ours = {t.case: t for t in timings if t.provider == "fastff"}
    return {case: fastest_dense(timings, case).latency_us_p50 / t.latency_us_p50 for case, t in ours.items()}


def save(directory: Path, timings: Sequence[Timing], left_out: Mapping[str, str]) -> tuple[Path, Path]:
    """Write layer-cpu.csv and layer-cpu.json into a directory; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    table, record = directory / "layer-cpu.csv", directory / "layer-cpu.json"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(Timing.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(t) for t in timings)
    document = {
        "machine": machine(),
        "left_out": dict(left_out),
        "ratio_to_fastest_dense": ratios(timings),
        "timings": [asdict(t) for t in timings],
    }
    record.write_text(json.dumps(document, indent=2) + "\n")
    return table, record
