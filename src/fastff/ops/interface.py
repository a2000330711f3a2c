"""Checks and dispatch: the one door to every backend.

`forward` validates once and picks a backend. `reference` is differentiated by autograd itself; the kernels sit behind
`registered`, so that they compile, export and train.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastff.config import TreeConfig
from fastff.errors import BackendUnavailable, ShapeError
from fastff.ops import cost, reference
from fastff.ops.backends import forced_backend, kernels, why_unavailable, why_unavailable_cached
from fastff.ops.eager import are_plain, is_autocast, is_differentiated_functionally, is_plain_call
from fastff.ops.reference import Routed
from fastff.ops.registered import forward_differentiable, forward_registered
from fastff.ops.weights import HALF, Weights


def forward(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    config: TreeConfig,
    backend: str | None = None,
    sparse_grad: bool = False,
) -> Routed:
    """Conditional feedforward: only the neurons on each row's path are computed.

    x: (..., in_features); w_in: (trees, in_rows, in_features); b_in: (trees, in_rows) or None;
    w_out: (trees, out_rows, out_features); b_out: (trees, leaves, out_features) or None.
    backend: a name of `available_backends()`, or None to choose by device and dtype.
    sparse_grad: gradients of w_in, w_out and b_out as sparse tensors of the visited rows (native only).
    Returns Routed(y (..., out_features), leaf (..., trees) int64, margin (...)); gradients flow through y.
    Raises ShapeError; BackendUnavailable if `backend` is named and cannot run, or has no sparse gradients.
    Source: Belcak & Wattenhofer 2023, arXiv:2311.10770.
    """
    weights = Weights(w_in, b_in, w_out, b_out)
    check_shapes(x, weights, config)
    if config.paths is not None:
        raise ShapeError(f"forward computes greedy descents, the config has paths={config.paths}: use fastff.FFF")
    name, out_dtype = _named(backend or forced_backend()), x.dtype
    if is_autocast(x):
        out_dtype = torch.get_autocast_dtype(x.device.type)
        x, *cast = autocast(x, *weights)
        weights = Weights(*cast)
    check_dtypes(x, **weights._asdict())
    free, name = name is None, resolve(name, x, config)
    if name == "native" and x.dtype in HALF:  # as autocast does: in fp32, and the result rounded once
        x, weights = x.float(), weights.map(Tensor.float)
    rows = x.reshape(-1, config.in_features)
    if sparse_grad and torch.is_grad_enabled():
        if name != "native":
            raise BackendUnavailable(f"backend {name!r} has no sparse gradients, only 'native': use sparse_grad=False")
        y, leaf, margin = forward_differentiable(rows, weights, config=config, backend=name, sparse=True)
    elif free and name == "native" and _masked_wins(config, rows):
        y, leaf, margin = reference.forward_masked(rows, weights, config=config)
    else:
        y, leaf, margin = _run(rows, weights, config, name)
    lead = x.shape[:-1]
    return Routed(
        y.to(out_dtype).reshape(*lead, config.out_features), leaf.reshape(*lead, config.trees), margin.reshape(lead)
    )


def _named(name: str | None) -> str | None:
    """The backend asked for, the reference where derivatives are taken that only it has."""
    if not is_differentiated_functionally():
        return name
    if name not in (None, "reference"):
        raise BackendUnavailable(
            f"backend {name!r} has no derivatives under torch.func or in forward mode: use torch.autograd, or "
            "backend='reference'"
        )
    return "reference"


def _run(rows: Tensor, weights: Weights, config: TreeConfig, name: str) -> tuple[Tensor, Tensor, Tensor]:
    if name == "reference":
        return reference.forward(rows, weights, config=config)
    if not untouched(rows, *weights):
        return forward_registered(rows, weights, config=config, backend=name)
    if torch.is_grad_enabled():
        return forward_differentiable(rows, weights, config=config, backend=name, sparse=False)
    y, leaf, margin, _ = kernels(name).forward(rows, weights, config=config)
    return y, leaf, margin


def _masked_wins(config: TreeConfig, rows: Tensor) -> bool:
    return not torch.compiler.is_compiling() and cost.masked_wins(config, rows.shape[0], torch.get_num_threads())


def resolve(name: str | None, x: Tensor, config: TreeConfig) -> str:
    """The backend that will run: the one named, or the first kernel that can take this input, or the reference."""
    if name is not None:
        reason = None if why_unavailable_cached(name) is None else why_unavailable(name)
        if reason is None and name != "reference":
            reason = kernels(name).why_not(x, config)
        if reason is not None:
            raise BackendUnavailable(reason)
        return name
    if config.depth == 0:  # a dense layer: torch's matrix products are the fastest form of it
        return "reference"
    candidate = "triton" if x.device.type == "cuda" else "native"
    if why_unavailable_cached(candidate) is None and kernels(candidate).why_not(x, config) is None:
        return candidate
    return "reference"


def check_shapes(x: Tensor, weights: Weights, config: TreeConfig) -> None:
    """Raise ShapeError unless every tensor has the shape that `config` asks for."""
    if x.dim() == 0 or x.shape[-1] != config.in_features:
        seen = "a scalar" if x.dim() == 0 else f"in_features {x.shape[-1]} (shape {tuple(x.shape)})"
        raise ShapeError(f"{seen} does not match in_features {config.in_features}")
    weights.check(config)


def check_dtypes(x: Tensor, **others: Tensor | None) -> None:
    """Raise ShapeError unless all tensors share x's floating dtype and its device."""
    if not x.dtype.is_floating_point:
        raise ShapeError(f"x is {x.dtype}, expected a floating dtype")
    for label, tensor in others.items():
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise ShapeError(f"{label} is {tensor.dtype}, x is {x.dtype}: expected one dtype")
        if tensor.device != x.device:
            raise ShapeError(f"{label} is on {tensor.device}, x is on {x.device}: expected one device")


def autocast(x: Tensor, *weights: Tensor | None) -> tuple[Any, ...]:
    """What the kernels compute with under autocast, x first."""
    # On the CPU the kernels work in fp32 and gain nothing from casting 25 MB of weights down; a GPU's matrix units do.
    dtype = torch.float32 if x.device.type == "cpu" else torch.get_autocast_dtype(x.device.type)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in (x, *weights))


def untouched(*tensors: Tensor | None) -> bool:
    """Whether nothing watches or transforms the call, so that the registered op, which costs the host several times as
    much as the kernels' launches, has nothing to add."""
    return is_plain_call() and are_plain([tensor for tensor in tensors if tensor is not None])
