"""The coordinator: which cells there are, whose turn it is, what is kept when a run is interrupted."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from fastff.bench.cpu_providers import PROVIDERS
from fastff.bench.limits import Limits, least_us
from fastff.bench.workers import FAILED, INPUT_BYTES, WRONG, Checked, LocalWorker, Refused, RemoteWorker
from fastff.bench.workloads import Cell, DenseConfig, Grid, Subject, Workload, features_of, label, weights_of
from fastff.config import TreeConfig
from fastff.io import read_json, reading, restored, write_json
from fastff.machine import available_bytes, commit, machine
from fastff.report.progress import Progress, silent
from fastff.timing import quartiles

PARTIAL = "partial.json"
TURN_SECONDS = 0.12
REST_SECONDS = 0.005  # between turns: a pool of threads that spins after its work has fallen asleep by then
LEAST_SAMPLES = 5
LEAST_SLOW_SAMPLES = 3  # of calls that take longer than a turn
MEMORY_SHARE = 0.85  # of what is available
HIDDEN = 5  # matrices of hidden values that a process may hold while it computes: scores, activations, what was freed


@dataclass(frozen=True)
class Timing:
    """One provider on one layer of a workload. Latencies are microseconds a row and layer: quartiles over the samples.
    Errors are against float64, the relative one of norms. limit_fraction: the least time that the machine's measured
    limits allow this layer, of the median; only for fastff."""

    layer: str
    provider: str
    kind: str  # dense or conditional
    precision: str
    rows: int
    layers: int
    threads: int
    training: bool
    latency_us_p25: float
    latency_us_p50: float
    latency_us_p75: float
    max_abs_error: float
    relative_error: float
    samples: int
    limit_fraction: float | None = None


@dataclass(frozen=True)
class Settings:
    """seconds: timed seconds of a cell; longest_call: providers slower than so many seconds a call are left out;
    separate: families of providers in processes of their own, taking turns, else all in this one.
    limits: measure the machine's limits first, and compare with them."""

    grid: Grid
    seconds: float = 0.5
    longest_call: float = 4.0
    seed: int = 0
    separate: bool = True
    limits: bool = True


@dataclass
class Record:
    """What a run found. left_out: by cell, why; finished: workloads that are complete; updates: of runs that measured
    some workloads again later, their machine, settings, limits and workloads."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    limits: dict[int, Limits] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)
    updates: list[dict[str, Any]] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        """Names of cells that gave a wrong output, or none at all though nothing was missing."""
        return [name for name, why in self.left_out.items() if why.startswith((WRONG, FAILED))]


class Worker(Protocol):
    """A LocalWorker, here or in another process."""

    def limits(self) -> Limits: ...
    def prepare(self, cell: Cell, longest_call: float) -> Checked: ...
    def sample(self, cell: Cell, seconds: float) -> list[float]: ...
    def clear(self) -> None: ...


def run_grid(settings: Settings, out: Path | None = None, progress: Progress = silent) -> Record:
    """Measure the table. With `out`, what is finished is kept there, and a run of the same settings resumes from it.
    progress is told the expected seconds of work."""
    record = (begun(settings, out) if out is not None else None) or fresh(settings)
    todo = [workload for workload in settings.grid.workloads() if _key(workload) not in record.finished]
    total = sum(_expected_seconds(cell, settings) for workload in todo for cell in _cells(workload, settings))
    clock = _Clock(progress, total)
    pool: WorkerPool | None = None
    try:
        for workload in todo:
            if pool is None or not pool.serves(workload):
                if pool is not None:
                    pool.close()
                pool = WorkerPool(settings, workload)
            if settings.limits and workload.threads not in record.limits:
                clock.now(f"limits of {workload.threads} threads")
                record.limits[workload.threads] = pool.worker("torch").limits()
            _measure(workload, settings, pool, record, clock)
            record.finished.append(_key(workload))
            if out is not None:
                _keep(record, out / PARTIAL)
    finally:
        if pool is not None:
            pool.close()
    return record


def _key(workload: Workload) -> str:
    return f"{workload.name} {' '.join(map(label, workload.subjects))}"


class WorkerPool:
    """The workers of one number of threads and one set of layers, by family of providers."""

    def __init__(self, settings: Settings, workload: Workload) -> None:
        self._settings, self._workload = settings, workload
        self._workers: dict[str, Worker] = {}
        self._threads = torch.get_num_threads()  # of this process, which a LocalWorker in it changes
        self.available = available_bytes()  # before its workers hold any

    def serves(self, workload: Workload) -> bool:
        return (workload.threads, workload.subjects) == (self._workload.threads, self._workload.subjects)

    def worker(self, family: str) -> Worker:
        key = family if self._settings.separate else "all"
        if key not in self._workers:
            make = RemoteWorker if self._settings.separate else LocalWorker
            self._workers[key] = make(self._workload.threads, self._settings.seed)
        return self._workers[key]

    def clear(self) -> None:
        for name, worker in list(self._workers.items()):
            try:
                worker.clear()
            except Refused:  # its process is gone: the next cell starts another
                del self._workers[name]

    def close(self) -> None:
        for worker in self._workers.values():
            if isinstance(worker, RemoteWorker):
                worker.close()
        self._workers.clear()
        torch.set_num_threads(self._threads)


class _Clock:
    def __init__(self, progress: Progress, total: float) -> None:
        self._progress, self._total, self._done, self._what = progress, total, 0.0, ""

    def now(self, what: str, seconds: float = 0.0) -> None:
        """Name what is done now, after so many expected seconds of work."""
        self._what, self._done = what or self._what, self._done + seconds
        self._progress("bench", self._done, self._total, self._what)


def _cells(workload: Workload, settings: Settings) -> list[Cell]:
    chosen = settings.grid.only.provider
    make = (workload.rows, workload.layers, workload.threads, workload.training)
    return [
        Cell(subject, name, *make)
        for subject in workload.subjects
        for name, provider in PROVIDERS.items()
        if provider.computes(subject, workload.training) and (not chosen or name in chosen)
    ]


def _measure(workload: Workload, settings: Settings, pool: WorkerPool, record: Record, clock: _Clock) -> None:
    cells = []
    for cell in _cells(workload, settings):
        why = PROVIDERS[cell.provider].why_not(cell.subject)
        if why is None:
            cells.append(cell)
        else:
            record.left_out[cell.name] = why
            clock.now("", _expected_seconds(cell, settings))
    for together in seatings(cells, pool.available, record.left_out):
        if together != cells:  # not everything fits memory at once
            pool.close()
        _interleave(workload, together, settings, pool, record, clock)


def seatings(cells: Sequence[Cell], available: int, left_out: dict[str, str]) -> list[list[Cell]]:
    """Groups of cells whose weights fit the available memory together. What does not fit alone is left out."""
    groups: list[list[Cell]] = []
    most = MEMORY_SHARE * available
    for cell in cells:
        alone = resident_bytes([cell])
        if alone > most:
            left_out[cell.name] = f"needs {alone / 2**30:.1f} GiB, of {most / 2**30:.1f} GiB that may be used"
        elif groups and resident_bytes([*groups[-1], cell]) <= most:
            groups[-1].append(cell)
        else:
            groups.append([cell])
    return groups


def resident_bytes(cells: Iterable[Cell]) -> int:
    """Memory that these cells need together: fp32 weights once a process, each provider's copies, inputs, and hidden
    values: what a process needs while it computes, and what layers keep."""
    sources: dict[tuple[str, Subject], int] = {}
    passing: dict[str, int] = {}
    copies = 0.0
    for cell in cells:
        provider, weights = PROVIDERS[cell.provider], 4 * weights_of(cell.subject) * cell.layers
        hidden = 4 * cell.rows * cell.subject.in_rows if isinstance(cell.subject, DenseConfig) else 0
        sources[provider.family, cell.subject] = weights
        passing[provider.family] = max(HIDDEN * hidden, passing.get(provider.family, 2 * INPUT_BYTES))
        copies += provider.copies * weights + provider.keeps * hidden * cell.layers
        copies += 4 * cell.rows * features_of(cell.subject)
    return int(sum(sources.values()) + sum(passing.values()) + copies)


def _interleave(
    workload: Workload, cells: Sequence[Cell], settings: Settings, pool: WorkerPool, record: Record, clock: _Clock
) -> None:
    checked: dict[Cell, Checked] = {}
    for cell in cells:
        clock.now(f"{workload.name}: checking {cell.provider} on {label(cell.subject)}")
        try:
            checked[cell] = pool.worker(PROVIDERS[cell.provider].family).prepare(cell, settings.longest_call)
        except Refused as error:
            record.left_out[cell.name] = str(error)
    samples = _rounds(workload, checked, settings, pool, record, clock)
    for cell, latencies in samples.items():
        record.timings.append(_timing(cell, checked[cell], latencies, record.limits.get(cell.threads)))
    pool.clear()
    clock.now("", sum(_expected_seconds(cell, settings) for cell in cells))


def _rounds(
    workload: Workload,
    checked: Mapping[Cell, Checked],
    settings: Settings,
    pool: WorkerPool,
    record: Record,
    clock: _Clock,
) -> dict[Cell, list[float]]:
    """Rounds over all cells, so that a slow second of the machine hits each; a cell leaves when it has its seconds."""
    samples: dict[Cell, list[float]] = {cell: [] for cell in checked}
    spent = dict.fromkeys(checked, 0.0)

    def unfinished(cell: Cell) -> bool:
        least = LEAST_SLOW_SAMPLES if checked[cell].seconds > TURN_SECONDS else LEAST_SAMPLES
        return spent[cell] < settings.seconds or len(samples[cell]) < least

    while left := [cell for cell in samples if unfinished(cell)]:
        clock.now(f"{workload.name}: timing {len(left)} of {len(checked)} providers")
        for cell in left:
            time.sleep(REST_SECONDS)
            start = time.perf_counter()
            try:
                samples[cell] += pool.worker(PROVIDERS[cell.provider].family).sample(cell, TURN_SECONDS)
            except Refused as error:
                record.left_out[cell.name] = str(error)
                del samples[cell]
            spent[cell] += time.perf_counter() - start
    return samples


def _timing(cell: Cell, checked: Checked, latencies_us: Sequence[float], limits: Limits | None) -> Timing:
    p25, p50, p75 = quartiles(latencies_us)
    provider = PROVIDERS[cell.provider]
    fraction = None
    if limits and isinstance(cell.subject, TreeConfig) and provider.family == "fastff" and not cell.training:
        fraction = least_us(
            cell.subject, limits, rows=cell.rows, layers=cell.layers, precision=provider.precision
        ) / p50  # fmt: skip
    return Timing(
        layer=label(cell.subject),
        provider=cell.provider,
        kind="dense" if provider.dense else "conditional",
        precision=provider.precision,
        rows=cell.rows,
        layers=cell.layers,
        threads=cell.threads,
        training=cell.training,
        latency_us_p25=p25,
        latency_us_p50=p50,
        latency_us_p75=p75,
        max_abs_error=checked.max_abs_error,
        relative_error=checked.relative_error,
        samples=len(latencies_us),
        limit_fraction=fraction,
    )


def _expected_seconds(cell: Cell, settings: Settings) -> float:
    """Rough wall time of a cell, for the progress bar."""
    provider, rows = PROVIDERS[cell.provider], cell.rows * (3 if cell.training else 1)
    if isinstance(cell.subject, DenseConfig) or provider.name == "torch masked":
        call = rows * 2 * weights_of(cell.subject) / 8e10 / cell.threads
    else:
        slowness = 20 if provider.name == "torch gather+bmm" else 1
        call = slowness * rows * cell.subject.flops_per_row / 1e10 / cell.threads
    build = cell.layers * weights_of(cell.subject) / 1e9
    if call > settings.longest_call:
        return build + 2 * call
    return build + 2 * call + max(settings.seconds, LEAST_SLOW_SAMPLES * call)


def begun(settings: Settings, out: Path) -> Record | None:
    """What an interrupted run of the same settings, machine, versions and commit left in a folder."""
    path, now = out / PARTIAL, fresh(settings)
    if not path.is_file():
        return None
    kept = read_json(path, needs={"machine": dict, "settings": dict})
    if [kept["machine"], kept["settings"]] != json.loads(json.dumps([now.machine, now.settings])):
        return None
    with reading(path):
        return restored(Record, kept)


def fresh(settings: Settings) -> Record:
    """What a run of these settings begins with, on this machine."""
    return Record({**machine(), "commit": commit()}, asdict(settings))


def _keep(record: Record, path: Path) -> None:
    write_json(path, asdict(record))
