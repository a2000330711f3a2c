"""Ctrl-C at a moment of the program's choosing."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Inside `deferred()`, the first Ctrl-C only asks; `check()` then raises KeyboardInterrupt. The second is obeyed at
    once. SIGTERM counts as Ctrl-C throughout."""

    def __init__(self) -> None:
        self._deferring = False
        self._asked = False

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

    def check(self) -> None:
        if self._asked:
            raise KeyboardInterrupt

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._deferring and not self._asked:
            self._asked = True
            return
        raise KeyboardInterrupt
