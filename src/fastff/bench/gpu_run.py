"""The GPU run: cells by importance until the time is over, each written as soon as it is measured."""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastff.bench.gpu_cases import Cell, StepCell
from fastff.bench.gpu_check import Errors, check
from fastff.bench.gpu_device import Cuda, Device, Run
from fastff.bench.gpu_model import Sizes, training_step
from fastff.bench.gpu_providers import chain, layers_of, rows_of
from fastff.bench.workers import FAILED, Refused
from fastff.bench.workloads import label, weights_of
from fastff.io import append_json_line, read_json_lines, reading, restored, write_text
from fastff.machine import commit, machine
from fastff.ops.cost import visited_weights
from fastff.ops.weights import Weights
from fastff.report.progress import Progress, silent
from fastff.timing import quartiles

LINES = "layer-gpu.jsonl"
COMPILE_SHARE = 0.4  # of the time, that other processes may take to compile ahead


@dataclass(frozen=True)
class Timing:
    """One provider on one case. Latencies are microseconds of a layer: quartiles. tflops counts the work that the layer
    needs; gb_per_s the weights that its rows visit and the rows in and out, copy_fraction that of the measured speed of
    a copy, both of a forward alone. held_bytes: what a forward keeps for its backward, output included; peak_bytes: the
    most in use beyond the weights. Errors as in check.Errors."""

    key: str
    layer: str
    features: int
    dense: str
    provider: str
    kind: str  # dense or conditional
    rows: int
    dtype: str
    training: bool
    layers: int
    cold: bool
    latency_us_p25: float
    latency_us_p50: float
    latency_us_p75: float
    samples: int
    tflops: float
    gb_per_s: float | None
    copy_fraction: float | None
    relative_error: float | None
    gradient_error: float | None
    changed_leaves: float | None
    held_bytes: int | None
    peak_bytes: int | None


@dataclass(frozen=True)
class Step:
    """A training step of a whole model: milliseconds, quartiles, and the most memory in use."""

    key: str
    name: str
    step_ms_p25: float
    step_ms_p50: float
    step_ms_p75: float
    peak_bytes: int


@dataclass(frozen=True)
class Settings:
    """seconds: of the whole run, or None; cell_seconds: timed seconds of a cell; jobs: processes that compile ahead;
    tune: search block sizes for the conditional cells first; only: cells whose key contains all of these."""

    seconds: float | None = None
    cell_seconds: float = 0.15
    jobs: int = 1
    tune: bool = False
    only: tuple[str, ...] = ()
    seed: int = 0
    sizes: Sizes = field(default_factory=Sizes)


@dataclass
class Record:
    """about: device, versions, copy bandwidth. left_out: by key, why; not_reached: keys that there was no time for."""

    about: dict[str, Any]
    timings: list[Timing] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    not_reached: list[str] = field(default_factory=list)


def run_gpu(
    cells: Sequence[Cell | StepCell], settings: Settings, device: Device, out: Path, progress: Progress = silent
) -> Record:
    """Measure cells in their order. A run on the same device and versions goes on from what `out` holds."""
    end = None if settings.seconds is None else time.monotonic() + settings.seconds
    record = _resume(device, out, settings)
    done = {*(timing.key for timing in record.timings), *(step.key for step in record.steps)}
    todo = [cell for cell in cells if cell.key not in done and all(part in cell.key for part in settings.only)]
    if settings.jobs > 1:
        progress("bench", 0, len(todo), f"compiling ahead in {settings.jobs} processes")
        _compile_ahead([cell for cell in todo if isinstance(cell, Cell)], settings)
    checked: dict[Any, Errors] = {}
    for index, cell in enumerate(todo):
        if end is not None and time.monotonic() > end:
            record.not_reached = [left.key for left in todo[index:]]
            break
        progress("bench", index, len(todo), cell.key)
        try:
            found: Timing | Step = _measure(cell, settings, device, record, checked)
        except Refused as error:
            record.left_out[cell.key] = str(error)
        except Exception as error:  # of one provider; what it leaves out is told, and the others go on
            record.left_out[cell.key] = f"{FAILED} {type(error).__name__}: {str(error)[:300]}"
        else:
            if isinstance(found, Step):
                record.steps.append(found)
            else:
                record.timings.append(found)
            append_json_line(out / LINES, asdict(found))
        device.settle()
    return record


def _measure(
    cell: Cell | StepCell, settings: Settings, device: Device, record: Record, checked: dict[Any, Errors]
) -> Timing | Step:
    if isinstance(cell, StepCell):
        run = training_step(cell.feedforward, settings.sizes, device, settings.seed)
        run = device.capture(run) if cell.graph else run
        run()
        device.peak()
        p25, p50, p75 = (t / 1e3 for t in quartiles(device.times_us(run, 4 * settings.cell_seconds, cold=False)))
        return Step(cell.key, cell.name, p25, p50, p75, device.peak())
    if settings.tune and cell.provider.startswith("fastff"):
        _tune(cell, settings, device)
    if "compiled" in cell.provider:
        torch._dynamo.reset()  # every shape is compiled for itself, and torch stops compiling after a few
    # A captured graph computes what it captured: one check serves both.
    checking = replace(
        cell, provider="fastff eager" if "fastff" in cell.provider else cell.provider.removesuffix(" graph")
    )
    key = checking.provider, replace(cell.case, layers=1)
    if key not in checked:
        checked[key] = check(checking, device, settings.seed)
    run, forward = chain(cell, device, settings.seed)
    held, peak = _memory(forward, run, device) if cell.case.training and cell.case.layers == 1 else (None, None)
    timed = device.capture(run) if cell.provider.endswith("graph") else run
    latencies = [t / cell.case.layers for t in device.times_us(timed, settings.cell_seconds, cold=cell.cold)]
    return _timing(cell, latencies, checked[key], record.about["copy_bytes_per_s"], held, peak)


def _memory(forward: Run, run: Run, device: Device) -> tuple[int, int]:
    run()  # compiles, and allocates what stays
    device.settle()
    before = device.allocated()
    y = forward()
    held = device.allocated() - before
    del y
    device.peak()
    run()
    return held, device.peak() - before


def _timing(
    cell: Cell, latencies: Sequence[float], errors: Errors, copy_bytes_per_s: float, held: int | None, peak: int | None
) -> Timing:
    case, (p25, p50, p75) = cell.case, quartiles(latencies)
    tree, subject = case.pair.tree, cell.subject
    dense = cell.provider.startswith("dense")
    flops = case.rows * subject.flops_per_row * (3 if case.training else 1)
    weights = weights_of(subject) if dense else visited_weights(tree, case.rows)
    itemsize = 2 if case.dtype == "bf16" else 4
    moved = itemsize * (weights + case.rows * (tree.in_features + tree.out_features))
    speed = None if case.training else moved / p50 / 1e3
    return Timing(
        key=cell.key,
        layer=label(tree),
        features=tree.in_features,
        dense=label(case.pair.dense),
        provider=cell.provider,
        kind="dense" if dense else "conditional",
        rows=case.rows,
        dtype=case.dtype,
        training=case.training,
        layers=case.layers,
        cold=cell.cold,
        latency_us_p25=p25,
        latency_us_p50=p50,
        latency_us_p75=p75,
        samples=len(latencies),
        tflops=flops / p50 / 1e6,
        gb_per_s=speed,
        copy_fraction=None if speed is None else speed * 1e9 / copy_bytes_per_s,
        **asdict(errors),
        held_bytes=held,
        peak_bytes=peak,
    )


_tuned: set[Any] = set()


def _tune(cell: Cell, settings: Settings, device: Device) -> None:
    """Keep faster block sizes for this case, if there are any."""
    from fastff.ops.triton_kernels.tuning import tune

    case = cell.case
    if case in _tuned:
        return
    _tuned.add(case)
    layer, x = layers_of(cell, device, settings.seed, 1)[0], rows_of(cell, device, settings.seed)
    w_in, w_out = (weight.detach() for weight in layer.parameters())

    def time_us(run: Run) -> float:
        return statistics.median(device.times_us(run, settings.cell_seconds / 10, cold=True))

    tune(x.detach(), Weights(w_in, None, w_out, None), config=case.pair.tree, time_us=time_us, training=case.training)


def _resume(device: Device, out: Path, settings: Settings) -> Record:
    """What an earlier run of the same device, versions, seed and way of timing left; a fresh file otherwise."""
    timing = {"cell_seconds": settings.cell_seconds, "tune": settings.tune}
    about = {"device": device.name, "seed": settings.seed, "commit": commit(), **timing, **machine()}
    path = out / LINES
    lines = read_json_lines(path) if path.is_file() else []
    kept = lines[0] if lines else {}
    if {name: kept.get(name) for name in about} == json.loads(json.dumps(about)):
        with reading(path):
            restored(float, kept.get("copy_bytes_per_s"), "copy_bytes_per_s")
            steps = [restored(Step, line) for line in lines[1:] if "step_ms_p50" in line]
            timings = [restored(Timing, line) for line in lines[1:] if "step_ms_p50" not in line]
        return Record(kept, timings, steps)
    about["copy_bytes_per_s"] = device.copy_bytes_per_s()
    write_text(path, json.dumps(about) + "\n")
    return Record(about)


def _compile_ahead(cells: Sequence[Cell], settings: Settings) -> None:
    """Fill the compilers' caches from several processes, the most important cells first."""
    context = multiprocessing.get_context("spawn")
    limit = None if settings.seconds is None else COMPILE_SHARE * settings.seconds
    wanted = [cell for cell in cells if "compiled" in cell.provider or "fastff" in cell.provider]
    processes = [
        context.Process(target=_compile_share, args=(wanted[index :: settings.jobs], settings.seed, limit), daemon=True)
        for index in range(settings.jobs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def _compile_share(cells: Sequence[Cell], seed: int, limit: float | None) -> None:
    end, device = None if limit is None else time.monotonic() + limit, Cuda()
    for cell in cells:
        if end is not None and time.monotonic() > end:
            return
        try:
            torch._dynamo.reset()
            check(replace(cell, provider=cell.provider.removesuffix(" graph")), device, seed)
            chain(replace(cell, case=replace(cell.case, layers=1)), device, seed)[0]()
        except Exception:  # the run itself tells what fails
            continue
        device.settle()
