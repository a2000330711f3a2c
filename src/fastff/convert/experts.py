"""Experts from a dense layer: a shared core, groups of neurons that the same rows use, and a router that finds them.

The neurons that do most on all rows are the shared core. The rest is grouped so that what matters to a row lies in few
groups: groups begin as neurons that are marked on the same rows, then rows choose their groups and neurons move to the
groups of the rows that need them, in turn; every neuron is in one group, all groups are of one size. A router row
begins as the input row of the group's most central neuron and is fitted to the share of each row that its group holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastff.convert.neurons import contribution
from fastff.models.families import DenseWeights

ROUNDS = 12  # of choosing groups and moving neurons
SINKHORN = 40  # steps to the prices that balance an assignment
ROUTER_STEPS, ROUTER_ROWS, ROUTER_LR = 150, 4096, 0.02
SCORE_STD = 0.25  # of a fitted router's scores: gates then start near 1


@dataclass(frozen=True)
class Groups:
    """Neurons of a dense layer in their new places: shared (shared,) and leaves (leaves, leaf_width), their numbers;
    router (leaves, in_features), whose score says how much of a row a leaf holds."""

    shared: Tensor
    leaves: Tensor
    router: Tensor


@torch.no_grad()
def group_neurons(
    dense: DenseWeights, x: Tensor, *, shared: int, leaves: int, leaf_width: int, chosen: int, seed: int = 0
) -> Groups:
    """Divide a layer's neurons by what they do on the rows x (rows, in_features), of which each takes `chosen` leaves.

    Neurons that find no place, those that do least, are left out. Raises ValueError for more places than neurons."""
    places = leaves * leaf_width
    if shared + places > dense.neurons:
        raise ValueError(f"{shared} shared and {places} grouped neurons are more than the layer's {dense.neurons}")
    energy = contribution(dense, x).square()
    order = energy.sum(0).argsort(descending=True)
    rest = order[shared : shared + places]
    mine = energy[:, rest]
    mine = mine / energy.sum(1, keepdim=True).clamp(min=1e-12)  # shares of a row
    place = co_activated(mine, leaves, leaf_width, chosen)
    for _ in range(ROUNDS):
        place = balanced(needed(mine, place, leaves, chosen), leaf_width)
    held = mass_of(mine, place, leaves)
    grouped = place.argsort(stable=True).view(leaves, leaf_width)
    start = dense.w_in[rest[central(mine, grouped)]]
    router = fit_router(x, held, start, seed=seed)
    return Groups(order[:shared], rest[grouped], router)


def co_activated(share: Tensor, leaves: int, leaf_width: int, chosen: int) -> Tensor:
    """A first place (neurons,) for every neuron: groups of those that are marked on the same rows.

    share (rows, neurons): a neuron is marked on the rows whose largest shares, so many as `chosen` groups have, are
    among them its own."""
    least = share.topk(min(chosen * leaf_width, share.shape[1]), dim=1).values[:, -1:]
    marks = (share >= least).float()
    marks = marks / marks.norm(dim=0).clamp(min=1e-6)
    alike = marks.t() @ marks
    seeds = [int(share.sum(0).argmax())]
    nearest = alike[seeds[0]].clone()
    for _ in range(leaves - 1):
        nearest[seeds[-1]] = torch.inf
        seeds.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, alike[seeds[-1]])
    return balanced(alike[:, seeds], leaf_width)


def needed(share: Tensor, place: Tensor, leaves: int, chosen: int) -> Tensor:
    """How much each neuron gives to the rows that choose each group (neurons, leaves)."""
    best = mass_of(share, place, leaves).topk(chosen, dim=1).indices
    takes = share.new_zeros(share.shape[0], leaves).scatter_(1, best, 1.0)
    return share.t() @ takes


def mass_of(share: Tensor, place: Tensor, leaves: int) -> Tensor:
    """What the neurons of each group hold of every row (rows, leaves)."""
    return share.new_zeros(share.shape[0], leaves).index_add_(1, place, share)


def balanced(benefit: Tensor, capacity: int) -> Tensor:
    """A group (neurons,) for every neuron, `capacity` neurons in each, so that benefits (neurons, groups) sum high.

    Prices that balance the groups are found by Sinkhorn's iteration; then neurons ask for the group of their best
    price, and a group that too many ask for keeps those it is worth most to."""
    value = benefit / benefit.std().clamp(min=1e-12) * 8
    price = value.new_zeros(value.shape[1])
    for _ in range(SINKHORN):
        price = price - torch.log_softmax(value + price, 1).logsumexp(0)
    value = value + price
    wish, groups = value.clone(), value.shape[1]
    numbers = torch.arange(len(value), device=value.device)
    while True:
        asked = wish.argmax(1)
        order = value[numbers, asked].argsort(descending=True)
        order = order[asked[order].argsort(stable=True)]
        first = torch.bincount(asked, minlength=groups).cumsum(0) - torch.bincount(asked, minlength=groups)
        refused = order[numbers - first[asked[order]] >= capacity]
        if not len(refused):
            return asked
        wish[refused, asked[refused]] = -torch.inf


def central(share: Tensor, grouped: Tensor) -> Tensor:
    """Of each group (leaves, leaf_width) the neuron (leaves,) whose shares are most like the group's mass."""
    mass = share[:, grouped].sum(2)  # (rows, leaves)
    shifted, mass = share - share.mean(0), mass - mass.mean(0)
    own = torch.einsum("rlw,rl->lw", shifted[:, grouped], mass) / shifted.norm(dim=0)[grouped].clamp(min=1e-12)
    return grouped.gather(1, own.argmax(1, keepdim=True)).squeeze(1)


@torch.enable_grad()
def fit_router(x: Tensor, held: Tensor, start: Tensor, *, seed: int = 0, steps: int = ROUTER_STEPS) -> Tensor:
    """Rows (leaves, in_features) whose scores' softmax follows what each group holds of a row, held (rows, leaves).

    The best k groups by expected share are then those of the k highest scores. start: the first direction of every row.
    Scores have deviation SCORE_STD."""
    scale = x.std(0).clamp(min=1e-6)
    target = held / held.sum(1, keepdim=True).clamp(min=1e-12)
    weight = (start * scale / (start * scale).norm(dim=1, keepdim=True).clamp(min=1e-6)).detach().clone()
    weight.requires_grad_(True)
    optimiser = torch.optim.Adam([weight], lr=ROUTER_LR)
    draw = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        some = torch.randint(len(x), (min(ROUTER_ROWS, len(x)),), generator=draw).to(x.device)
        loss = -(target[some] * torch.log_softmax((x[some] / scale) @ weight.t(), 1)).sum(1).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    found: Tensor = weight.detach() / scale
    return found * (SCORE_STD / (x @ found.t()).std().clamp(min=1e-6))


@torch.no_grad()
def kept_share(dense: DenseWeights, x: Tensor, groups: Groups, chosen: int) -> dict[str, float]:
    """How much of the rows' contributions (squared, summed) a layer with these groups keeps on rows x: with the
    router's choice of `chosen` leaves, with the best choice of leaves, and with the best choice of as many neurons."""
    energy = contribution(dense, x).square()
    total = energy.sum(1)
    mass = energy[:, groups.leaves].sum(2)
    core = energy[:, groups.shared].sum(1)
    routed = mass.gather(1, (x @ groups.router.t()).topk(chosen, 1).indices).sum(1)
    active = len(groups.shared) + chosen * groups.leaves.shape[1]
    kept = {
        "router": core + routed,
        "best_leaves": core + mass.topk(chosen, 1).values.sum(1),
        "best_neurons": energy.topk(active, 1).values.sum(1),
    }
    return {name: float((value / total.clamp(min=1e-12)).mean()) for name, value in kept.items()}
