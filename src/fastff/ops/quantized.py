"""What a layer with quantized weights refuses: learning, and everything but the CPU's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastff.config import Quantization
from fastff.errors import BackendUnavailable
from fastff.ops import backends
from fastff.ops.eager import is_differentiated_functionally


def check_no_learning(quantization: Quantization, x: Tensor, *, training: bool) -> None:
    """Raise RuntimeError where a layer with quantized weights is to learn, or to be differentiated."""
    name = _name(quantization)
    if training:
        raise RuntimeError(f"{name} cannot train: call eval() or quantize(None)")
    if is_differentiated_functionally() or (torch.is_grad_enabled() and x.requires_grad):
        raise RuntimeError(f"no gradient flows through {name}: use no_grad(), or quantize(None) for derivatives")


def check_quantized_call(
    quantization: Quantization, x: Tensor, w_in: Tensor, *, training: bool, backend: str | None
) -> None:
    """As `check_no_learning`; BackendUnavailable where the layer cannot run."""
    check_no_learning(quantization, x, training=training)
    name = _name(quantization)
    backend = backend or backends.forced_backend() or "native"
    reason = backends.why_unavailable_cached("native") if backend == "native" else f"{name} has no {backend!r}"
    if reason is None and not (x.is_cpu and w_in.is_cpu):
        reason = f"{name} runs on the CPU, x is on {x.device} and w_in on {w_in.device}"
    if reason is not None:
        raise BackendUnavailable(reason)


def _name(quantization: Quantization) -> str:
    return f"a layer quantized to {quantization!r}"
