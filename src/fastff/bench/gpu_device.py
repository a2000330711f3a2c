"""Clocks and counters of a device. `DryRun` has the same words on a CPU, so that every path can run without a GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Protocol

import torch

from fastff.ops.triton_kernels import why_unavailable
from fastff.timing import seconds_of

Run = Callable[[], object]
LEAST_SAMPLES, MOST_SAMPLES = 5, 1000


class Device(Protocol):
    """What a measurement needs. backend: of fastff's layers."""

    name: str
    torch_device: str
    backend: str | None

    def capture(self, run: Run) -> Run:
        """The same work with less cost for each call: a CUDA graph."""
        ...

    def times_us(self, run: Run, seconds: float, *, cold: bool) -> list[float]:
        """Microseconds of calls that take so many seconds together. cold: the cache is flushed before each."""
        ...

    def settle(self) -> None:
        """Wait for the device and give memory that is free back to it."""
        ...

    def allocated(self) -> int:
        """Bytes in use."""
        ...

    def peak(self) -> int:
        """The most bytes in use since the last call of this."""
        ...

    def copy_bytes_per_s(self) -> float:
        """Bytes read and written a second by a large copy."""
        ...


class Cuda:
    """The current CUDA device. Raises RuntimeError saying why, where the kernels cannot run."""

    torch_device = "cuda"
    backend: str | None = "triton"

    def __init__(self) -> None:
        reason = why_unavailable()
        if reason is not None or not torch.cuda.is_available():
            raise RuntimeError(reason or "torch sees no CUDA device")
        self.name: str = torch.cuda.get_device_name()
        self._flushed = torch.empty(2**28, dtype=torch.uint8, device="cuda")  # more than any second-level cache

    def capture(self, run: Run) -> Run:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def times_us(self, run: Run, seconds: float, *, cold: bool) -> list[float]:
        run()
        took = seconds_of(run, "cuda") + (1e-4 if cold else 0)
        count = max(LEAST_SAMPLES, min(MOST_SAMPLES, int(seconds / took)))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for before, after in events:
            if cold:
                self._flushed.zero_()
            before.record()
            run()
            after.record()
        torch.cuda.synchronize()
        return [1e3 * before.elapsed_time(after) for before, after in events]

    def settle(self) -> None:
        gc.collect()  # compiled functions and graphs hold each other
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def allocated(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        found = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return found

    def copy_bytes_per_s(self) -> float:
        source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
        target = torch.empty_like(source)
        return 2e6 * source.numel() / min(self.times_us(lambda: target.copy_(source), 0.2, cold=False))


class DryRun:
    """The CPU in place of a GPU: times mean nothing, and memory is not counted."""

    name, torch_device = "cpu (dry run)", "cpu"
    backend: str | None = None

    def capture(self, run: Run) -> Run:
        return run

    def times_us(self, run: Run, seconds: float, *, cold: bool) -> list[float]:
        return [1e6 * seconds_of(run) for _ in range(LEAST_SAMPLES)]

    def settle(self) -> None:
        return

    def allocated(self) -> int:
        return 0

    def peak(self) -> int:
        return 0

    def copy_bytes_per_s(self) -> float:
        return 1e9
