"""The conditional feedforward as a function, and the backends that can run it."""

from fastff.ops.backends import available_backends, use_backend
from fastff.ops.conditional_interface import conditional_matmul
from fastff.ops.explained import explain
from fastff.ops.explanation import Explanation
from fastff.ops.interface import forward
from fastff.ops.reference import Routed

__all__ = ["Explanation", "Routed", "available_backends", "conditional_matmul", "explain", "forward", "use_backend"]
