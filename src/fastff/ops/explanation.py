"""What a backend would do with a call, and why: the answer of `fastff.ops.explain`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Explanation:
    """The choice made for one layer, number of rows and dtype, without running it.

    backend       the backend that would run
    form          the algorithm it would use, by the backend's own name for it
    reason        why this form and not another, in one sentence
    choices       the sizes that come with the form: tiles, levels fetched ahead, threads, ...
    predicted_us  expected microseconds of the whole call; None where the backend has no model of its cost
    dense_us      the same of a dense layer with as many stored neurons; None where that is not modelled
    """

    backend: str
    form: str
    reason: str
    choices: Mapping[str, int | float | str] = field(default_factory=dict)
    predicted_us: float | None = None
    dense_us: float | None = None

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.form}", self.reason]
        lines += [f"  {name} = {value}" for name, value in self.choices.items()]
        predicted = (("predicted", self.predicted_us), ("dense", self.dense_us))
        lines += [f"  {name} {value:.4g} us" for name, value in predicted if value is not None]
        return "\n".join(lines)
