"""GPU kernels (Triton): conditional feedforward, forward and backward.

Importing this package needs neither Triton nor a device; both are looked for by `why_unavailable`, and the kernels are
imported on first use. With `TRITON_INTERPRET=1` in the environment they run on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastff.config import TreeConfig
from fastff.errors import BackendUnavailable
from fastff.ops.dense import dense
from fastff.ops.explanation import Explanation
from fastff.ops.weights import Weights

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LOWEST_CAPABILITY = (8, 0)  # the first with bf16 matrix units


def why_unavailable() -> str | None:
    """The reason why these kernels cannot run on this machine, None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "backend 'triton' needs the package triton, which is not installed"
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return "backend 'triton' needs an active CUDA device, and torch sees none"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < _LOWEST_CAPABILITY:
        return (
            f"backend 'triton' needs compute capability 8.0 or later, this device has {capability[0]}.{capability[1]}"
        )
    return None


def why_not(x: Tensor, config: TreeConfig) -> str | None:
    """The reason why these kernels cannot take this input, None if they can."""
    reason = why_not_tensor(x)
    if reason is not None:
        return reason
    if config.gate not in (None, "boundary"):
        return f"backend 'triton' has no gate {config.gate!r}"
    return None


def why_not_tensor(x: Tensor) -> str | None:
    """The reason why no kernel here can take this dtype and device, None if they can."""
    if x.dtype not in _DTYPES:
        return _wrong_dtype(x.dtype)
    if x.device.type != "cuda" and not _interpreted():
        return f"backend 'triton' needs tensors on a CUDA device, x is on {x.device}"
    return None


def forward(x: Tensor, weights: Weights, *, config: TreeConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (rows, out_features), leaf (rows, trees) int64, margin (rows,), scores (rows, trees, path_scores).

    Shapes as in ops.reference; all tensors share one dtype and device. Products are summed in float32.
    """
    from fastff.ops.triton_kernels import tuned

    rows_count = x.shape[0]
    if rows_count == 0:
        return (
            x.new_empty(0, config.out_features),
            torch.empty(0, config.trees, dtype=torch.int64, device=x.device),
            x.new_empty(0),
            x.new_empty(0, config.trees, config.path_scores),
        )
    chosen = tuned.forward_plan(config, rows_count, x.dtype, device_name(x))
    return run_forward(chosen, *dense(x, *weights), config=config)


def run_forward(chosen: Any, *operands: Any, config: TreeConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`forward` of contiguous tensors with a given plan."""
    y, leaf, margin, scores = _run(chosen, _forward_with, operands, config)
    return y, leaf, margin, scores


def _forward_with(chosen: Any, operands: tuple[Any, ...], config: TreeConfig) -> tuple[Tensor, ...]:
    from fastff.ops.triton_kernels import grouped, per_token, plan, speculative

    x, weights = operands[0], Weights(*operands[1:])
    if isinstance(chosen, plan.SpeculativePlan):
        return speculative.forward(x, weights, config=config, plan=chosen)
    if isinstance(chosen, plan.PerTokenPlan):
        return per_token.forward(x, weights, config=config, plan=chosen)
    return fitting(chosen, lambda fitted: grouped.forward(x, weights, config=config, plan=fitted))


def backward(
    grad_y: Tensor, x: Tensor, weights: Weights, leaf: Tensor, scores: Tensor, *, config: TreeConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w_in, b_in, w_out, b_out; an empty tensor for an absent bias. Rows not visited get exactly zero.

    Deterministic: sums run in a fixed order, in float32, whatever the dtype.
    """
    from fastff.ops.triton_kernels import tuned

    if x.shape[0] == 0:
        empty = (x.new_empty(0) if t is None else torch.zeros_like(t) for t in (x, *weights))
        gx, gw_in, gb_in, gw_out, gb_out = empty
        return gx, gw_in, gb_in, gw_out, gb_out
    chosen = tuned.backward_plan(config, x.shape[0], x.dtype, device_name(x))
    return run_backward(chosen, *dense(grad_y, x, *weights, leaf, scores), config=config)


def run_backward(chosen: Any, *operands: Any, config: TreeConfig) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`backward` of contiguous tensors with a given plan."""
    grad_x, grad_w_in, grad_b_in, grad_w_out, grad_b_out = _run(chosen, _backward_with, operands, config)
    return grad_x, grad_w_in, grad_b_in, grad_w_out, grad_b_out


def _backward_with(chosen: Any, operands: tuple[Any, ...], config: TreeConfig) -> tuple[Tensor, ...]:
    from fastff.ops.triton_kernels import gradients

    grad_y, x, *weights, leaf, scores = operands
    given = (grad_y, x, Weights(*weights), leaf, scores)
    return fitting(chosen, lambda fitted: gradients.backward(*given, config=config, plan=fitted))


def _run(
    chosen: Any, function: Callable[..., tuple[Tensor, ...]], operands: tuple[Any, ...], config: TreeConfig
) -> tuple[Tensor, ...]:
    """One pass, recorded by all that decides what it allocates and launches."""
    from fastff.ops.triton_kernels.launch import replay
    from fastff.ops.triton_kernels.linear import precision_of

    x = operands[0]
    key = (function, chosen, config, x.shape[0], x.dtype, x.device, precision_of(x.dtype))
    with on_device(x):
        return replay(key, lambda *given: function(chosen, given, config), *operands)


def explain(config: TreeConfig, rows: int, dtype: torch.dtype, threads: int | None) -> Explanation:
    """The kernels and tiles of a call with so many rows; needs no device. `threads` is of no concern here."""
    from fastff.ops.triton_kernels import plan, tuned

    if dtype not in _DTYPES:
        raise BackendUnavailable(_wrong_dtype(dtype))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return plan.explain(config, rows, dtype, tuned.forward_plan(config, rows, dtype, device))


def _wrong_dtype(dtype: torch.dtype) -> str:
    return f"backend 'triton' computes float32, float16 and bfloat16, x is {dtype}"


_Result = TypeVar("_Result")
_fitted: dict[Any, Any] = {}


def fitting(chosen: Any, run: Callable[[Any], _Result]) -> _Result:
    """Run with a plan whose tiles fit this device's shared memory: plans are made for one with 227 KiB a block."""
    from triton.runtime.errors import OutOfResources

    from fastff.ops.triton_kernels.launch import attempt
    from fastff.ops.triton_kernels.plan import smaller

    fitted = _fitted.get(chosen, chosen)
    while True:
        try:
            result = attempt(functools.partial(run, fitted))
        except OutOfResources:
            fitted = smaller(fitted)
            if fitted is None:
                raise
            _fitted[chosen] = fitted
        else:
            return result


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _name_of(index: int) -> str:
    return torch.cuda.get_device_name(index)


def device_name(x: Tensor) -> str | None:
    """Of the tensor's GPU; None on the CPU, where kernels are interpreted."""
    return _name_of(x.device.index) if x.device.type == "cuda" else None


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make that the tensors' own."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
