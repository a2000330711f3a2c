"""How far a long command is: bars on a terminal, lines now and then in a log, both with the time left."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

LINE_SECONDS = 30.0  # between two lines of a log


class Progress(Protocol):
    """Told now and then that `done` of `total` (None: nobody knows) of a stage is done, in any unit; note: the details
    of the moment."""

    def __call__(self, stage: str, done: float, total: float | None = None, note: str = "") -> None: ...


def silent(stage: str, done: float, total: float | None = None, note: str = "") -> None:
    """Nobody is told."""


def of_stage(progress: Progress, name: str) -> Progress:
    """`progress` with a name of its own for the stage that it is told of."""

    def tell(stage: str, done: float, total: float | None = None, note: str = "") -> None:
        progress(name, done, total, note)

    return tell


def is_first_process() -> bool:
    """Whether this is the one of torchrun's processes that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def shown(console: Console, command: str) -> Iterator[Progress]:
    """Show the progress of a command on a console; of several processes of torchrun only the first is heard."""
    if not is_first_process():
        yield silent
    elif console.is_terminal:
        with _bars(console) as progress:
            yield progress
    else:
        yield _Lines(console, command)


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    """A bar for each stage."""
    from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    tasks: dict[str, TaskID] = {}
    with Bars(TextColumn("{task.description:40}"), BarColumn(), TimeRemainingColumn(), console=console) as bars:

        def progress(stage: str, done: float, total: float | None = None, note: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            words = f"{stage}: {note}" if note else stage
            if total is None:
                words += f", {done:,.0f}"
            bars.update(tasks[stage], completed=done, total=total, description=words)

        yield progress


class _Lines:
    """A line when a stage begins, at most every LINE_SECONDS while it goes on, and when it ends."""

    def __init__(self, console: Console, command: str) -> None:
        self.console, self.command = console, command
        self.began: dict[str, float] = {}
        self.spoke = 0.0

    def __call__(self, stage: str, done: float, total: float | None = None, note: str = "") -> None:
        now = time.monotonic()
        first = stage not in self.began
        began = self.began.setdefault(stage, now)
        if not first and now - self.spoke < LINE_SECONDS and (total is None or done < total):
            return
        self.spoke = now
        words = [f"{self.command}: {stage}", note, f"{done:,.0f}" if total is None else f"{done / (total or 1):.0%}"]
        if total is not None and 0 < done < total and not first:
            words.append(f"{time_left((now - began) * (total - done) / done)} left")
        self.console.print(", ".join(word for word in words if word), markup=False, highlight=False)


def time_left(seconds: float) -> str:
    """Seconds as `45 s`, `3 min`, `2.5 h`: as exact as an estimate deserves."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
