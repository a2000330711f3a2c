"""Variants of a conversion taught at the same time, a process each on one GPU, all for as many steps as fit the time.

A process builds its student and times a few steps while all others take theirs, when no code is compiled any more; then
all take as many as fit the seconds that are left. One that fails meets the others too, or they would wait for it.
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

FIRST_STEPS = 6  # in which code is compiled and recorded
TIMED_STEPS = range(10, 30)  # after those of all
LEAST_STEPS = 10
EASE = 0.92  # of the time, when the steps are counted


class Work(Protocol):
    """One variant's part, made in its own process."""

    def take_steps(self, steps: int, progress: Progress) -> None:
        """Take so many steps, each of them told, in a way that can be undone."""

    def finish(self, steps: int) -> dict[str, Any]:
        """Distil in so many steps, evaluate; the variant's figures."""


@dataclass(frozen=True)
class Turnout:
    """What the processes share: meetings of all, everyone's seconds a step, the finished rows."""

    meeting: Any
    step_s: Any
    steps: Any  # of a whole share; 0 until the first process has counted them
    results: Any
    shares: Sequence[float]
    deadline: float  # time.time() by which the joint distillation ends
    seconds: float  # at most, of the joint distillation

    def counted(self) -> int:
        """As many steps as fit, the same for all: one GPU does everyone's work, and what is done sooner leaves its part
        to the others."""
        with self.steps.get_lock():
            if self.steps.value == 0:
                taken = sum(seconds > 0 for seconds in self.step_s)
                work = sum(share * seconds for share, seconds in zip(self.shares, self.step_s, strict=True)) / taken
                self.steps.value = int(EASE * min(self.seconds, self.deadline - time.time()) / work)
            return int(self.steps.value)


def together(
    jobs: Sequence[tuple[Any, ...]],
    make: Callable[..., Work],
    *,
    seconds: float,
    deadline: float,
    finished: Callable[[list[dict[str, Any]]], None],
    shares: Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    """Run make(*job) for every job in a process of its own; `finished` gets all rows so far after each. Returns them;
    fewer than jobs where some failed, whose errors are on the terminal. shares: of the steps, that a job takes."""
    context = mp.get_context("spawn")
    meeting, step_s, steps = context.Barrier(len(jobs)), context.Array("d", len(jobs)), context.Value("i", 0)
    shared = Turnout(meeting, step_s, steps, context.Queue(), shares or [1.0] * len(jobs), deadline, seconds)
    workers = [
        context.Process(target=_one, args=(make, job, place, shared), daemon=True) for place, job in enumerate(jobs)
    ]
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


def _one(make: Callable[..., Work], job: tuple[Any, ...], place: int, shared: Turnout) -> None:
    torch.set_num_threads(1)
    work = _attempt(lambda: make(*job))
    shared.meeting.wait()
    seconds = None if work is None else _attempt(lambda: _seconds_a_step(work, shared.meeting))
    if seconds is None:
        shared.meeting.wait()
    else:
        shared.step_s[place] = seconds
    shared.meeting.wait()
    if work is None or seconds is None:
        raise SystemExit(f"{job[-2:]} failed")
    steps = max(LEAST_STEPS, int(shared.shares[place] * shared.counted()))
    began = time.perf_counter()
    row = work.finish(steps)
    shared.results.put(row | {"steps": steps, "step_s": seconds, "distil_s": time.perf_counter() - began})


def _seconds_a_step(work: Work, meeting: Any) -> float:
    """The median of some steps that begin when all have compiled and recorded theirs."""
    ends: list[float] = []

    def note(*_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        if len(ends) == FIRST_STEPS:
            meeting.wait()
            ends[-1] = time.perf_counter()

    work.take_steps(FIRST_STEPS + TIMED_STEPS.stop + 5, note)
    timed = ends[FIRST_STEPS + TIMED_STEPS.start : FIRST_STEPS + TIMED_STEPS.stop]
    return statistics.median(after - before for before, after in pairwise(timed))


def _attempt(work: Callable[[], Any]) -> Any:
    """What `work` returns; None, and its error on the terminal, if it fails."""
    try:
        return work()
    except Exception:
        traceback.print_exc()
        return None
