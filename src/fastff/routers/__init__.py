"""Routers for conditional layers, and the statistics of what they choose."""

from fastff.routers.modules import Chosen, FlatRouter, ProductKeyRouter, Router, TreeRouter, make_router
from fastff.routers.router_config import RouterConfig
from fastff.routers.usage import Usage

__all__ = [
    "Chosen",
    "FlatRouter",
    "ProductKeyRouter",
    "Router",
    "RouterConfig",
    "TreeRouter",
    "Usage",
    "make_router",
]
