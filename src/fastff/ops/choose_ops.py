"""Choosing leaves by one kernel each, as registered ops: for routers whose scores lie on a GPU.

The rule (ties, NaN, the balance) is that of fastff.routers.choose. On the CPU, and without Triton, routers use the
plain form there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastff.ops.backends import why_unavailable_cached
from fastff.ops.eager import is_differentiated_functionally

MOST_SCORES = 4096  # of a row in a tree: a program holds them all
MOST_CHOSEN = 4  # of a row and tree, where one program does all: 3 and 2 gained, 8 of 256 took 1.4 times as long (H200)
MOST_ROUTED = 512  # of them, where the program makes the scores too


def available(score: Tensor, candidates: int) -> bool:
    """Whether the kernels take these scores, of so many candidates in a row and tree."""
    fits = score.device.type == "cuda" and score.dtype == torch.float32 and candidates <= MOST_SCORES
    return fits and why_unavailable_cached("triton") is None


def best(score: Tensor, balance: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """leaf (rows, k) int64, ascending, and load (candidates,) int64, the number of rows that chose each.

    score: (rows, candidates) float32; balance: (candidates,) or None. No gradient: gather the scores of `leaf`.
    """
    leaf, load = torch.ops.fastff.choose_best(score.detach(), balance, k)
    return leaf, load


def beam(score: Tensor, balance: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """leaf (rows, trees, k) int64 within its tree, ascending; the sums of their paths (rows, trees, k), differentiable;
    load (trees, nodes + leaves) int64 in heap order, the number of rows that kept each node.

    score: (rows, trees, nodes) float32, heap order; balance: (trees, nodes + leaves) or None.
    """
    leaf, total, load = torch.ops.fastff.choose_beam(score, balance, k)
    return leaf, total, load


def can_route(x: Tensor, weight: Tensor, candidates: int, k: int) -> bool:
    """Whether `route` takes these rows and this weight, for k of so many candidates in a row and tree."""
    fits = x.device.type == "cuda" and weight.device == x.device and candidates <= MOST_ROUTED and k <= MOST_CHOSEN
    fits = fits and weight.numel() > 0
    known = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return fits and known and not is_differentiated_functionally() and why_unavailable_cached("triton") is None


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, balance: Tensor | None, k: int, *, counted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """leaf (rows, trees * k) int64, ascending, over all trees; gate, normalised, of x's dtype, differentiable; and load
    as of `best` or `beam`, empty unless `counted`. Scores, which are sums in float32, are not rounded in between.

    x: (rows, in_features); weight: (leaves, in_features), or (trees, nodes, in_features) for the best leaves of trees;
    bias: of its shape without in_features, or None; balance: as of `best` or `beam`.
    """
    leaf, gate, _, load = torch.ops.fastff.route(x, weight, bias, balance, k, counted)
    return leaf, gate, load


torch.library.define(
    "fastff::route",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? balance, int k, bool counted)"
    " -> (Tensor leaf, Tensor gate, Tensor chosen, Tensor load)",
)
torch.library.define(
    "fastff::route_backward",
    "(Tensor grad_gate, Tensor x, Tensor weight, Tensor leaf, Tensor chosen, bool biased)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
)
torch.library.define("fastff::choose_best", "(Tensor score, Tensor? balance, int k) -> (Tensor leaf, Tensor load)")
torch.library.define(
    "fastff::choose_beam", "(Tensor score, Tensor? balance, int k) -> (Tensor leaf, Tensor total, Tensor load)"
)
torch.library.define("fastff::choose_beam_backward", "(Tensor grad, Tensor leaf, int nodes) -> Tensor")


def _best_impl(score: Tensor, balance: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    from fastff.ops.triton_kernels import choose_kernels

    return choose_kernels.best(score, balance, k)


def _best_fake(score: Tensor, balance: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    return score.new_empty(score.shape[0], k, dtype=torch.int64), score.new_empty(score.shape[1], dtype=torch.int64)


def _beam_impl(score: Tensor, balance: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    from fastff.ops.triton_kernels import choose_kernels

    return choose_kernels.beam(score, balance, k)


def _beam_fake(score: Tensor, balance: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, trees, nodes = score.shape
    leaf = score.new_empty(rows, trees, k, dtype=torch.int64)
    return leaf, score.new_empty(rows, trees, k), score.new_empty(trees, 2 * nodes + 1, dtype=torch.int64)


def _beam_backward_impl(grad: Tensor, leaf: Tensor, nodes: int) -> Tensor:
    from fastff.ops.triton_kernels import choose_kernels

    return choose_kernels.beam_backward(grad, leaf, nodes)


def _beam_backward_fake(grad: Tensor, leaf: Tensor, nodes: int) -> Tensor:
    return grad.new_empty(*leaf.shape[:2], nodes)


def _keep_leaf(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    leaf, _, load = output
    ctx.mark_non_differentiable(leaf, load)
    ctx.save_for_backward(leaf)
    ctx.nodes = inputs[0].shape[2]


def _pull_back(ctx: Any, _: Any, grad: Tensor, __: Any) -> tuple[Any, ...]:
    return torch.ops.fastff.choose_beam_backward(grad, ctx.saved_tensors[0], ctx.nodes), None, None


def _route_impl(*inputs: Any) -> tuple[Tensor, ...]:
    from fastff.ops.triton_kernels import router_kernels

    return router_kernels.route(*inputs)


def _route_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, balance: Tensor | None, k: int, counted: bool
) -> tuple[Tensor, ...]:
    trees, columns = (weight.shape[0], weight.shape[1]) if weight.dim() == 3 else (1, weight.shape[0])
    load = (0,) if not counted else (trees, 2 * columns + 1) if weight.dim() == 3 else (columns,)
    chosen = (x.shape[0], trees * k)
    return (
        x.new_empty(chosen, dtype=torch.int64),
        x.new_empty(chosen),
        x.new_empty(chosen, dtype=torch.float32),
        x.new_empty(load, dtype=torch.int64),
    )


def _route_backward_impl(*inputs: Any) -> tuple[Tensor, ...]:
    from fastff.ops.triton_kernels import router_kernels

    return router_kernels.route_backward(*inputs)


def _route_backward_fake(
    grad_gate: Tensor, x: Tensor, weight: Tensor, leaf: Tensor, chosen: Tensor, biased: bool
) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), x.new_empty(weight.shape), x.new_empty(weight.shape[:-1] if biased else (0,))


def _keep_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    leaf, _, chosen, load = output
    ctx.mark_non_differentiable(leaf, chosen, load)
    ctx.save_for_backward(inputs[0], inputs[1], leaf, chosen)
    ctx.biased = inputs[2] is not None


def _pull_route(ctx: Any, _: Any, grad_gate: Tensor, *__: Any) -> tuple[Any, ...]:
    grads = torch.ops.fastff.route_backward(grad_gate, *ctx.saved_tensors, ctx.biased)
    return grads[0], grads[1], grads[2] if ctx.biased else None, None, None, None


def _no_second_derivative(ctx: Any, *_: Any) -> tuple[Any, ...]:
    raise RuntimeError("the kernels of routers have first derivatives only: use the CPU, or float64")


for _device in ("CPU", "CUDA"):  # the CPU for Triton's interpreter
    torch.library.impl("fastff::route", _device, _route_impl)
    torch.library.impl("fastff::route_backward", _device, _route_backward_impl)
    torch.library.impl("fastff::choose_best", _device, _best_impl)
    torch.library.impl("fastff::choose_beam", _device, _beam_impl)
    torch.library.impl("fastff::choose_beam_backward", _device, _beam_backward_impl)
torch.library.register_fake("fastff::route", _route_fake)
torch.library.register_fake("fastff::route_backward", _route_backward_fake)
torch.library.register_autograd("fastff::route", _pull_route, setup_context=_keep_route)
torch.library.register_autograd("fastff::route_backward", _no_second_derivative)
torch.library.register_fake("fastff::choose_best", _best_fake)
torch.library.register_fake("fastff::choose_beam", _beam_fake)
torch.library.register_fake("fastff::choose_beam_backward", _beam_backward_fake)
torch.library.register_autograd("fastff::choose_beam", _pull_back, setup_context=_keep_leaf)
