"""Shared by the tests: random layers in one place, and every instruction set in turn."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastff
from fastff.ops import native

SANITIZED = "libasan" in os.environ.get(
    "LD_PRELOAD", ""
)  # by `make sanitize`, under which the core is ten times slower


def make_layer(in_features: int, out_features: int | None = None, *, seed: int = 0, **options: Any) -> fastff.FFF:
    """A layer whose weights and biases are all random: scores and outputs of order one."""
    generator = torch.Generator().manual_seed(seed)
    layer = fastff.FFF(in_features, out_features, **options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            scale = 1.0 if name.startswith("b_") else parameter.shape[-1] ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def make_rows(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weights_of(layer: fastff.FFF) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    return layer.w_in, layer.b_in, layer.w_out, layer.b_out


def supported_isas() -> list[str]:
    names = []
    before = native.isa()
    for name in ("scalar", "avx2", "avx512", "neon"):
        try:
            native.set_isa(name)
            names.append(name)
        except fastff.BackendUnavailable:
            continue
    native.set_isa(before)
    return names


@pytest.fixture(params=supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set that this CPU has."""
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    """What a test does to torch's number of threads ends with it: it changes the bits of sums."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
