"""Choosing leaves by one kernel each, as registered ops: for routers whose scores lie on a GPU.

The rule (ties, NaN, the balance) is that of fastff.routers.choose. On the CPU, and without Triton, routers use the
plain form there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastff.ops.backends import why_unavailable_cached

MOST_SCORES = 4096  # of a row in a tree: a program holds them all


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


for _device in ("CPU", "CUDA"):  # the CPU for Triton's interpreter
    torch.library.impl("fastff::choose_best", _device, _best_impl)
    torch.library.impl("fastff::choose_beam", _device, _beam_impl)
    torch.library.impl("fastff::choose_beam_backward", _device, _beam_backward_impl)
torch.library.register_fake("fastff::choose_best", _best_fake)
torch.library.register_fake("fastff::choose_beam", _beam_fake)
torch.library.register_fake("fastff::choose_beam_backward", _beam_backward_fake)
torch.library.register_autograd("fastff::choose_beam", _pull_back, setup_context=_keep_leaf)
