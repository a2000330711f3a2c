"""Variants of a conversion taught at the same time, a process each on one GPU, all for as many steps as fit the time.

A process builds its student, takes a few steps while all others do, and then takes as many as the slowest can in the
seconds that are left. One that fails meets the others too, or they would wait for it.
"""

from __future__ import annotations

import queue
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.multiprocessing as mp

from fastff.conditional import ConditionalFeedforward
from fastff.models.feedforward import masked_leaves
from fastff.report.progress import Progress

TIMED_STEPS = 15
LEAST_STEPS = 10


class Work(Protocol):
    """One variant's part, made in its own process."""

    def take_steps(self, steps: int, progress: Progress) -> None:
        """Take so many steps, each of them told, in a way that can be undone."""

    def finish(self, steps: int) -> dict[str, Any]:
        """Distil in so many steps, evaluate; the variant's figures."""


@dataclass(frozen=True)
class Turnout:
    """What the processes share: meetings of all, the slowest one's seconds a step, the finished rows."""

    meeting: Any
    slowest: Any
    results: Any
    deadline: float  # time.time() by which the joint distillation ends
    seconds: float  # at most, of the joint distillation


def together(
    jobs: Sequence[tuple[Any, ...]],
    make: Callable[..., Work],
    *,
    seconds: float,
    deadline: float,
    finished: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Run make(*job) for every job in a process of its own; `finished` gets all rows so far after each. Returns them;
    fewer than jobs where some failed, whose errors are on the terminal."""
    context = mp.get_context("spawn")
    shared = Turnout(context.Barrier(len(jobs)), context.Value("d", 0.0), context.Queue(), deadline, seconds)
    workers = [context.Process(target=_one, args=(make, job, shared), daemon=True) for job in jobs]
    for worker in workers:
        worker.start()
    rows: list[dict[str, Any]] = []
    while len(rows) < len(jobs):
        try:
            rows.append(shared.results.get(timeout=2))
        except queue.Empty:
            if not any(worker.is_alive() for worker in workers):
                break
            continue
        finished(rows)
    return rows


def by_dense_products(student: Any) -> None:
    """Evaluate experts as they are taught: the same function, the arithmetic of training."""
    for module in student.modules():
        if isinstance(module, ConditionalFeedforward):
            module.forward = partial(masked_leaves, module)  # type: ignore[method-assign]


def _one(make: Callable[..., Work], job: tuple[Any, ...], shared: Turnout) -> None:
    torch.set_num_threads(1)
    work = _attempt(lambda: make(*job))
    shared.meeting.wait()
    timed = work is not None and _attempt(lambda: _time_steps(work, shared.slowest))
    shared.meeting.wait()
    if work is None or not timed:
        raise SystemExit(f"{job[-2:]} failed")
    left = min(shared.seconds, shared.deadline - time.time())
    steps = max(LEAST_STEPS, int(left / max(shared.slowest.value, 1e-6)))
    began = time.perf_counter()
    row = work.finish(steps)
    shared.results.put(row | {"steps": steps, "distil_s": time.perf_counter() - began})


def _time_steps(work: Work, slowest: Any) -> bool:
    """Keep the median time of a step; the first half of the steps, in which code is compiled, does not count."""
    ends: list[float] = []

    def note(*_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    work.take_steps(2 * TIMED_STEPS, note)
    seconds = statistics.median(after - before for before, after in pairwise(ends[TIMED_STEPS:]))
    with slowest.get_lock():
        slowest.value = max(slowest.value, seconds)
    return True


def _attempt(work: Callable[[], Any]) -> Any:
    """What `work` returns; None, and its error on the terminal, if it fails."""
    try:
        return work()
    except Exception:
        traceback.print_exc()
        return None
