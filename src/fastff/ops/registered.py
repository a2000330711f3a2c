"""The kernels behind autograd and torch's dispatcher.

Two doors to the same kernels: a function that autograd calls at once, for eager code, and the registered op
`fastff::forward` with its backward `fastff::backward`, for whoever watches or rewrites operations: compilers,
exporters, function transforms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastff.config import TreeConfig
from fastff.ops import reference
from fastff.ops.backends import kernels
from fastff.ops.weights import Weights


class _Kernels(torch.autograd.Function):
    """A backend's kernels called at once, by eager code. sparse: gradients of the visited rows alone, of which compiled
    graphs know nothing: they have no tensors whose size depends on values."""

    @staticmethod
    def forward(
        ctx: Any, config: TreeConfig, backend: str, sparse: bool, x: Tensor, *four: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, leaf, margin, scores = kernels(backend).forward(x, Weights(*four), config=config)
        ctx.mark_non_differentiable(leaf, margin)
        ctx.save_for_backward(x, *four, leaf, scores)
        ctx.chosen = config, backend, sparse
        ctx.set_materialize_grads(False)  # zeros for leaf and margin are launches too
        return y, leaf, margin

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_y is None:
            return (None,) * 8
        config, backend, sparse = ctx.chosen
        x, *four, leaf, scores = ctx.saved_tensors
        weights = Weights(*four)
        if torch.is_grad_enabled():  # create_graph=True
            return None, None, None, *_differentiable_gradients(grad_y, x, weights, config)
        compute = kernels(backend).backward_visited if sparse else kernels(backend).backward
        grads = compute(grad_y, x, weights, leaf, scores, config=config)
        return None, None, None, *_of_given((x, *weights), grads)


def _differentiable_gradients(
    grad_y: Tensor, x: Tensor, weights: Weights, config: TreeConfig
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again, by the reference: kernels give only the first derivative."""
    given = (x, *weights)
    wanted = [tensor for tensor in given if tensor is not None and tensor.requires_grad]
    y = reference.forward(x, weights, config=config).y
    found = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=True, allow_unused=True))
    return tuple(next(found) if tensor is not None and tensor.requires_grad else None for tensor in given)


_apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Kernels.apply


def forward_differentiable(
    x: Tensor, weights: Weights, *, config: TreeConfig, backend: str, sparse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, leaf and margin of plain tensors by a backend's kernels, for autograd. sparse: as for `ops.forward`."""
    return _apply(config, backend, sparse, x, *weights)


def forward_registered(
    x: Tensor, weights: Weights, *, config: TreeConfig, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the registered op, which compilers and other watchers see."""
    y, leaf, margin, _ = torch.ops.fastff.forward(x, *weights, *_flat(config), backend)
    return y, leaf, margin


def _of_given(given: tuple[Tensor | None, ...], grads: tuple[Any, ...]) -> tuple[Any, ...]:
    """The gradients, None for an absent bias, whose gradient the kernels give as an empty tensor."""
    return tuple(None if tensor is None else grad for tensor, grad in zip(given, grads, strict=True))


# The registered op. A schema carries no dataclass, so a config travels as its fields, in this order.
_FIELDS = ("depth", "trees", "leaf_width", "node_output", "activation", "gate", "tau")
_CONFIG_SCHEMA = "int depth, int trees, int leaf_width, bool node_output, str activation, str gate, float tau"
_WEIGHTS_SCHEMA = "Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out"

torch.library.define(
    "fastff::forward",
    f"(Tensor x, {_WEIGHTS_SCHEMA}, {_CONFIG_SCHEMA}, str backend)"
    " -> (Tensor y, Tensor leaf, Tensor margin, Tensor scores)",
)
torch.library.define(
    "fastff::backward",
    f"(Tensor grad_y, Tensor x, {_WEIGHTS_SCHEMA}, Tensor leaf, Tensor scores, {_CONFIG_SCHEMA}, str backend)"
    " -> (Tensor grad_x, Tensor grad_w_in, Tensor grad_b_in, Tensor grad_w_out, Tensor grad_b_out)",
)


def _flat(config: TreeConfig) -> tuple[Any, ...]:
    return tuple(getattr(config, name) or "" if name == "gate" else getattr(config, name) for name in _FIELDS)


def _config(x: Tensor, weights: Weights, flat: tuple[Any, ...]) -> TreeConfig:
    fields = dict(zip(_FIELDS, flat, strict=True))
    fields["gate"] = fields["gate"] or None
    out_features, bias = weights.w_out.shape[-1], weights.b_in is not None
    return TreeConfig(in_features=x.shape[-1], out_features=out_features, bias=bias, **fields)


def _forward_impl(x: Tensor, *four_flat_and_backend: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *arguments, backend = four_flat_and_backend
    weights = Weights(*arguments[:4])
    config = _config(x, weights, tuple(arguments[4:]))
    result: tuple[Tensor, Tensor, Tensor, Tensor] = kernels(backend).forward(x, weights, config=config)
    return result


def _backward_impl(grad_y: Tensor, x: Tensor, *four_saved_flat_and_backend: Any) -> tuple[Tensor, ...]:
    *arguments, backend = four_saved_flat_and_backend
    weights, (leaf, scores) = Weights(*arguments[:4]), arguments[4:6]
    config = _config(x, weights, tuple(arguments[6:]))
    grads: tuple[Tensor, ...] = kernels(backend).backward(grad_y, x, weights, leaf, scores, config=config)
    return grads


def _forward_fake(x: Tensor, *four_flat_and_backend: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights, (depth, trees, leaf_width, _, activation) = Weights(*four_flat_and_backend[:4]), four_flat_and_backend[4:9]
    rows, path_scores = x.shape[0], depth + leaf_width * (2 if activation == "swiglu" else 1)
    return (
        x.new_empty(rows, weights.w_out.shape[-1]),
        x.new_empty(rows, trees, dtype=torch.int64),
        x.new_empty(rows),
        x.new_empty(rows, trees, path_scores),
    )


def _backward_fake(grad_y: Tensor, x: Tensor, *four_and_rest: Any) -> tuple[Tensor, ...]:
    four = four_and_rest[:4]
    return tuple(x.new_empty(0) if tensor is None else x.new_empty(tensor.shape) for tensor in (x, *four))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given, ctx.flat_and_backend = inputs[:5], inputs[5:]
    _, leaf, margin, scores = output
    ctx.mark_non_differentiable(leaf, margin, scores)
    ctx.save_for_backward(*given, leaf, scores)


def _autograd_backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Any, ...]:
    grads = torch.ops.fastff.backward(grad_y, *ctx.saved_tensors, *ctx.flat_and_backend)
    return (*_of_given(ctx.saved_tensors[:5], grads), *(None for _ in ctx.flat_and_backend))


def _no_second_derivative(ctx: Any, *_: Any) -> tuple[Any, ...]:
    raise NotImplementedError(
        "a compiled or traced layer has first derivatives only: for second ones use backend='reference' or eager mode"
    )


for _device in ("CPU", "CUDA"):
    torch.library.impl("fastff::forward", _device, _forward_impl)
    torch.library.impl("fastff::backward", _device, _backward_impl)
torch.library.register_fake("fastff::forward", _forward_fake)
torch.library.register_fake("fastff::backward", _backward_fake)
torch.library.register_autograd("fastff::forward", _autograd_backward, setup_context=_setup_context)
torch.library.register_autograd("fastff::backward", _no_second_derivative)
