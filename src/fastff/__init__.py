"""fastff: conditional feedforward layers, with kernels for CPU and GPU.

`import fastff` needs torch only: models, training and the GPU kernels are imported when they are used. Its own parts,
and torch with them, are imported at their first use too, so that `fastff --help` need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastff import ops
    from fastff.conditional import ConditionalFeedforward
    from fastff.config import TreeConfig
    from fastff.engine.export import export
    from fastff.engine.extension import openvino_extension
    from fastff.errors import BackendUnavailable, CheckpointError, FastffError, ShapeError
    from fastff.files import load, save
    from fastff.layers import FFF
    from fastff.routers import FlatRouter, ProductKeyRouter, TreeRouter

__version__ = "0.1.0"
__all__ = [
    "FFF",
    "BackendUnavailable",
    "CheckpointError",
    "ConditionalFeedforward",
    "FastffError",
    "FlatRouter",
    "ProductKeyRouter",
    "ShapeError",
    "TreeConfig",
    "TreeRouter",
    "export",
    "load",
    "openvino_extension",
    "ops",
    "save",
]
_HOMES = {
    "FFF": "layers",
    "BackendUnavailable": "errors",
    "CheckpointError": "errors",
    "ConditionalFeedforward": "conditional",
    "FastffError": "errors",
    "FlatRouter": "routers",
    "ProductKeyRouter": "routers",
    "ShapeError": "errors",
    "TreeConfig": "config",
    "TreeRouter": "routers",
    "export": "engine.export",
    "load": "files",
    "openvino_extension": "engine.extension",
    "save": "files",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("fastff.ops")
    if name not in _HOMES:
        raise AttributeError(f"module 'fastff' has no attribute {name!r}")
    value = getattr(import_module(f"fastff.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
