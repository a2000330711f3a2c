"""fastff: conditional feedforward layers, with kernels for CPU and GPU.

`import fastff` needs torch only: models, training and the GPU kernels are imported when they are used.
"""

from fastff import ops
from fastff.conditional import ConditionalFeedforward
from fastff.config import TreeConfig
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
    "load",
    "ops",
    "save",
]
