"""Batches by a budget of tokens: one thread computes, and requests that come meanwhile share the next batch.

Nothing waits for a batch to fill. Requests take turns: one that is longer than a batch gets a part of each, so that
short ones do not wait for its end.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastff.serve.loop_thread import LoopThread
from fastff.serve.refusals import Refused, busy

Rows = NDArray[np.float32]


class Tokens(NamedTuple):
    """One input: token ids, and the segment of each (None: the first)."""

    ids: Sequence[int]
    types: Sequence[int] | None = None


Compute = Callable[[Sequence[Tokens]], Rows]


@dataclass(eq=False)
class Work:
    """One request. taken: inputs that went into batches; missing: inputs without a result."""

    inputs: Sequence[Tokens]
    future: asyncio.Future[Rows]
    parts: list[Rows] = field(default_factory=list)
    taken: int = 0
    missing: int = 0

    def tokens(self) -> int:
        """Tokens that are in no batch yet."""
        return sum(len(one.ids) for one in self.inputs[self.taken :])

    def share(self, room: int, alone: bool) -> Iterator[Tokens]:
        """Inputs that fit in `room` tokens, and at least one if the batch is otherwise empty."""
        while self.taken < len(self.inputs):
            one = self.inputs[self.taken]
            if len(one.ids) > room and not alone:
                return
            self.taken += 1
            room, alone = room - len(one.ids), False
            yield one


class Part(NamedTuple):
    """So many inputs of a batch belong to a request."""

    work: Work
    inputs: int


class Batcher(LoopThread):
    """compute: rows (inputs, outputs) of a batch, called by one thread, that of this object, which ends when nothing
    waits any more.

    batch_tokens: of a batch, unless one input is longer. queue_tokens: that may wait. observe: told of the inputs and
    tokens of every batch.
    """

    def __init__(
        self,
        compute: Compute,
        *,
        batch_tokens: int,
        queue_tokens: int,
        observe: Callable[[int, int], object] = lambda inputs, tokens: None,
    ) -> None:
        super().__init__("fastff-batches")
        self._compute, self._observe = compute, observe
        self._batch_tokens, self._queue_tokens = batch_tokens, queue_tokens
        self._waiting: deque[Work] = deque()
        self.queued_tokens = 0

    def submit(self, inputs: Sequence[Tokens]) -> asyncio.Future[Rows]:
        """The rows (inputs, outputs), later; cancelling the future takes what is not computed out of the queue.

        Raises Refused (429) where the queue has no room for all of the inputs.
        """
        work = Work(inputs, self._loop.create_future(), missing=len(inputs))
        tokens = work.tokens()
        with self._changed:
            if self.queued_tokens + tokens > self._queue_tokens:
                raise busy(
                    f"{self.queued_tokens} tokens wait, at most {self._queue_tokens} may: no room for {tokens} more; "
                    "try again later"
                )
            self.queued_tokens += tokens
            self._waiting.append(work)
            self._changed.notify()
        return work.future

    def _work(self) -> None:
        while batch := self._next_batch():
            parts, inputs = batch
            rows: Rows | None = None
            error: Exception | None = None
            try:
                rows = self._compute(inputs)
            except Exception as failure:
                error = failure
            self._observe(len(inputs), sum(len(one.ids) for one in inputs))
            self._loop.call_soon_threadsafe(_deliver, parts, rows, error)

    def _next_batch(self) -> tuple[list[Part], list[Tokens]] | None:
        """Waits for work; None when closed and nothing waits."""
        with self._changed:
            while True:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                parts, inputs = self._take()
                if inputs:
                    return parts, inputs
                if self._closed and not self._waiting:
                    return None

    def _take(self) -> tuple[list[Part], list[Tokens]]:
        parts: list[Part] = []
        inputs: list[Tokens] = []
        room = self._batch_tokens
        for _ in range(len(self._waiting)):
            work = self._waiting.popleft()
            if work.future.done():  # its client is gone
                self.queued_tokens -= work.tokens()
                continue
            share = list(work.share(room, alone=not inputs))
            tokens = sum(len(one.ids) for one in share)
            if share:
                parts.append(Part(work, len(share)))
                inputs += share
                room -= tokens
                self.queued_tokens -= tokens
            if work.taken == len(work.inputs):
                continue
            if share:  # others first
                self._waiting.append(work)
            else:
                self._waiting.appendleft(work)
                break
        return parts, inputs


def _deliver(parts: Sequence[Part], rows: Rows | None, error: Exception | None) -> None:
    """In the event loop: give every request its rows."""
    first = 0
    for work, count in parts:
        own = None if rows is None else rows[first : first + count]
        first += count
        if work.future.done():
            continue
        if own is None:
            work.future.set_exception(_as_refusal(error))
            continue
        work.parts.append(own)
        work.missing -= count
        if work.missing == 0:
            work.future.set_result(own if len(work.parts) == 1 else np.concatenate(work.parts))


def _as_refusal(error: Any) -> Refused:
    return Refused(500, f"the model failed: {type(error).__name__}: {error}", code="model_failed")
