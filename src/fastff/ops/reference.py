"""The truth: conditional feedforward in pure PyTorch, in the dtype it is given, differentiable by autograd.

Three forms of one layer:
forward         gathers the rows of each path; what every kernel is compared with
forward_masked  computes all neurons and masks (dense cost); the training form of `surrogate="straight_through"`
forward_soft    the 2023 mixture of all leaves with sigmoid decisions

Shapes, for `config` a TreeConfig and rows flattened to one dimension:
x (rows, in_features); weights as `Weights` says.
Source: Belcak & Wattenhofer 2023, arXiv:2308.14711 and arXiv:2311.10770.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastff.config import TreeConfig
from fastff.ops.explanation import Explanation
from fastff.ops.weights import Weights


class Routed(NamedTuple):
    """What a layer computed: y (..., out_features), leaf (..., trees) int64, margin (...).

    margin is the smallest absolute score of the row's decisions, infinity when there was none."""

    y: Tensor
    leaf: Tensor
    margin: Tensor


class Path(NamedTuple):
    """The descent of each row: node (rows, trees, depth) heap indices, score alike, leaf (rows, trees)."""

    node: Tensor
    score: Tensor
    leaf: Tensor


def activate(scores: Tensor, activation: str) -> Tensor:
    """Apply an activation. For swiglu the last dimension holds all gate scores of a leaf, then all value scores."""
    match activation:
        case "gelu":
            return F.gelu(scores)
        case "gelu_tanh":
            return F.gelu(scores, approximate="tanh")
        case "relu":
            return F.relu(scores)
        case "silu":
            return F.silu(scores)
        case "swiglu":
            gate, value = scores.chunk(2, dim=-1)
            return F.silu(gate) * value
        case "abs":
            return scores.abs()
        case _:
            return scores


def descend(x: Tensor, w_in: Tensor, b_in: Tensor | None, *, config: TreeConfig) -> Path:
    """Walk every row from root to leaf. A score above zero turns right; zero, negative and NaN turn left."""
    tree = torch.arange(config.trees, device=x.device)
    node = torch.zeros(x.shape[0], config.trees, dtype=torch.int64, device=x.device)
    nodes: list[Tensor] = []
    scores: list[Tensor] = []
    for _ in range(config.depth):
        score = torch.einsum("ri,rti->rt", x, w_in[tree, node])
        if b_in is not None:
            score = score + b_in[tree, node]
        nodes.append(node)
        scores.append(score)
        node = 2 * node + 1 + (score > 0).to(node.dtype)
    leaf = node - config.nodes
    if not nodes:
        return Path(node.new_empty(*node.shape, 0), x.new_empty(*node.shape, 0), leaf)
    return Path(torch.stack(nodes, -1), torch.stack(scores, -1), leaf)


def gate_of(score: Tensor, tau: float) -> Tensor:
    """The gate of each score alone. tau counts as a normal number at least, so that a score of 0 has gate 0."""
    return torch.tanh(score.abs() / max(tau, torch.finfo(score.dtype).tiny))


def least(above: Tensor, own: Tensor) -> Tensor:
    """The smaller of the gate above a node and its own; NaN, once in, stays. Of equals the upper has the gradient."""
    return torch.where((own < above) | own.isnan(), own, above)


def gates(score: Tensor, *, config: TreeConfig) -> Tensor:
    """Factor on each level, root first and leaf last: (..., levels) from path scores (..., depth)."""
    ones = torch.ones_like(score[..., :1]) if config.depth else score.new_ones(*score.shape[:-1], 1)
    if config.gate is None:
        return ones.expand(*score.shape[:-1], config.levels)
    own = gate_of(score, config.tau).unbind(-1)
    passed = accumulate(own, least if config.gate == "boundary_min" else torch.mul)  # of operators that exporters know
    return torch.stack((ones.squeeze(-1), *passed), dim=-1)


def margin_of(score: Tensor) -> Tensor:
    """(rows,) smallest absolute score of a row's decisions; infinity at depth 0."""
    flat = score.detach().abs().flatten(1)
    if flat.shape[1] == 0:
        return flat.new_full((flat.shape[0],), float("inf"))
    return flat.amin(dim=1)


def forward(x: Tensor, weights: Weights, *, config: TreeConfig) -> Routed:
    """Compute the neurons of each row's path only, by gathering their weights. Shapes as in the module's docstring."""
    if config.depth == 0:  # every row takes every neuron: a dense layer, best left to matrix products
        return forward_masked(x, weights, config=config)
    w_in, b_in, w_out, b_out = weights
    tree = torch.arange(config.trees, device=x.device)
    path = descend(x, w_in, b_in, config=config)
    gate = gates(path.score, config=config)

    leaf_rows = path.leaf.unsqueeze(-1) * config.leaf_in_rows + torch.arange(config.leaf_in_rows, device=x.device)
    leaf_rows = leaf_rows + config.nodes
    leaf_score = torch.einsum("ri,rtni->rtn", x, w_in[tree[:, None], leaf_rows])
    if b_in is not None:
        leaf_score = leaf_score + b_in[tree[:, None], leaf_rows]
    value = gate[..., -1:] * activate(leaf_score, config.activation)

    first = config.nodes if config.node_output else 0
    out_rows = path.leaf.unsqueeze(-1) * config.leaf_width + torch.arange(config.leaf_width, device=x.device) + first
    if config.node_output:
        value = torch.cat((gate[..., :-1] * activate(path.score, config.activation), value), -1)
        out_rows = torch.cat((path.node, out_rows), -1)
    y = torch.einsum("rtn,rtno->ro", value, w_out[tree[:, None], out_rows])
    if b_out is not None:
        y = y + torch.einsum("rt,rto->ro", gate[..., -1], b_out[tree, path.leaf])
    return Routed(y, path.leaf, margin_of(path.score))


def explain(config: TreeConfig, rows: int) -> Explanation:
    """Which of the forms above `forward` takes."""
    if config.depth == 0:
        form, reason = "dense", "depth 0: every row takes every neuron, which matrix products do best"
    else:
        form, reason = "gather", "pure PyTorch gathers the weights of each row's path: the truth, not the fastest form"
    return Explanation("reference", form, reason, {"rows": rows, "active_neurons": config.active_neurons})


def forward_masked(
    x: Tensor,
    weights: Weights,
    *,
    config: TreeConfig,
    straight_through: bool = False,
) -> Routed:
    """The same function by dense products and a mask: all scores are computed, those off the path count nothing.

    straight_through differentiates every decision as if it were the sigmoid of its score; the output is unchanged.
    """
    w_in, b_in, w_out, b_out = weights
    scores = torch.einsum("ri,tni->rtn", x, w_in)
    if b_in is not None:
        scores = scores + b_in
    node_score, leaf_score = scores[..., : config.nodes], scores[..., config.nodes :]
    reach, weight, on_path = _reach(node_score, config, straight_through)

    leaf_score = leaf_score.unflatten(-1, (config.leaves, config.leaf_in_rows))
    leaf_value = activate(leaf_score, config.activation) * weight[-1].unsqueeze(-1)
    value = _keep(leaf_value, reach[-1].unsqueeze(-1), straight_through).flatten(-2)
    if config.node_output and config.depth:
        node_value = activate(node_score, config.activation) * torch.cat(weight[:-1], -1)
        value = torch.cat((_keep(node_value, torch.cat(reach[:-1], -1), straight_through), value), -1)
    y = torch.einsum("rtn,tno->ro", value, w_out)
    if b_out is not None:
        y = y + torch.einsum("rtl,tlo->ro", _keep(weight[-1], reach[-1], straight_through), b_out)
    leaf = reach[-1].detach().argmax(-1)
    return Routed(y, leaf, margin_of(on_path))


def _reach(node_score: Tensor, config: TreeConfig, straight_through: bool) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Per level: whether a row reaches each node (0 or 1), its gate; and its path's scores (rows, trees, depth)."""
    ones = node_score.new_ones(*node_score.shape[:2], 1)
    reach, gate, on_path = [ones], [ones], []
    for level in range(config.depth):
        score = node_score[..., 2**level - 1 : 2 ** (level + 1) - 1]
        right = (score > 0).to(score.dtype)
        on_path.append(torch.where(reach[-1].detach() > 0.5, score, 0).sum(-1))
        if straight_through:
            soft = torch.sigmoid(score)
            right = right + soft - soft.detach()
        reach.append(_interleave(reach[-1] * (1 - right), reach[-1] * right))
        below = gate[-1]
        if config.gate is not None:
            own = gate_of(score, config.tau)
            below = least(below, own) if config.gate == "boundary_min" else below * own
        gate.append(_interleave(below, below))
    return reach, gate, torch.stack(on_path, -1) if on_path else node_score.new_empty(*node_score.shape[:2], 0)


def _keep(value: Tensor, reach: Tensor, straight_through: bool) -> Tensor:
    # Without a surrogate the mask selects, so that an infinity off the path cannot turn into NaN.
    return value * reach if straight_through else torch.where(reach > 0, value, 0)


def _interleave(left: Tensor, right: Tensor) -> Tensor:
    return torch.stack((left, right), -1).flatten(-2)


class Mixed(NamedTuple):
    """The soft layer: y (rows, out_features), node entropies (trees, nodes) in nats, mixture (rows, trees, leaves)."""

    y: Tensor
    entropy: Tensor
    mixture: Tensor


def forward_soft(
    x: Tensor,
    weights: Weights,
    *,
    config: TreeConfig,
    region_leak: float = 0.0,
) -> Mixed:
    """The 2023 layer in training: every decision is the sigmoid of its score and all leaves are mixed by their weight.

    region_leak is the probability that a node swaps its two sides for a row. entropy is the batch mean of each
    node's Bernoulli entropy, probabilities clamped to [1e-6, 1 - 1e-6]; its mean times a factor is the hardening loss.
    Needs node_output=False. Source: Belcak & Wattenhofer 2023, arXiv:2308.14711.
    """
    w_in, b_in, w_out, b_out = weights
    scores = torch.einsum("ri,tni->rtn", x, w_in)
    if b_in is not None:
        scores = scores + b_in
    node_score, leaf_score = scores[..., : config.nodes], scores[..., config.nodes :]
    right = torch.sigmoid(node_score)
    if region_leak > 0.0:
        swapped = torch.rand_like(right) < region_leak
        right = torch.where(swapped, 1 - right, right)
    mixture = node_score.new_ones(*node_score.shape[:2], 1)
    for level in range(config.depth):
        side = right[..., 2**level - 1 : 2 ** (level + 1) - 1]
        mixture = _interleave(mixture * (1 - side), mixture * side)
    value = activate(leaf_score.unflatten(-1, (config.leaves, config.leaf_in_rows)), config.activation)
    y = torch.einsum("rtn,tno->ro", (value * mixture.unsqueeze(-1)).flatten(-2), w_out)
    if b_out is not None:
        y = y + torch.einsum("rtl,tlo->ro", mixture, b_out)
    return Mixed(y, _bernoulli_entropy(right).mean(0), mixture)


def _bernoulli_entropy(probability: Tensor) -> Tensor:
    low, high = 1e-6, 1 - 1e-6
    p, q = probability.clamp(low, high), (1 - probability).clamp(low, high)
    return -p * p.log() - q * q.log()
