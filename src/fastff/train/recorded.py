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
        self._grads: dict[nn.Parameter, Tensor] = {}  # what the recorded work makes, in memory of its own
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
            return self._run(batch, count)
        earlier = self._earlier()
        if self._again is None:
            self._batch = {name: part.clone() for name, part in batch.items()}
            self._count = None if count is None else count.clone()
            self._again = self._record(self._work)
        for name, part in batch.items():
            self._batch[name].copy_(part)
        if self._count is not None and count is not None:
            self._count.copy_(count)
        self._again()
        self._add(earlier)
        assert self._loss is not None
        return self._loss.clone()

    def _work(self) -> None:
        """Gradients are made, not added to: zeros need not be written, nor read."""
        for parameter in self._parameters:
            parameter.grad = None
        self._loss = self._run(self._batch, self._count)
        self._grads = {p: p.grad for p in self._parameters if p.grad is not None}

    def _earlier(self) -> dict[nn.Parameter, Tensor]:
        """The gradients so far, where the recorded work does not write."""
        return {
            p: p.grad.clone() if p.grad is self._grads.get(p) else p.grad
            for p in self._parameters
            if p.grad is not None
        }

    @torch.no_grad()
    def _add(self, earlier: dict[nn.Parameter, Tensor]) -> None:
        """Make the gradients those of the recorded work and, of a step's earlier micro-batches, these."""
        for parameter in self._parameters:
            parameter.grad = self._grads.get(parameter, earlier.get(parameter))
        both = [parameter for parameter in earlier if parameter in self._grads]
        if both:
            torch._foreach_add_([self._grads[p] for p in both], [earlier[p] for p in both])


def on_gpu(work: Callable[[], None]) -> Callable[[], object]:
    """Record what `work` launches on the current device; the result launches it again, on the current stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    # Of this thread's calls alone: another one may pin memory at the same time.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph.replay
