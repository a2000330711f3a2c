"""Outputs and gradients against float64, before anything is timed."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from fastff.bench.gpu_cases import Cell
from fastff.bench.gpu_device import Device
from fastff.bench.gpu_providers import Layer, call_of, layers_of, routed, rows_of
from fastff.bench.timed_layers import DenseLayer, expected
from fastff.bench.workers import WRONG, Refused
from fastff.bench.workloads import features_of

LIMITS = {"fp32": 1e-5, "bf16": 1e-2}  # relative, of norms, over rows that take the same leaves
MOST_CHANGED = 0.1  # of rows that take another leaf than in float64
ROWS, WIDE_ROWS = 512, 64


@dataclass(frozen=True)
class Errors:
    """Relative errors of norms over rows with the same leaves; the share of rows with another leaf in some tree."""

    relative_error: float
    gradient_error: float | None
    changed_leaves: float


def check(cell: Cell, device: Device, seed: int) -> Errors:
    """Compare the first rows. Raises Refused beyond the limits."""
    layer = layers_of(cell, device, seed, 1)[0]
    most, training = WIDE_ROWS if features_of(cell.subject) > 4096 else ROWS, cell.case.training
    # A compiled layer is checked at the size that is timed: another would be compiled for itself.
    x = rows_of(cell, device, seed, None if "compiled" in cell.provider else most)
    first = x.detach()[:most]
    y, same, changed = _run(cell, layer, device, x, first)
    exact = copy.deepcopy(layer).double() if training else layer
    exact_x = first.double().requires_grad_(training)
    want = expected(exact, exact_x).y
    gradient = None
    if training:
        grad = torch.ones_like(want) * same[:, None]
        got_x, *got = torch.autograd.grad(y, [x, *layer.parameters()], grad.to(y.dtype))
        wanted = torch.autograd.grad(want, [exact_x, *exact.parameters()], grad)
        gradient = max(relative(g, w) for g, w in zip([got_x[:most], *got], wanted, strict=True))
    found = Errors(relative(y[same], want[same]), gradient, changed)
    limit = LIMITS[cell.case.dtype]
    if not max(found.relative_error, found.gradient_error or 0.0) < limit or not found.changed_leaves < MOST_CHANGED:
        raise Refused(f"{WRONG} {found} is beyond {limit:.0e}, or leaves beyond {MOST_CHANGED}")
    return found


def _run(cell: Cell, layer: Layer, device: Device, x: Tensor, first: Tensor) -> tuple[Tensor, Tensor, float]:
    """The output of the first rows, those that take float64's leaves, and the share of the others."""
    if isinstance(layer, DenseLayer):
        every = torch.ones(len(first), dtype=torch.bool, device=x.device)
        return call_of(cell, layer, device)(x)[: len(first)], every, 0.0
    got = routed(cell, layer, device)(x)
    with torch.no_grad():
        same = (got.leaf == expected(layer, first).leaf).all(1)
    return got.y, same, 1 - same.double().mean().item()


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())
