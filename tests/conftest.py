"""Shared by the tests: random layers in one place, and every instruction set in turn."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from torch import Tensor

import fastff
import triton_interpreter
from fastff.ops import native
from fastff.ops.weights import Weights

SANITIZED = "libasan" in os.environ.get(
    "LD_PRELOAD", ""
)  # by `make sanitize`, under which the core is ten times slower


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    triton_interpreter.quicken()

gc.disable()  # until the imports are over, of which little is garbage
INTERPRETER_TEST = "test_the_kernels_under_the_interpreter"
_interpreter = pytest.StashKey[tuple["subprocess.Popen[bytes]", IO[bytes]]]()


LONG = ("test_triton.py", "test_openvino", "test_convert", "test_training", "test_models_converted", "test_train_tiny")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest begin first, so that of several workers none waits for another's at the end."""
    items.sort(key=lambda item: not item.path.name.startswith(LONG))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin the kernels' tests in Triton's interpreter, a fifth of the suite's time, on another core than the rest; the
    test that reports them waits for them. Of several workers the one that gets that test begins them then."""
    gc.freeze()
    gc.enable()
    if "PYTEST_XDIST_WORKER" in os.environ or session.config.option.collectonly:
        return
    if any(item.name == INTERPRETER_TEST for item in session.items):
        _begin_interpreter(session.config)


def _begin_interpreter(config: pytest.Config) -> None:
    here = os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
    if not here and importlib.util.find_spec("triton"):
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            *(str(Path(__file__).with_name(f"test_triton{part}.py")) for part in ("", "_conditional", "_choose")),
        ]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        said = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the session ends
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
        config.stash[_interpreter] = process, said


def pytest_unconfigure(config: pytest.Config) -> None:
    if _interpreter in config.stash:
        process, said = config.stash[_interpreter]
        process.kill()
        process.wait()
        said.close()


@pytest.fixture
def interpreted(pytestconfig: pytest.Config) -> tuple[int, str]:
    """Exit code and output of the kernels' tests in Triton's interpreter; skips where there is no Triton."""
    if _interpreter not in pytestconfig.stash:
        _begin_interpreter(pytestconfig)
    if _interpreter not in pytestconfig.stash:
        pytest.skip("the kernels need the package triton")
    process, said = pytestconfig.stash[_interpreter]
    code = process.wait()
    said.seek(0)
    return code, said.read().decode(errors="replace")


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


def weights_of(layer: fastff.FFF) -> Weights:
    return Weights(layer.w_in, layer.b_in, layer.w_out, layer.b_out)


def supported_isas(dots: bool = False, tiles: bool = False) -> list[str]:
    """The instruction sets that this CPU has; with dots also those that differ in products of short numbers alone, with
    tiles those that differ in products of whole tiles."""
    names = []
    before = native.isa()
    for name in ("scalar", "avx2", "avx512", "neon", *(("avx512dot",) if dots else ()), *(("amx",) if tiles else ())):
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


@pytest.fixture(params=supported_isas(dots=True))
def dot_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """As isa, for kernels that have a form for products of short numbers."""
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@pytest.fixture(params=supported_isas(dots=True, tiles=True))
def tile_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """As dot_isa, for kernels that have a form for tiles."""
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@pytest.fixture(scope="module", autouse=True)
def _old_objects_are_not_garbage() -> None:
    """Full collections, which Accelerate, the compiler and the benchmark ask for, take a second over the objects of
    imported packages: they pass over what was there before a file's tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    """What a test does to torch's number of threads ends with it: it changes the bits of sums."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(params=[2] if SANITIZED else [1, 2])  # of two, one is the caller's: it reads and writes what one would
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
