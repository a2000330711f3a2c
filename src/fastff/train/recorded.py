"""Forward and backward of a micro-batch as one CUDA graph: the host launches one thing instead of a thousand.

Clipping and the optimiser stay outside. They are some twenty launches, which the host queues while the graph still
runs, and so learning rates, checkpoints and hooks on the optimiser work as they always do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fastff.text.batches import Batch

WARMUP_CALLS = 3  # calls that run as ever: kernels are compiled and buffers made in them
Run = Callable[[Batch, Tensor | None], Tensor]
Record = Callable[[Callable[[], None]], Callable[[], object]]


class RecordedStep:
    """`run`, which takes a micro-batch and perhaps a number of tokens to a loss and adds gradients to `parameters`.

    rows: only micro-batches of so many are recorded, after WARMUP_CALLS of them; others run as ever.
    record: makes of work what does it again; `on_gpu`, or something simpler in a test.
    Gradients may be set to None or to zero between the steps, as an optimiser likes it.
    """

    def __init__(self, run: Run, parameters: Iterable[nn.Parameter], rows: int, record: Record) -> None:
        self._run, self._rows, self._record = run, rows, record
        self._parameters = list(parameters)
        self._seen = 0
        self._grads: dict[nn.Parameter, Tensor] = {}  # where the recorded work adds to
        self._batch: Batch = {}  # what it reads
        self._count: Tensor | None = None
        self._loss: Tensor | None = None
        self._again: Callable[[], object] | None = None

    def __call__(self, batch: Batch, count: Tensor | None) -> Tensor:
        """The loss, detached; its memory is the caller's."""
        if next(iter(batch.values())).shape[0] != self._rows:
            return self._run(batch, count)
        if self._again is None and self._seen < WARMUP_CALLS:
            self._seen += 1
            loss = self._run(batch, count)
            # What no loss depends on has no gradient, and must not get one of zeros: it would decay.
            self._grads |= {p: torch.empty_like(p) for p in self._parameters if p.grad is not None}
            return loss
        self._attach()
        if self._again is None:
            self._batch = {name: part.clone() for name, part in batch.items()}
            self._count = None if count is None else count.clone()
            self._again = self._record(self._work)
        for name, part in batch.items():
            self._batch[name].copy_(part)
        if self._count is not None and count is not None:
            self._count.copy_(count)
        self._again()
        assert self._loss is not None
        return self._loss.clone()

    def _work(self) -> None:
        self._loss = self._run(self._batch, self._count)

    @torch.no_grad()
    def _attach(self) -> None:
        """Make the gradients so far, or zeros, those that the recorded work adds to."""
        empty = [grad for parameter, grad in self._grads.items() if parameter.grad is None]
        if empty:
            torch._foreach_zero_(empty)
        for parameter, grad in self._grads.items():
            if parameter.grad is not None and parameter.grad is not grad:
                grad.copy_(parameter.grad)
            parameter.grad = grad


def on_gpu(work: Callable[[], None]) -> Callable[[], object]:
    """Record what `work` launches on the current device; the result launches it again, on the current stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    # Of this thread's calls alone: another one may pin memory at the same time.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph.replay
