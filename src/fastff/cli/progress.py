"""What a running command shows: bars on a terminal, a line now and then in a log."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

console = Console()
LINE_SECONDS = 30.0  # between two lines of progress in a log
Move = Callable[[float | None, str], None]


def first_process() -> bool:
    """Whether this is the one of torchrun's processes that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def bar(what: str) -> Iterator[Move]:
    """move(done, words): a bar at `done` of 1, None for where it is; only the first of several processes shows it.

    Where nobody watches a terminal, a line now and then in the bar's place.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    if not console.is_terminal:
        yield lines(what)
        return
    columns = (TextColumn("{task.description:40}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not first_process()) as bars:
        task = bars.add_task(what, total=1.0)
        yield lambda done, words: bars.update(task, completed=done, description=f"{what}: {words}")


@contextmanager
def bars_by_name(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """move(name, done, total): one bar for every name, or for a log a line now and then."""
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    if not console.is_terminal:
        line = lines(what)
        yield lambda name, done, total: line(done / total, name)
        return
    tasks: dict[str, TaskID] = {}
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console) as shown:

        def move(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = shown.add_task(name, total=total)
            shown.update(tasks[name], completed=done, total=total)

        yield move


def lines(what: str) -> Move:
    """As `bar`, for a log: a line at most every LINE_SECONDS."""
    shown = first_process()
    last = time.monotonic()

    def move(done: float | None, words: str) -> None:
        nonlocal last
        if shown and time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            share = "" if done is None else f", {done:.0%}"
            console.print(f"{what}: {words}{share}", markup=False)

    return move
