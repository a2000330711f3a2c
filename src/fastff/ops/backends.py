"""Which backends there are, which can run here, and which one a `use_backend` block asks for."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from fastff.errors import BackendUnavailable
from fastff.ops.eager import asked_once

BACKENDS = ("reference", "native", "triton")
_KERNEL_MODULES = {"native": "fastff.ops.native", "triton": "fastff.ops.triton_kernels"}
_modules: dict[str, ModuleType] = {}
_open_blocks: tuple[str, ...] = ()  # backends named by the `use_backend` blocks that are open, innermost last


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine, `reference` first."""
    return tuple(name for name in BACKENDS if why_unavailable(name) is None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every layer of the process on the named backend within the block. Raises BackendUnavailable if it cannot."""
    reason = why_unavailable(name)
    if reason is not None:
        raise BackendUnavailable(reason)
    global _open_blocks
    _open_blocks = (*_open_blocks, name)
    try:
        yield
    finally:
        _open_blocks = _open_blocks[:-1]


def forced_backend() -> str | None:
    """The backend of the innermost `use_backend` block, None outside."""
    return _open_blocks[-1] if _open_blocks else None


def why_unavailable(name: str) -> str | None:
    """The reason why a backend cannot run on this machine, None if it can."""
    if name == "reference":
        return None
    if name not in _KERNEL_MODULES:
        return f"backend {name!r} is not one of {', '.join(BACKENDS)}"
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "backend 'triton' needs the package triton, which is not installed"
    try:
        reason: str | None = kernels(name).why_unavailable()
    except BackendUnavailable as error:
        return str(error)
    return reason


def kernels(name: str) -> ModuleType:
    """The module of a kernel backend: `why_unavailable()`, `why_not(x, config)`, `forward(...)`, `backward(...)`."""
    if name in _modules:  # imported before: torch.compile cannot trace an import
        return _modules[name]
    try:
        return _modules.setdefault(name, importlib.import_module(_KERNEL_MODULES[name]))
    except ModuleNotFoundError as error:
        raise BackendUnavailable(f"backend {name!r} is not part of this build: {error}") from error


_unavailable: dict[str, str | None] = {}


@asked_once
def why_unavailable_cached(name: str) -> str | None:
    """`why_unavailable`, asked once a process."""
    if name not in _unavailable:
        _unavailable[name] = why_unavailable(name)
    return _unavailable[name]
