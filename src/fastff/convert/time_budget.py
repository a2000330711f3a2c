"""How long a conversion takes: what is said before the long work, what a limit of seconds leaves room for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from fastff.convert.choose_layers import LatencyProfile
from fastff.convert.conversion_settings import ConversionSettings
from fastff.convert.distil import distil, use_masked_training
from fastff.convert.distill_context import Descriptions, DistillContext
from fastff.convert.latency import WHOLE
from fastff.models.converted import make_converted
from fastff.report.progress import Progress
from fastff.text.examples import Examples
from fastff.timing import LEAST_ROUNDS, seconds_of

LEAST = 10  # joint steps, of a run that is to be worth anything
SPARE = 0.05  # of the time for joint steps that is left unplanned
TIMED, DRAWN = 5, 64  # batches that a step is timed on, out of so many
PASSES = 2  # forward passes of the dense model that a joint step takes at least: the teacher's, and the student's work
TRIALS = 0.25  # of the time left, for trying candidates


class TooFewSeconds(ValueError):
    """A limit that the conversion cannot keep; what was done so far stays, for the same command with a greater one."""


@dataclass(frozen=True)
class TimeLimit:
    """The seconds that a run may take, from the moment this is made; None: as many as it needs."""

    seconds: float | None = None
    began: float = field(default_factory=time.perf_counter)

    @property
    def spent_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began

    @property
    def left_s(self) -> float:
        """Seconds until the limit."""
        return float("inf") if self.seconds is None else self.seconds - self.spent_s

    def check(self, needed_s: float, what: str) -> None:
        """Raise TooFewSeconds, naming what is needed, unless `needed_s` more seconds are left."""
        if needed_s > self.left_s:
            raise TooFewSeconds(
                f"seconds {self.seconds:.0f} are too few: {self.spent_s + needed_s:.0f} are needed for {what}; run the "
                "same command again with more to resume"
            )


class TimeLeft:
    """Progress that is passed on and, every `every_s` seconds, said with the time that is left of what goes on."""

    def __init__(self, progress: Progress, say: Callable[[str], None], every_s: float = 60.0) -> None:
        self._progress, self._say, self._every_s = progress, say, every_s
        self._said = time.perf_counter() - every_s / 2  # the first line after half as long
        self._stage, self._start, self._first = "", 0.0, 0.0

    def __call__(self, stage: str, done: float, total: float | None = None, note: str = "") -> None:
        self._progress(stage, done, total, note)
        now = time.perf_counter()
        if stage != self._stage:
            self._stage, self._start, self._first = stage, now, done
        elif now - self._said >= self._every_s and total is not None and self._first < done < total:
            left = (now - self._start) * (total - done) / (done - self._first)
            self._say(f"{stage}: {done:.0f} of {total:.0f}, about {duration(left)} left")
            self._said = now


@dataclass(frozen=True)
class Timetable:
    """What is still to come when the layers of the first student were trained.

    students, steps  that are distilled, and the steps of each
    step_s           seconds of one step of all students together
    rest_s           seconds of everything else that follows
    spent_s          seconds before
    """

    students: int
    steps: int
    step_s: float
    rest_s: float
    spent_s: float

    @property
    def left_s(self) -> float:
        """Seconds from here to the end."""
        return self.steps * self.step_s + self.rest_s

    def joint_s(self, taken: int) -> float:
        """Seconds of the joint steps that are left after those that all students took; 0 where none was: they were
        planned to fit."""
        return (self.students * self.steps - taken) * self.step_s / self.students if taken else 0.0

    def __str__(self) -> str:
        return (
            f"about {duration(self.left_s)} left: {self.students} models, {self.steps} steps of "
            f"{self.step_s / self.students:.3g} s each, and {duration(self.rest_s)} for the rest"
        )


def duration(seconds: float) -> str:
    """90 s, 15 min or 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


@torch.no_grad()
def least_s(settings: ConversionSettings, teacher: Any, examples: Examples) -> float:
    """Seconds that a conversion takes at least: the passes over the captured rows and LEAST joint steps, if a student
    takes no longer than the dense model, which is measured on a batch of the examples."""
    which = typical_batches(examples, settings.batch, settings.seed)[TIMED // 2]
    inputs = examples.batch(which, teacher.device)
    batch_s = seconds_of(lambda: teacher(**inputs), teacher.device)
    captured = settings.rows / int(examples.lengths[which].sum())
    return batch_s * (captured + PASSES * settings.students * min(LEAST, settings.steps))


def timetable(
    context: DistillContext,
    students: Sequence[Descriptions],
    *,
    build_s: float,
    scores_s: float,
    profile: LatencyProfile,
    limit: TimeLimit,
) -> Timetable:
    """Measure a step of every student and count what else is to come: the other students' layers, taken to last as long
    as the first one's, build_s; two rounds of scores_s each; the loss on held-out text; the times of all models.

    Only as many steps are planned as fit into the limit. Raises TooFewSeconds if LEAST steps do not fit.
    """
    settings, count = context.settings, len(students)
    known: dict[str, float] = {}
    for descriptions in students:
        key = str(descriptions)
        known[key] = known.get(key) or step_seconds(context, descriptions)
    step_s = sum(known[str(descriptions)] for descriptions in students)
    tokens = settings.batch * context.examples.tokens / len(context.examples)  # a step; without its backward half
    held_out_s = step_s / 2 * context.held_out.tokens / tokens
    calls_s = 2 * (LEAST_ROUNDS + 1) * (count + 1) * sum(profile.model_us) * 1e-6
    timed_s = len(settings.shapes) * (WHOLE + len(context.captured)) * settings.timing_s
    rest_s = (count - 1) * build_s + 2 * count * scores_s + held_out_s + max(calls_s, timed_s)
    steps = settings.steps
    if limit.seconds is not None:
        least = min(LEAST, steps)
        limit.check(rest_s + least * step_s / (1 - SPARE), f"{least} joint steps")
        steps = min(steps, max(least, int((1 - SPARE) * (limit.left_s - rest_s) / step_s)))
    return Timetable(count, steps, step_s, rest_s, limit.spent_s)


def step_seconds(context: DistillContext, descriptions: Descriptions) -> float:
    """Mean seconds of a joint step, measured on a fresh student and batches of typical lengths."""
    student = make_converted(context.teacher, descriptions)
    use_masked_training(student.modules(), student.device.type == "cuda")
    batches = typical_batches(context.examples, context.settings.batch, context.settings.seed)
    ends: list[float] = []

    def ended(stage: str, done: float, total: float | None = None, note: str = "") -> None:
        if student.device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    recipe = replace(context.settings.recipe, steps=1 + len(batches))
    # The first step, the longest, is not counted: memory is fetched, code compiled.
    drawn = iter([batches[-1], *batches])
    distil(student, context.teacher, context.examples, recipe, kind=context.kind, progress=ended, batches=drawn)
    return (ends[-1] - ends[0]) / len(batches)


def typical_batches(examples: Examples, batch: int, seed: int) -> list[np.ndarray[Any, Any]]:
    """TIMED batches of the first DRAWN, from short to long: their mean length is about that of all."""
    lengths = examples.lengths
    drawn = sorted(islice(examples.shuffled(batch, seed), DRAWN), key=lambda which: len(which) * lengths[which].max())
    return [drawn[int((k + 0.5) * len(drawn) / TIMED)] for k in range(TIMED)]
