"""One process's side of the benchmark: builds providers, checks their outputs, and times them when it is their turn.

Between turns a process waits in the kernel for the next message: it does not spin, and the coordinator leaves it a
moment for its pool of threads to fall asleep. `RemoteWorker` runs a `LocalWorker` in a process of its own.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from fastff.bench import limits
from fastff.bench.cpu_providers import ERROR_LIMITS, PROVIDERS, Call
from fastff.bench.timed_layers import expected, make_layer
from fastff.bench.workloads import Cell, Subject, features_of
from fastff.train.interrupt import end_with_parent

INPUT_BYTES = 2**26  # inputs rotate over more than a core's private caches hold
CHECKED_ROWS = 64
CLEAR = 1e-4  # of a margin: rounding in fp32 does not turn such a row elsewhere
COMPILING = 15.0  # seconds that a first call may take beyond what a call may: it compiles
WRONG, FAILED = "wrong output:", "failed:"  # how such a reason begins
SHORTEST_SAMPLE = 200e-6  # seconds; a clock reading costs as much as a few microseconds
LONGEST_CYCLE = 5e-3  # a sample visits all layers if that takes no longer


class Refused(RuntimeError):
    """A provider whose output is wrong, or that takes too long for this table; the message says which."""


@dataclass(frozen=True)
class Checked:
    """Errors against float64 (relative: of norms), and seconds of one call."""

    max_abs_error: float
    relative_error: float
    seconds: float


class LocalWorker:
    """Providers in this process, with `threads` threads. seed: of weights and inputs."""

    def __init__(self, threads: int, seed: int) -> None:
        torch.set_num_threads(threads)
        self._seed = seed
        self._layers: dict[Subject, list[nn.Module]] = {}
        self._kept: dict[tuple[Subject, str], list[Call]] = {}
        self._rows: dict[tuple[int, int], list[Tensor]] = {}
        self._wanted: dict[tuple[Subject, int, bool], tuple[list[Tensor], Tensor, Tensor]] = {}
        self._ready: dict[Cell, tuple[list[Call], Iterator[tuple[int, Any]], Checked]] = {}

    def limits(self) -> limits.Limits:
        """What this process's threads can reach."""
        return limits.measure()

    def prepare(self, cell: Cell, longest_call: float) -> Checked:
        """Build a provider and check its output.

        Raises Refused if it fails, if it is wrong, or if a call takes over longest_call seconds."""
        try:
            return self._prepare(cell, longest_call)
        except Refused:
            raise
        except Exception as error:  # of a library that the table can do without
            raise Refused(f"{FAILED} {type(error).__name__}: {error}") from error

    def _prepare(self, cell: Cell, longest_call: float) -> Checked:
        provider = PROVIDERS[cell.provider]
        with torch.set_grad_enabled(cell.training):
            calls = self._calls(cell)
            rows = self._inputs(cell)
            checked = self._check(cell, calls[0], rows, longest_call)
            inputs = [provider.inputs(x) for x in rows]
        position = zip(itertools.cycle(range(cell.layers)), itertools.cycle(inputs), strict=True)
        self._ready[cell] = calls, position, checked
        return checked

    def sample(self, cell: Cell, seconds: float) -> list[float]:
        """Microseconds a row and layer of samples that take so many seconds together; at least one sample."""
        calls, position, checked = self._ready[cell]
        count = max(1, round(SHORTEST_SAMPLE / checked.seconds))
        if checked.seconds * cell.layers < LONGEST_CYCLE:
            count = -(-count // cell.layers) * cell.layers
        samples: list[float] = []
        with torch.set_grad_enabled(cell.training):
            if checked.seconds < seconds / 4:  # the other processes' turns emptied the caches
                for layer, x in itertools.islice(position, cell.layers):
                    calls[layer](x)
            stop = time.perf_counter() + seconds
            while not samples or time.perf_counter() < stop:
                batch = [(calls[layer], x) for layer, x in itertools.islice(position, count)]
                start = time.perf_counter()
                for call, x in batch:
                    call(x)
                samples.append((time.perf_counter() - start) * 1e6 / (count * cell.rows))
        return samples

    def clear(self) -> None:
        """Forget what was prepared; what does not depend on the rows is kept for the next cells."""
        for prepared in (self._ready, self._rows, self._wanted):
            prepared.clear()
        gc.collect()

    def _calls(self, cell: Cell) -> list[Call]:
        provider, layers = PROVIDERS[cell.provider], self._layers.setdefault(cell.subject, [])
        while len(layers) < cell.layers:
            layers.append(make_layer(cell.subject, len(layers), seed=self._seed))
        for layer in layers:
            layer.train(cell.training)
        if provider.per_rows or cell.training:
            return provider.make(layers[: cell.layers], cell.rows)
        kept = self._kept.setdefault((cell.subject, cell.provider), [])
        if len(kept) < cell.layers:
            kept += provider.make(layers[len(kept) : cell.layers], cell.rows)
        return kept[: cell.layers]

    def _inputs(self, cell: Cell) -> list[Tensor]:
        """Different rows for every call, (rows, features) each."""
        key = cell.rows, features_of(cell.subject)
        if key not in self._rows:
            count = max(2, INPUT_BYTES // (key[0] * key[1] * 4))
            generator = torch.Generator().manual_seed(self._seed)
            self._rows[key] = list(torch.randn(count, *key, generator=generator).unbind())
        return self._rows[key]

    def _expected(self, cell: Cell) -> tuple[list[Tensor], Tensor, Tensor]:
        """The first calls' inputs, what they should give in float64, and which rows route clearly."""
        key = cell.subject, cell.rows, cell.training
        if key not in self._wanted:
            rows = self._inputs(cell)[: 1 + min(15, CHECKED_ROWS // cell.rows)]
            exact = torch.cat([x[:CHECKED_ROWS] for x in rows]).requires_grad_(cell.training)
            y, _, margin = expected(self._layers[cell.subject][0], exact)  # type: ignore[arg-type]
            if cell.training:
                (y,) = torch.autograd.grad(y.sum(), exact)
            self._wanted[key] = rows, y.detach().double(), margin > CLEAR
        return self._wanted[key]

    def _check(self, cell: Cell, call: Call, rows: list[Tensor], longest_call: float) -> Checked:
        provider, seconds = PROVIDERS[cell.provider], []

        def timed(x: Tensor) -> Tensor:
            native = provider.inputs(x)
            start = time.perf_counter()
            y = call(native)
            seconds.append(time.perf_counter() - start)
            return provider.output(y).detach()[:CHECKED_ROWS].double()

        first = timed(rows[0])  # compiles, packs, fills caches
        if seconds[0] < longest_call + COMPILING:
            timed(rows[1])
            if seconds[-1] > longest_call:  # it may still have faulted memory in, or met a slow moment of the machine
                timed(rows[1])
        if seconds[-1] > longest_call:
            raise Refused(f"a call takes {seconds[-1]:.1f} s, more than the {longest_call:.1f} s of this table")
        took = seconds[-1]
        inputs, want, clear = self._expected(cell)
        got = torch.cat([first, *map(timed, inputs[1:])])
        return _errors(cell, got[clear], want[clear], took)


def _errors(cell: Cell, got: Tensor, want: Tensor, seconds: float) -> Checked:
    if not len(want):
        raise Refused("no row routes clearly: choose another seed")
    largest, relative = float((got - want).abs().max()), float((got - want).norm() / want.norm())
    limit = ERROR_LIMITS[PROVIDERS[cell.provider].precision]
    if not relative < limit:
        raise Refused(f"{WRONG} relative error {relative:.1e} against float64, expected below {limit:.0e}")
    return Checked(largest, relative, seconds)


class RemoteWorker:
    """A LocalWorker in a process of its own, on as many cores as it has threads."""

    def __init__(self, threads: int, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        with _environment(OMP_NUM_THREADS=str(threads)):  # read when a library is loaded
            self._process = context.Process(target=_serve, args=(theirs, threads, seed), daemon=True)
            self._process.start()
        theirs.close()

    def limits(self) -> limits.Limits:
        found: limits.Limits = self._ask("limits")
        return found

    def prepare(self, cell: Cell, longest_call: float) -> Checked:
        found: Checked = self._ask("prepare", cell, longest_call)
        return found

    def sample(self, cell: Cell, seconds: float) -> list[float]:
        found: list[float] = self._ask("sample", cell, seconds)
        return found

    def clear(self) -> None:
        self._ask("clear")

    def close(self) -> None:
        """End the process and give its memory back."""
        self._connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            self._connection.send((method, arguments))
            refused, value = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(1)
            raise Refused(f"{FAILED} its process ended with exit code {self._process.exitcode}") from error
        if refused:
            raise Refused(value)
        return value


def _serve(connection: Connection, threads: int, seed: int) -> None:
    end_with_parent()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    worker = LocalWorker(threads, seed)
    while True:
        try:
            method, arguments = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer = False, getattr(worker, method)(*arguments)
        except KeyboardInterrupt:
            return
        except Refused as error:
            answer = True, str(error)
        except Exception as error:  # told to the coordinator, which leaves this provider out and says why
            answer = True, f"{FAILED} {type(error).__name__}: {error}"
        connection.send(answer)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
