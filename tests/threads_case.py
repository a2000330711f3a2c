"""Sixteen threads evaluate a layer while one writes its weights."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import torch
from torch import Tensor, nn

READERS = 16
SEEN = 4  # results between two writes: enough that readers meet all weights, while others read in the next write


def check_whole(layer: nn.Module, x: Tensor, whole: list[Tensor], writes: Iterable[Callable[[], object]]) -> None:
    """Every result of layer(x) during the writes is one of `whole`, and each of these was seen."""
    done = Event()
    seen = [[0] * (len(whole) + 1) for _ in range(READERS)]  # how often each; the last: none of them

    def read(counts: list[int]) -> None:
        with torch.no_grad():
            while not done.is_set():
                y = layer(x)
                counts[next((i for i, w in enumerate(whole) if torch.equal(y, w)), -1)] += 1

    def results() -> int:
        return sum(map(sum, seen))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(READERS) as pool:
            readers = [pool.submit(read, counts) for counts in seen]
            try:
                for write in writes:
                    write()
                    before = results()
                    while results() < before + SEEN and not any(reader.done() for reader in readers):
                        time.sleep(0)
            finally:
                done.set()
            for reader in readers:
                reader.result()
    finally:
        sys.setswitchinterval(interval)
    *counts, mixed = (sum(column) for column in zip(*seen, strict=True))
    assert mixed == 0, "results belong to none of the weights"
    assert min(counts) > 0, "all weights must have been seen"
