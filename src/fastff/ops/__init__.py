"""The conditional feedforward as a function, and the backends that can run it."""

from fastff.ops.interface import available_backends, forward, use_backend
from fastff.ops.reference import Routed

__all__ = ["Routed", "available_backends", "forward", "use_backend"]
