"""The search for faster block sizes, on request: one field of a plan after another, each result compared first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastff.config import TreeConfig
from fastff.errors import BackendUnavailable
from fastff.ops.dense import dense
from fastff.ops.triton_kernels import (
    device_name,
    plan,
    run_backward,
    run_forward,
    tuned,
    why_not,
    why_unavailable,
)
from fastff.ops.triton_kernels.plan import BackwardPlan, GroupedPlan, PerTokenPlan, SpeculativePlan, Tiles
from fastff.ops.triton_kernels.tuned import Direction
from fastff.ops.weights import Weights

AnyPlan = TypeVar("AnyPlan", PerTokenPlan, SpeculativePlan, GroupedPlan, BackwardPlan)
INTERPRETER = "interpreter"  # device name of kernels that run without a device
TimeUs = Callable[[Callable[[], object]], float]  # microseconds of a call

# What tuning tries for each field; features of a row are stepped through in powers of two.
_TRIED: dict[str, tuple[int, ...]] = {
    "ahead": (1, 2, 3, 4),
    "warps": (1, 2, 4, 8, 16),
    "chunk": (256, 512, 1024, 2048, 4096),
}
_TRIED_TILES: dict[str, tuple[int, ...]] = {
    "rows": (16, 32, 64, 128),
    "inner": (32, 64, 128),
    "outer": (32, 64, 128),
    "warps": (4, 8),
    "stages": (2, 3, 4),
}


def tune(
    x: Tensor, weights: Weights, *, config: TreeConfig, time_us: TimeUs, training: bool = False
) -> dict[Direction, tuple[Any, float, float]]:
    """Search faster block sizes for this layer and number of rows, and keep them in the user's cache directory.

    time_us: microseconds of a call. training: the backward's too. A plan whose result differs from the shipped one's by
    more than rounding is not taken. Returns, by direction, the plan and the microseconds after and before.
    Raises BackendUnavailable where the kernels cannot run.
    """
    reason, rows = why_unavailable() or why_not(x, config), x.shape[0]
    if reason is not None:
        raise BackendUnavailable(reason)
    operands = dense(x, *weights)
    shipped: Any = plan.forward_plan(config, rows, x.element_size())
    y, leaf, _, scores = run_forward(shipped, *operands, config=config)
    searched: dict[Direction, tuple[Any, Callable[[Any], Any]]] = {
        "forward": (shipped, lambda chosen: run_forward(chosen, *operands, config=config)[:1])
    }
    if training:
        given = (torch.ones_like(y), *operands, leaf, scores)
        shipped = plan.backward_plan(config, rows, x.element_size())
        searched["backward"] = shipped, lambda chosen: run_backward(chosen, *given, config=config)
    found: dict[Direction, tuple[Any, float, float]] = {}
    for direction, (start, run) in searched.items():
        timed = _Timed(run, run(start), time_us)
        best, least = search(start, timed)
        tuned.keep(direction, config, rows, x.dtype, device_name(x) or INTERPRETER, best)
        found[direction] = best, least, timed.first
    return found


class _Timed:
    """Microseconds of a plan; infinity for one that does not fit the device or gives another result."""

    def __init__(self, run: Callable[[Any], Any], want: tuple[Tensor, ...], time_us: TimeUs) -> None:
        self._run, self._want, self._time_us = run, want, time_us
        self.first = float("inf")  # of the plan that the search starts from

    def __call__(self, chosen: Any) -> float:
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources

        try:
            got = self._run(chosen)
        except (CompilationError, OutOfResources):
            return float("inf")
        # A few rows may round to another leaf; what is wrong is wrong by much more.
        for one, want in zip(got, self._want, strict=True):
            if not (one - want).float().norm() <= 0.05 * want.float().norm():
                return float("inf")
        took = self._time_us(lambda: self._run(chosen))
        if self.first == float("inf"):
            self.first = took
        return took


def search(start: AnyPlan, time_us: Callable[[AnyPlan], float]) -> tuple[AnyPlan, float]:
    """The fastest plan reached by changing one field after another, and its microseconds.

    time_us: infinity for a plan that cannot run or gives another result."""
    best, least = start, time_us(start)
    for change in _changes(start):
        tried = change(best)
        if tried == best:
            continue
        took = time_us(tried)
        if took < least:
            best, least = tried, took
    return best, least


def _changes(start: AnyPlan) -> Iterator[Callable[[AnyPlan], AnyPlan]]:
    """Each sets one field of a plan, or of its tiles, to another value."""
    for field in fields(start):
        value = getattr(start, field.name)
        if isinstance(value, Tiles):
            for part, values in _TRIED_TILES.items():
                if getattr(value, part):  # 0: not used by this kernel
                    yield from (functools.partial(_with_tile, name=field.name, part=part, value=v) for v in values)
        elif field.name.startswith("block_"):
            sizes = (value // 2, value * 2) if value >= 32 else ()
            yield from (functools.partial(replace, **{field.name: size}) for size in sizes)
        else:
            yield from (functools.partial(replace, **{field.name: v}) for v in _TRIED.get(field.name, ()))


def _with_tile(chosen: Any, *, name: str, part: str, value: int) -> Any:
    return replace(chosen, **{name: replace(getattr(chosen, name), **{part: value})})
