"""How a budget is spent: how far training has come, the learning rate there, and the rows of a step."""

from __future__ import annotations

import time
from dataclasses import dataclass

RAMP_START = 1 / 16  # rows of the first step, as a share of the last ones


def triangle(progress: float, warmup: float) -> float:
    """Share of the peak learning rate: up in a straight line until `warmup` of the budget, down to zero at its end."""
    return max(0.0, min(progress / warmup if warmup else 1.0, (1 - progress) / (1 - warmup)))


def rows_at(progress: float, rows: int, ramp: float) -> int:
    """Rows at `progress` in [0, 1]: they grow in a straight line to `rows`, reached at `ramp` of the budget."""
    share = 1.0 if ramp <= 0 else min(1.0, RAMP_START + (1 - RAMP_START) * progress / ramp)
    return max(1, round(rows * share))


@dataclass
class Budget:
    """Steps or seconds, whichever is given; `used` are seconds of training so far, over all continuations.

    A budget of seconds ends training when they are spent, a budget of steps after as many. progress is in [0, 1].
    """

    steps: int | None
    seconds: float | None
    used: float = 0.0

    def __post_init__(self) -> None:
        self.clock = time.monotonic()

    def tick(self) -> None:
        """Count the time since the last tick as used."""
        now = time.monotonic()
        self.used += now - self.clock
        self.clock = now

    def progress(self, step: int) -> float:
        """How much of the budget is spent in step number `step`, from 0: of steps, neither none in the first nor all in
        the last, so that every step learns."""
        spent = self.used / self.seconds if self.seconds else (step + 1) / ((self.steps or 0) + 1)
        return min(1.0, spent)

    def spent(self, step: int) -> bool:
        """Whether training is over after `step` steps."""
        return self.used >= self.seconds if self.seconds else step >= (self.steps or 0)
