"""How long calls take: wall-clock time, measured after the device has finished, as a median with quartiles."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

LEAST_ROUNDS = 5  # of every call that is timed, after one that is not


@dataclass(frozen=True)
class Timing:
    """Durations of one call in microseconds, in the order in which they were measured."""

    samples_us: tuple[float, ...]

    @property
    def p25_us(self) -> float:
        return quartiles(self.samples_us)[0]

    @property
    def p50_us(self) -> float:
        return statistics.median(self.samples_us)

    @property
    def p75_us(self) -> float:
        return quartiles(self.samples_us)[2]


def quartiles(samples: Sequence[float]) -> list[float]:
    """First quartile, median and third quartile, in the unit of the samples."""
    return statistics.quantiles(samples, n=4, method="inclusive")


def synchronize(device: torch.device | str) -> None:
    """Wait until a device has done all that it was given; the CPU always has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    device: torch.device | str = "cpu",
    *,
    patience: float = math.inf,
    warming: int = 0,
) -> dict[str, Timing]:
    """Time several calls round by round, so that whatever slows the machine meets all of them.

    Every call runs once before the first round. Rounds go on for `seconds` in total, and for LEAST_ROUNDS at least, or,
    for calls so slow that these take longer than `patience` seconds, for one. warming: untimed runs of a call before
    each timed one, so that the caches hold again what other calls have put out of them.
    """
    for call in calls.values():
        seconds_of(call, device)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begin, rounds = time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < seconds or rounds < (LEAST_ROUNDS if spent < patience else 1):
        for name, call in calls.items():
            for _ in range(warming):
                call()
            samples[name].append(1e6 * seconds_of(call, device))
        rounds += 1
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}
