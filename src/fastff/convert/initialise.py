"""A feedforward layer from its dense one: decisions from the data, leaves from its neurons, values by ridge.

Each tree gets its own share of the dense neurons. Its nodes split the rows that reach them in halves, along the best of
three directions: the first principal component of the inputs, the line between two means, and the direction of the
inputs that predicts which of the share's neurons are active. A leaf takes the neurons that do most on its rows. Before,
a shared part takes the neurons that do most on all rows. At the end all output weights together are the ridge
regression of the dense outputs on what the new layer computes.

Leaves behind a flat router are groups of the dense neurons as they are (`experts`); a narrow layer has the strongest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastff.conditional import ConditionalFeedforward
from fastff.convert.experts import group_neurons
from fastff.convert.neurons import contribution, dense_forward, hidden_of, neuron_biases, neuron_rows
from fastff.layers import FFF
from fastff.models.families import DenseWeights
from fastff.models.feedforward import ConvertedFeedforward, DenseFeedforward, leaf_values, masked_leaves
from fastff.ops.reference import activate, descend, gates
from fastff.routers import FlatRouter

Chunks = Callable[[], Iterator[tuple[Tensor, Tensor]]]  # (x, residual) pieces of the captured rows
RIDGE = 1e-4  # of the mean diagonal
ROUTING_ROWS = 16384


@torch.no_grad()
def initialise(module: ConvertedFeedforward, dense: DenseWeights, x: Tensor, chunks: Chunks, *, seed: int = 0) -> None:
    """Fill a fresh layer from the dense one. x (rows, hidden): a sample to decide by; chunks: all captured rows."""
    order = contribution(dense, x).sum(0).argsort(descending=True)
    if isinstance(module.layer, FFF):
        if module.layer.config.paths is not None:
            raise TypeError(f"trees with paths={module.layer.config.paths} cannot be initialised from a dense layer")
        always = 0 if module.shared is None else module.shared.neurons
        if module.shared is not None:
            _take_neurons(module.shared, dense, order[:always])
        _initialise_tree(module.layer, dense, x[:ROUTING_ROWS], order[always:].sort().values, seed)
    elif isinstance(module.layer, ConditionalFeedforward):
        _initialise_experts(module, module.layer, dense, x[:ROUTING_ROWS], seed)
    elif isinstance(module.layer, DenseFeedforward):
        _take_neurons(module.layer, dense, order[: module.layer.neurons])
    solve_outputs(module, dense, chunks)


@torch.no_grad()
def prune(module: ConvertedFeedforward, dense: DenseWeights, x: Tensor) -> None:
    """Fill a fresh narrow layer with the dense layer's neurons that do most on the rows x, as they are, or experts with
    all that have a place; what the others gave on average goes into the bias."""
    if isinstance(module.layer, ConditionalFeedforward):
        _initialise_experts(module, module.layer, dense, x[:ROUTING_ROWS], seed=0)
        kept = masked_leaves(module.layer, x)
        given = kept if module.shared is None else kept + module.shared(x)
        module.bias.copy_((dense_forward(dense, x) - given).mean(0))
        return
    if not isinstance(module.layer, DenseFeedforward):
        raise ValueError(f"a {type(module.layer).__name__} cannot be made by leaving neurons out")
    order = contribution(dense, x).sum(0).argsort(descending=True)
    kept = order[: module.layer.neurons]
    _take_neurons(module.layer, dense, kept)
    module.layer.linear_out.weight.copy_(dense.w_out[kept].t())
    module.layer.linear_out.bias.zero_()
    module.bias.copy_((dense_forward(dense, x) - hidden_of(dense, x)[:, kept] @ dense.w_out[kept]).mean(0))


def _initialise_experts(
    module: ConvertedFeedforward, layer: ConditionalFeedforward, dense: DenseWeights, x: Tensor, seed: int
) -> None:
    """Neurons of the dense layer, each in the shared part or in one leaf, and the router that finds their leaves."""
    if not isinstance(layer.router, FlatRouter):
        raise TypeError(f"leaves behind a {type(layer.router).__name__} cannot be initialised from a dense layer")
    config, router = layer.config, layer.router
    sizes = {"shared": 0 if module.shared is None else module.shared.neurons, "leaves": config.leaves}
    groups = group_neurons(dense, x, **sizes, leaf_width=config.leaf_width, chosen=router.k, seed=seed)
    router.weight.copy_(groups.router)
    if module.shared is not None:
        _take_neurons(module.shared, dense, groups.shared)
        module.shared.linear_out.weight.copy_(dense.w_out[groups.shared].t())
    w, v = neuron_rows(dense, groups.leaves, config.activation)
    layer.w_in.copy_(w if v is None else torch.cat((w, v), 1))
    if layer.b_in is not None:
        b, vb = neuron_biases(dense, groups.leaves, config.activation)
        layer.b_in.copy_(b if vb is None else torch.cat((b, vb), 1))
    layer.w_out.copy_(dense.w_out[groups.leaves])


def _take_neurons(layer: DenseFeedforward, dense: DenseWeights, which: Tensor) -> None:
    w, v = neuron_rows(dense, which, layer.activation)
    layer.linear_in.weight.copy_(w if v is None else torch.cat((w, v)))
    b, vb = neuron_biases(dense, which, layer.activation)
    layer.linear_in.bias.copy_(b if vb is None else torch.cat((b, vb)))


def _initialise_tree(layer: FFF, dense: DenseWeights, x: Tensor, neurons: Tensor, seed: int) -> None:
    config = layer.config
    value = contribution(dense, x)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(neurons.numel(), generator=generator).to(x.device)
    shares = neurons[drawn].tensor_split(config.trees)
    b_in = cast(Tensor, layer.b_in)
    layer.w_out.zero_()
    for tree, share in enumerate(shares):
        mine = value[:, share]
        at = [torch.arange(x.shape[0], device=x.device)]
        for level in range(config.depth):
            below: list[Tensor] = []
            for k, rows in enumerate(at):
                node = 2**level - 1 + k
                wanted = min(config.leaf_width * 2 ** (config.depth - level - 1), share.numel())
                direction, offset, right = best_split(x[rows], mine[rows], wanted)
                layer.w_in[tree, node] = direction
                b_in[tree, node] = offset
                below += [rows[~right], rows[right]]
            at = below
        for leaf, rows in enumerate(at):
            strength = mine[rows].sum(0) if rows.numel() else mine.sum(0)
            best = share[strength.topk(config.leaf_width).indices]
            first = config.nodes + leaf * config.leaf_in_rows
            w, v = neuron_rows(dense, best, config.activation)
            b, vb = neuron_biases(dense, best, config.activation)
            layer.w_in[tree, first : first + config.leaf_in_rows] = w if v is None else torch.cat((w, v))
            b_in[tree, first : first + config.leaf_in_rows] = b if vb is None else torch.cat((b, vb))


def best_split(x: Tensor, value: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """The split of x (rows, hidden) into halves after which `wanted` neurons a side keep most of value (rows, neurons).

    Returns the direction and offset, scaled to scores of unit variance, and which rows go right."""
    if x.shape[0] < 4:  # nothing to learn from: any decision will do
        direction = torch.zeros_like(x[0]) if x.shape[0] else x.new_zeros(x.shape[1])
        return direction, x.new_zeros(()), torch.arange(x.shape[0], device=x.device) % 2 == 1
    centred = x - x.mean(0)
    best: tuple[float, Tensor, Tensor] | None = None
    for direction in split_directions(centred, value):
        score = centred @ direction
        right = score > score.median()
        kept = value[right].sum(0).topk(wanted).values.sum() + value[~right].sum(0).topk(wanted).values.sum()
        if best is None or float(kept) > best[0]:
            best = (float(kept), direction, right)
    assert best is not None
    _, direction, right = best
    raw = x @ direction
    direction = direction / raw.std().clamp(min=1e-6)
    raw = x @ direction
    offset = -raw.median()
    return direction, offset, raw + offset > 0


def split_directions(centred: Tensor, value: Tensor) -> list[Tensor]:
    """First principal component of the inputs, the line between two means, the regression of the neurons' values."""
    principal = top_direction(centred)
    side = centred @ principal > 0
    means = principal
    for _ in range(5):
        if bool(side.all()) or not bool(side.any()):
            break
        means = centred[side].mean(0) - centred[~side].mean(0)
        side = centred @ means > 0
    shifted = value - value.mean(0)
    regressed = regress(centred, shifted @ top_direction(shifted))
    return [principal, means, regressed]


def top_direction(centred: Tensor, steps: int = 12) -> Tensor:
    """First right singular vector (columns,) by power iteration."""
    vector = centred.square().sum(0).sqrt() + 1e-6
    for _ in range(steps):
        vector = centred.t() @ (centred @ vector)
        vector = vector / vector.norm().clamp(min=1e-12)
    return vector


def regress(x: Tensor, target: Tensor, steps: int = 12) -> Tensor:
    """Ridge regression (columns,) of target (rows,) on x (rows, columns), by conjugate gradients."""
    damping = RIDGE * x.square().sum() / x.shape[1] * 100
    solution = torch.zeros(x.shape[1], device=x.device, dtype=x.dtype)
    residual = x.t() @ target
    step = residual.clone()
    norm = residual.dot(residual)
    for _ in range(steps):
        along = x.t() @ (x @ step) + damping * step
        length = norm / step.dot(along).clamp(min=1e-20)
        solution = solution + length * step
        residual = residual - length * along
        new = residual.dot(residual)
        step = residual + new / norm.clamp(min=1e-20) * step
        norm = new
    return solution


def features(module: ConvertedFeedforward, x: Tensor) -> Tensor:
    """What the layer's output is linear in (rows, features): neuron values, those of the shared part, and a column of
    ones for the bias."""
    ones = x.new_ones(x.shape[0], 1)
    if module.layer is None:
        return ones
    if isinstance(module.layer, DenseFeedforward):
        return torch.cat((module.layer.values(x), ones), 1)
    beside = () if module.shared is None else (module.shared.values(x),)
    if isinstance(module.layer, ConditionalFeedforward):
        return torch.cat((_chosen_values(module.layer, x), *beside, ones), 1)
    return torch.cat((_tree_values(module.layer, x), *beside, ones), 1)


def _chosen_values(layer: ConditionalFeedforward, x: Tensor) -> Tensor:
    """Of all leaves (rows, neurons), zeros where a row does not take a leaf."""
    leaf, gate = layer.router.eval()(x)
    return leaf_values(layer, x, x.new_zeros(len(x), layer.config.leaves).scatter(1, leaf.long(), gate))


def _tree_values(layer: FFF, x: Tensor) -> Tensor:
    config = layer.config
    path = descend(x, layer.w_in, layer.b_in, config=config)
    gate = gates(path.score, config=config)
    rows, leaves = x.shape[0], layer.w_in[:, config.nodes :]
    scores = torch.einsum("ri,tni->rtn", x, leaves) + cast(Tensor, layer.b_in)[:, config.nodes :]
    scores = scores.unflatten(-1, (config.leaves, config.leaf_in_rows))
    reached = path.leaf[..., None, None].expand(-1, -1, 1, config.leaf_in_rows)
    value = activate(scores.gather(2, reached), config.activation) * gate[..., -1:, None]
    spread = x.new_zeros(rows, config.trees, config.leaves, config.leaf_width)
    spread.scatter_(2, reached[..., : config.leaf_width], value)
    if not config.node_output:
        return spread.flatten(1)
    nodes = x.new_zeros(rows, config.trees, config.nodes)
    nodes.scatter_(2, path.node, activate(path.score, config.activation) * gate[..., :-1])
    return torch.cat((nodes, spread.flatten(2)), -1).flatten(1)


def solve_outputs(module: ConvertedFeedforward, dense: DenseWeights, chunks: Chunks) -> None:
    """Set all output weights and the bias to the ridge regression of the dense outputs, rows weighted by how much the
    norm after the residual magnifies them."""
    gram: Tensor | None = None
    cross: Any = None
    for x, residual in chunks():
        y = dense_forward(dense, x)
        weight = 1 / (residual + y).std(dim=1, keepdim=True).clamp(min=1e-6)
        phi = features(module, x) * weight
        g, c = phi.t() @ phi, phi.t() @ (y * weight)
        gram, cross = (g, c) if gram is None else (gram + g, cross + c)
    if gram is None:
        raise ValueError("no rows to regress on")
    damping = RIDGE * gram.diagonal()[:-1].mean() if gram.shape[0] > 1 else gram.new_zeros(())
    system = gram.double() + damping.double() * torch.eye(gram.shape[0], device=gram.device, dtype=torch.float64)
    solution = torch.linalg.solve(system, cross.double()).to(cross.dtype)
    module.bias.copy_(solution[-1])
    if isinstance(module.layer, FFF | ConditionalFeedforward):
        own = module.layer.config.neurons
        module.layer.w_out.copy_(solution[:own].view_as(module.layer.w_out))
        if module.shared is not None:
            module.shared.linear_out.weight.copy_(solution[own:-1].t())
        if module.layer.b_out is not None:
            module.layer.b_out.zero_()
    elif isinstance(module.layer, DenseFeedforward):
        module.layer.linear_out.weight.copy_(solution[:-1].t())
        bias: nn.Parameter | None = module.layer.linear_out.bias
        if bias is not None:
            bias.zero_()
