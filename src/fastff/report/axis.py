"""Axes: from values to places in a drawing, and where their ticks are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


def plain(value: float) -> str:
    """A number as an axis shows it: 0.05, 1.2, 16, 1,024."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def si(value: float) -> str:
    """A large number with its prefix: 24k, 4.2M."""
    for limit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{prefix}"
    return f"{value:.3g}"


@dataclass(frozen=True)
class Axis:
    """What an axis shows. low, high: its ends, by default those of the data with room around them. ticks: by default
    round numbers. format: of the numbers beside the ticks."""

    label: str = ""
    log: bool = False
    low: float | None = None
    high: float | None = None
    ticks: Sequence[float] | None = None
    format: Callable[[float], str] = plain
    margin: float = 0.06

    def scale(self, values: Sequence[float], start: float, end: float) -> Scale:
        """The axis of these values, drawn from one place to another. Raises ValueError for values that a logarithmic
        axis cannot show."""
        if self.log and any(value <= 0 for value in values):
            raise ValueError(f"a logarithmic axis cannot show {min(values)}")
        low, high = (min(values), max(values)) if values else (1.0, 2.0)
        first, last = (math.log(low), math.log(high)) if self.log else (low, high)
        room = self.margin * (last - first) if last > first else 0.1 * abs(last) or 1.0
        first, last = first - room, last + room
        if self.low is not None:
            first = math.log(self.low) if self.log else self.low
        if self.high is not None:
            last = math.log(self.high) if self.log else self.high
        return Scale(self, first, last, start, end)


@dataclass(frozen=True)
class Scale:
    """An axis with its ends. first, last: of the values, or of their logarithms; start, end: places in pixels."""

    axis: Axis
    first: float
    last: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The place of a value."""
        where = math.log(value) if self.axis.log else value
        return self.start + (self.end - self.start) * (where - self.first) / (self.last - self.first)

    def ticks(self) -> list[float]:
        """Round numbers within the ends, or those that were asked for."""
        if self.axis.ticks is not None:
            return [tick for tick in self.axis.ticks if self._within(tick)]
        return self._log_ticks() if self.axis.log else self._linear_ticks()

    def _within(self, value: float) -> bool:
        where = math.log(value) if self.axis.log else value
        return self.first - 1e-9 <= where <= self.last + 1e-9

    def _linear_ticks(self) -> list[float]:
        rough = (self.last - self.first) / max(2, abs(self.end - self.start) / 70)
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
        count = range(math.ceil(self.first / step - 1e-9), math.floor(self.last / step + 1e-9) + 1)
        return [round(index * step, 12) for index in count]

    def _log_ticks(self) -> list[float]:
        decades = range(math.floor(self.first / math.log(10)) - 1, math.ceil(self.last / math.log(10)) + 1)
        fits = max(2.0, abs(self.end - self.start) / 45)
        ticks: list[float] = []
        for factors in ((1, 2, 5), (1, 3), (1,)):
            ticks = [t for d in decades for f in factors if self._within(t := f * 10.0**d)]
            if len(ticks) <= fits:
                return ticks
        return ticks
