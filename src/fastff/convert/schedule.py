"""What changes over the steps of a distillation: from mild to strong sparsity, slower turns, averaged weights."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastff.layers import FFF
from fastff.models.families import family_of
from fastff.models.feedforward import ConvertedFeedforward


class Fade:
    """Within the context, each replaced layer gives `share` of what the teacher's dense layer gives for the same
    input, and the rest of its own; with share 0 nothing is changed or computed."""

    def __init__(self, student: Any, teacher: Any) -> None:
        family = family_of(student.config.model_type)
        pairs = zip(family.blocks_of(student), family.blocks_of(teacher), strict=True)
        self.share = 0.0
        self._layers = [
            (slot, family.dense_of(dense))
            for block, dense in pairs
            if isinstance(slot := family.slot_of(block), ConvertedFeedforward)
        ]
        for _, dense in self._layers:
            dense.requires_grad_(False)
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> None:
        if self.share > 0:
            for slot, dense in self._layers:
                self._hooks.append(slot.register_forward_hook(self._mixer(dense)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _mixer(self, dense: nn.Module) -> Any:
        def mix(_slot: nn.Module, arguments: tuple[Tensor, ...], y: Tensor) -> Tensor:
            mixed: Tensor = torch.lerp(y, dense(arguments[0]), self.share)
            return mixed

        return mix


class SlowTurns:
    """Lets what decides the turns, node rows of w_in and b_in, go only `factor` of the way of each optimiser step.

    Adam's steps do not depend on a gradient's scale, so the way is shortened afterwards."""

    def __init__(self, student: nn.Module, factor: float) -> None:
        self.factor = factor
        layers = [m for m in student.modules() if isinstance(m, FFF) and m.config.depth] if factor != 1.0 else []
        self._rows = [w.detach()[:, : m.config.nodes] for m in layers for w in (m.w_in, m.b_in) if w is not None]
        self._before: list[Tensor] = []

    def remember(self) -> None:
        """Before a step."""
        self._before = [rows.clone() for rows in self._rows]

    def shorten(self) -> None:
        """After it."""
        for rows, before in zip(self._rows, self._before, strict=True):
            rows.copy_(torch.lerp(before, rows, self.factor))


class Average:
    """Exponential average of parameters over steps; its decay rises to `decay`, so that the first steps fade soon."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = [p.detach() for p in parameters], decay
        self._values = [p.clone() for p in self._parameters] if decay else []
        self._count = 0

    @property
    def state(self) -> dict[str, Any]:
        """To go on from after an interruption."""
        return {"values": self._values, "count": self._count}

    def restore(self, state: dict[str, Any]) -> None:
        self._values, self._count = state["values"], state["count"]

    def add(self) -> None:
        """After a step."""
        self._count += 1
        keep = min(self._decay, self._count / (10 + self._count))
        for value, parameter in zip(self._values, self._parameters, strict=bool(self._values)):
            value.lerp_(parameter, 1 - keep)

    def put(self) -> None:
        """Give the parameters their averages, if there are any."""
        for value, parameter in zip(self._values, self._parameters, strict=bool(self._values)):
            parameter.copy_(value)
