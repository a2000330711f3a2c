"""Texts generated in turns by one thread: each stream gets one step after the other, however slowly it is read.

A stream whose reader is behind rests, and takes no time of the others. Prompts are read in pieces for the same reason.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal

from fastff.serve.decoder_backends import Sampling, Session
from fastff.serve.loop_thread import LoopThread
from fastff.serve.refusals import Refused, busy

Finish = Literal["stop", "length"]
_AHEAD = 64  # tokens that a stream may be ahead of its reader
_PROMPT_PIECE = 256  # tokens of a prompt read in one step


class Stream:
    """Tokens as they are drawn (`async for`); then `finish` says why they ended. `close` ends it before."""

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        max_new_tokens: int,
        loop: asyncio.AbstractEventLoop,
        wake: Callable[[], object],
    ) -> None:
        self.prompt, self.sampling, self.max_new_tokens = prompt, sampling, max_new_tokens
        self.finish: Finish = "length"
        self.session: Session | None = None
        self.closed = False
        self.fed = self.made = self.read = 0
        self.last: int | None = None  # drawn, and not read by the model yet
        self._loop, self._wake = loop, wake
        self._ready: asyncio.Queue[int | Refused | None] = asyncio.Queue()

    def close(self) -> None:
        self.closed = True
        self._wake()

    def behind(self) -> bool:
        """Whether the reader must catch up first."""
        return self.made - self.read >= _AHEAD

    def give(self, item: int | Refused | None) -> None:
        """Of the thread: a token, the end or an error for the reader."""
        self._loop.call_soon_threadsafe(self._ready.put_nowait, item)

    async def __aiter__(self) -> AsyncIterator[int]:
        while (item := await self._ready.get()) is not None:
            if isinstance(item, Refused):
                raise item
            self.read += 1
            if self.made - self.read >= _AHEAD - 1:  # asked after: the thread may have seen one fewer, and rest
                self._wake()
            yield item


class Streams(LoopThread):
    """open: a session of a capacity. at_once: streams in turns; queued: further ones that wait. Closing ends all."""

    def __init__(
        self,
        open: Callable[[int], Session],
        stop: frozenset[int],
        *,
        at_once: int,
        queued: int,
        observe: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__("fastff-streams")
        self._open, self._stop, self._observe = open, stop, observe
        self._at_once, self._queued = at_once, queued
        self._waiting: deque[Stream] = deque()
        self._active: list[Stream] = []

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, requests: Sequence[tuple[Sequence[int], Sampling, int]]) -> list[Stream]:
        """Streams of prompts, each with its sampling and most new tokens. Raises Refused (429) without room for all."""
        made = [Stream(ids, sampling, most, self._loop, self._wake) for ids, sampling, most in requests]
        with self._changed:
            free = self._at_once - len(self._active) + self._queued - len(self._waiting)
            if len(made) > free:
                raise busy(
                    f"{len(self._active)} texts are generated and {len(self._waiting)} wait: no room for "
                    f"{len(made)} more; try again later"
                )
            self._waiting += made
            self._changed.notify()
        return made

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _work(self) -> None:
        while self._wait():
            for stream in list(self._active):
                if stream.closed or (not stream.behind() and self._over(stream)):
                    self._active.remove(stream)
                    stream.session = None

    def _wait(self) -> bool:
        """Until a stream can go on; False when closed. Fills free places from the queue."""
        with self._changed:
            while not self._closed:
                self._waiting = deque(stream for stream in self._waiting if not stream.closed)
                while self._waiting and len(self._active) < self._at_once:
                    self._active.append(self._waiting.popleft())
                if any(stream.closed or not stream.behind() for stream in self._active):
                    return True
                self._changed.wait()
        for stream in itertools.chain(self._active, self._waiting):
            stream.give(Refused(503, "the server stops", code="stopping"))
        return False

    def _over(self, stream: Stream) -> bool:
        """One step of a stream; whether it was the last."""
        try:
            token = self._step(stream)
        except Exception as error:
            stream.give(Refused(500, f"the model failed: {type(error).__name__}: {error}", code="model_failed"))
            return True
        if token is None:
            return False
        if token in self._stop:
            stream.finish = "stop"
        else:
            stream.made += 1
            stream.last = token
            stream.give(token)
            self._observe()
            if stream.made < stream.max_new_tokens:
                return False
        stream.give(None)
        return True

    def _step(self, stream: Stream) -> int | None:
        """The next token; None while the prompt is read."""
        if stream.session is None:
            stream.session = self._open(len(stream.prompt) + stream.max_new_tokens)
            stream.session.seed(stream.sampling.seed)
        if stream.fed < len(stream.prompt):
            piece = stream.prompt[stream.fed : stream.fed + _PROMPT_PIECE]
            stream.session.feed(piece)
            stream.fed += len(piece)
            if stream.fed < len(stream.prompt):
                return None
        elif stream.last is not None:
            stream.session.feed_one(stream.last)
        return stream.session.sample(stream.sampling)
