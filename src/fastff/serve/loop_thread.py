"""One thread beside an event loop: coroutines hand it work, and it hands results back."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod


class LoopThread(ABC):
    """name: of the thread. What both sides change is changed, and told, under `_changed`."""

    def __init__(self, name: str) -> None:
        self._changed = threading.Condition()
        self._closed = False
        self._started: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    @abstractmethod
    def _work(self) -> None:
        """Of the thread: until `_closed`."""

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        assert self._started is not None, f"{self._thread.name} was not started"
        return self._started

    def start(self) -> None:
        """Begin, in the event loop that hands over work."""
        self._started = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        """Let the thread end, and wait for it."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
