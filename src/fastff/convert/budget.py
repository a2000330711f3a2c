"""How long a conversion takes: measured before the joint distillation, and how many steps of it fit into the time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from fastff.convert.arms import Course, Descriptions
from fastff.convert.distil import distil, use_masked_training
from fastff.convert.measure import LEAST_CALLS, WHOLE
from fastff.convert.plan import Clock
from fastff.convert.settings import Settings
from fastff.models.converted import make_converted
from fastff.text.examples import Examples

LEAST = 10  # joint steps, of a run that is to be worth anything
SPARE = 0.05  # of the time for joint steps that is left unplanned
TIMED, DRAWN = 5, 64  # batches that a step is timed on, out of so many


@dataclass(frozen=True)
class Timetable:
    """What is still to come when the layers of the first student were taught.

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


def timetable(
    course: Course, students: Sequence[Descriptions], *, build_s: float, scores_s: float, clock: Clock, began: float
) -> Timetable:
    """Measure a step of every student and count what else is to come: the other students' layers, taken to last as long
    as the first one's, build_s; two rounds of scores_s each; the loss on held-out text; the times of all models.

    With `settings.seconds` only as many steps are planned as fit. began: time.perf_counter() of the whole run. Raises
    ValueError, naming the seconds that are needed, if LEAST steps do not fit.
    """
    settings, count = course.settings, len(students)
    known: dict[str, float] = {}
    for descriptions in students:
        key = str(descriptions)
        known[key] = known.get(key) or step_seconds(course, descriptions)
    step_s = sum(known[str(descriptions)] for descriptions in students)
    tokens = settings.batch * course.examples.tokens / len(course.examples)  # a step; its backward half is left out
    held_out_s = step_s / 2 * course.held_out.tokens / tokens
    calls_s = 2 * LEAST_CALLS * (count + 1) * sum(clock.model_us) * 1e-6
    timed_s = len(settings.shapes) * (WHOLE + len(course.captured)) * settings.timing_s
    rest_s = (count - 1) * build_s + 2 * count * scores_s + held_out_s + max(calls_s, timed_s)
    spent_s = time.perf_counter() - began
    return Timetable(count, _steps(settings, step_s, rest_s, spent_s), step_s, rest_s, spent_s)


def _steps(settings: Settings, step_s: float, rest_s: float, spent_s: float) -> int:
    if settings.seconds is None:
        return settings.steps
    least = min(LEAST, settings.steps)
    steps = int((1 - SPARE) * (settings.seconds - spent_s - rest_s) / step_s)
    if steps < least:
        needed = spent_s + rest_s + least * step_s / (1 - SPARE)
        raise ValueError(
            f"seconds {settings.seconds:.0f} are too few: {needed:.0f} are needed for {least} joint steps; with more, "
            "the same command goes on from here"
        )
    return min(steps, settings.steps)


def step_seconds(course: Course, descriptions: Descriptions) -> float:
    """Mean seconds of a joint step, measured on a fresh student and batches of typical lengths."""
    student = make_converted(course.teacher, descriptions)
    use_masked_training(student.modules(), student.device.type == "cuda")
    batches = typical_batches(course.examples, course.settings.batch, course.settings.seed)
    ends: list[float] = []

    def note(*_: Any) -> None:
        if student.device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    recipe = replace(course.settings.recipe, steps=1 + len(batches))
    drawn = iter(
        [batches[-1], *batches]
    )  # the first step, the longest, is not counted: memory is fetched, code compiled
    distil(student, course.teacher, course.examples, recipe, kind=course.kind, progress=note, batches=drawn)
    return (ends[-1] - ends[0]) / len(batches)


def typical_batches(examples: Examples, batch: int, seed: int) -> list[np.ndarray[Any, Any]]:
    """TIMED batches of the first DRAWN, from short to long: their mean length is about that of all."""
    lengths = np.diff(examples.offsets)
    drawn = sorted(islice(examples.shuffled(batch, seed), DRAWN), key=lambda which: len(which) * lengths[which].max())
    return [drawn[int((k + 0.5) * len(drawn) / TIMED)] for k in range(TIMED)]
