"""Ctrl-C at a moment of the program's choosing, and workers that end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from types import FrameType


class Stop:
    """Inside `deferred()`, the first Ctrl-C only asks; `check()` then raises KeyboardInterrupt. The second is obeyed at
    once. SIGTERM counts as Ctrl-C throughout. number: the last signal that came, None if none did."""

    def __init__(self) -> None:
        self._deferring = False
        self._asked = False
        self.number: int | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take both signals over, and give them back at the end. Needs the main thread."""
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    @property
    def asked(self) -> bool:
        """Whether a Ctrl-C is waiting to be obeyed."""
        return self._asked

    @property
    def exit_status(self) -> int:
        """What a command that was stopped ends with, as a shell counts: 130 after Ctrl-C, 143 after SIGTERM; else 0."""
        return 0 if self.number is None else 128 + self.number

    def check(self) -> None:
        if self._asked:
            raise KeyboardInterrupt

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if self._deferring and not self._asked:
            self._asked = True
            return
        raise KeyboardInterrupt


def end_all(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Ask all of them to end, and wait until they have: they may write a checkpoint first."""
    processes = list(processes)
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def end_with_parent() -> None:
    """Called in a process of `multiprocessing`: end it as soon as the one that started it has ended, however that was.
    Otherwise a killed command leaves workers that compute for some time until they notice."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end_with_parent").start()
