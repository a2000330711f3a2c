"""Routers: modules that give every row `k` leaves and a gate for each, for `fastff.ConditionalFeedforward`.

Shapes  input (..., in_features), leaf (..., k) int64 ascending, gate (..., k). k is `router.k`, over all trees.
Errors  ShapeError when the last dimension is not in_features.
Any module that returns such a pair, and says how many `leaves` it knows, can stand in their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastff.config import Quantization, check_quantization
from fastff.errors import ShapeError
from fastff.ops import choose_ops, interface, native_router
from fastff.ops.eager import is_autocast, is_recomputed, is_side_effect_free
from fastff.ops.followed import RECHECK, FollowedPack
from fastff.ops.reference import gate_of, least
from fastff.routers.choose import beam, best, histogram, normalised, preference
from fastff.routers.router_config import RouterConfig, RouterGate
from fastff.routers.usage import Usage

BALANCE_STEP = 1e-3
Auto = Literal["auto"]
Load = Callable[[], Tensor]


class Chosen(NamedTuple):
    """What a router chose: leaf (..., k) int64, ascending in a row, and gate (..., k), differentiable."""

    leaf: Tensor
    gate: Tensor


class Router(nn.Module):
    """What the routers share: weights, the balance of their load, statistics. `config` says which router it is.

    weight (config.shape_of_weight) and, with bias, bias: the only parameters. own_weights=False: it has none, and is
    given them by `choose`.
    balance (config.shape_of_balance), float32: added to selections, never to gates; a buffer that every forward in
    training moves by `balance_step`, up where fewer rows went than the mean and down where more, summed over all
    processes of torch.distributed. 0 leaves it alone. Source: Wang et al. 2024, arXiv:2408.15664.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    balance: Tensor | None
    _leaf_counts: Tensor

    def __init__(
        self,
        config: RouterConfig,
        *,
        balance_step: float = BALANCE_STEP,
        own_weights: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= balance_step < math.inf:
            raise ValueError(f"balance_step {balance_step} is not a finite number of at least 0")
        self.config = config
        self.balance_step = balance_step
        for name, shape in (("weight", config.shape_of_weight), ("bias", config.shape_of_bias)):
            own = own_weights and shape is not None
            made = nn.Parameter(torch.empty(shape or (), device=device, dtype=dtype)) if own else None
            self.register_parameter(name, made)
        shape = config.shape_of_balance
        self.register_buffer("balance", None if shape is None else torch.zeros(shape, device=device))
        self.quantization: Quantization | None = None
        # Counts the numbers of `weight` that it reads.
        self._packed: FollowedPack[native_router.PackedRouter] = FollowedPack(
            RECHECK * math.prod(config.shape_of_weight)
        )
        self._balance_before: Tensor | None = None  # the last move
        usage = (config.trees, config.leaves // config.trees)
        self.register_buffer("_leaf_counts", torch.zeros(usage, dtype=torch.int64, device=device), persistent=False)
        self._track_in_eval = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scores start with unit variance for inputs of unit variance; no balance."""
        if self.weight is not None:
            nn.init.normal_(self.weight, std=1 / math.sqrt(self.config.in_features))
        for other in (self.bias, self.balance):
            if other is not None:
                nn.init.zeros_(other)
        self.reset_usage()

    def forward(self, x: Tensor) -> Chosen:
        """(..., in_features) to leaf and gate (..., k). Raises ShapeError."""
        return self.choose(x, self.weight, self.bias)

    def choose(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, native: bool = True) -> Chosen:
        """`forward` with these weights of the router's shapes; native: by the C++ core where it can."""
        if x.dim() == 0 or x.shape[-1] != self.config.in_features:
            raise ShapeError(f"x {tuple(x.shape)} does not match in_features {self.config.in_features} of the router")
        self._check_weights(weight, bias)
        rows = x.reshape(-1, self.config.in_features)
        balance = self.balance
        if self.training and is_recomputed() and self._balance_before is not None:
            balance = self._balance_before  # what is computed again must choose as it did
        if native and not self.training and native_router.can_route(rows, weight):
            leaf, gate, load = self._native(rows, weight, bias)
        else:
            if not torch.compiler.is_compiling() and torch.is_grad_enabled():
                self._packed.doubt()  # an update of the weights may follow
            leaf, gate, load = self._route(rows, weight, bias, balance)
        if (self.training or self._track_in_eval) and not is_side_effect_free():
            with torch.no_grad():
                self._real_counts(weight)
                self._leaf_counts += self._of_leaves(load())
                if self.training and self.balance_step:
                    self._rebalance(load())
        lead = (*x.shape[:-1], self.config.k)
        return Chosen(leaf.reshape(lead), gate.reshape(lead))

    def _check_weights(self, weight: Tensor, bias: Tensor | None) -> None:
        """Raises ShapeError: kernels read as far as the configuration says."""
        c = self.config
        wanted = {"weight": c.shape_of_weight, "bias": c.shape_of_bias, "balance": c.shape_of_balance}
        for (name, shape), tensor in zip(wanted.items(), (weight, bias, self.balance), strict=True):
            if (None if tensor is None else tuple(tensor.shape)) != (None if shape is None else tuple(shape)):
                seen = None if tensor is None else tuple(tensor.shape)
                raise ShapeError(f"{name} {seen} of the router does not match {shape}")

    def _route(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None, balance: Tensor | None
    ) -> tuple[Tensor, Tensor, Load]:
        """leaf and gate (rows, k), and what counts the rows that selected each part of the balance: of its shape, or
        (trees, leaves) where there is none."""
        raise NotImplementedError

    def _native(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Load]:
        """As `_route`, by the C++ core; it counts leaves alone."""
        weights = (weight, bias, self.balance)
        if self.quantization is None or rows.dtype != torch.float32:
            leaf, gate = native_router.route(self.config, *weights, rows)
        else:
            make = partial(native_router.PackedRouter, self.config, *weights, self.quantization)
            leaf, gate = self._packed.of(weights, len(rows) * self.flops_per_row // 2, make)(rows)
        shape = (self.config.trees, self.leaves // self.config.trees)
        return leaf, gate, _counted(leaf, shape)

    def quantize(self, quantization: Quantization | None) -> Self:
        """Route inference on the CPU in 16 bits, to the leaves of fp32; None returns to fp32. ValueError otherwise."""
        check_quantization(quantization)
        self.quantization = quantization
        self.drop()
        return self

    def drop(self) -> None:
        """Forget packed copies of weights: the next call makes them."""
        self._packed.drop()

    def train(self, mode: bool = True) -> Self:
        """As nn.Module's. Entering or leaving training also drops the packed copy of the weights."""
        if mode or self.training:
            self.drop()
        return super().train(mode)

    def _scores(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A score of every row of weight (rows, ...), as float32 or wider."""
        return self._linear(rows, weight.flatten(0, -2), None if bias is None else bias.flatten())

    def _linear(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if rows.device.type == "cpu" and torch.is_autocast_enabled("cpu"):  # as the leaves: autocast gains nothing here
            with torch.autocast("cpu", enabled=False):
                return F.linear(rows.to(weight.dtype), weight, bias)
        score = F.linear(rows, weight, bias)
        return score if score.dtype == torch.float64 else score.float()

    def _on_gpu(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None, balance: Tensor | None
    ) -> tuple[Tensor, Tensor, Load] | None:
        """`_route` by one kernel that makes scores, choice and gates; None where it cannot."""
        if rows.device.type != "cuda" or self.config.gate != "normalised":
            return None
        if is_autocast(rows):
            rows, weight, bias = interface.autocast(rows, weight, bias)
        if not choose_ops.can_route(rows, weight, self.leaves // self.config.trees, self.config.chosen):
            return None
        counted = self.training or self._track_in_eval
        leaf, gate, load = choose_ops.route(rows, weight, bias, balance, self.config.chosen, counted=counted)
        return leaf, gate, (lambda: load) if counted else _counted(leaf, tuple(self._leaf_counts.shape))

    def _gate(self, score: Tensor) -> Tensor:
        return torch.ones_like(score) if self.config.gate is None else normalised(score)

    def _rebalance(self, load: Tensor) -> None:
        if self.balance is None:
            return
        if not torch.compiler.is_compiling():
            self._balance_before = self.balance.clone()
        load = load.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(load)
        for level in self._levels(load):
            level.copy_(torch.sign(level.sum(-1, keepdim=True) - level * level.shape[-1]))
        self.balance.add_(load, alpha=self.balance_step)

    def _levels(self, load: Tensor) -> list[Tensor]:
        """The parts of load whose members compete with one another, as views."""
        return [load]

    def _of_leaves(self, load: Tensor) -> Tensor:
        """The load of the leaves (trees, leaves)."""
        return load.view(self._leaf_counts.shape)

    def usage(self, x: Tensor | None = None) -> Usage:
        """How rows spread over the leaves of each tree (one "tree" where there is none): those of `x`, or, without it,
        all seen in training mode (and in evaluation after `track_usage()`) since the last `reset_usage()`."""
        if x is None:
            return Usage.of(self.counts.clone())
        with torch.no_grad():
            load = self._route(x.reshape(-1, self.config.in_features), self.weight, self.bias, self.balance)[2]
            return Usage.of(self._of_leaves(load()))

    def track_usage(self, enabled: bool = True) -> None:
        """Count leaves in evaluation too."""
        self._track_in_eval = enabled

    @property
    def counts(self) -> Tensor:
        """Rows counted (trees, leaves) int64, by the leaves they took."""
        if self.weight is not None:
            self._real_counts(self.weight)
        return self._leaf_counts

    def _real_counts(self, weight: Tensor) -> None:
        """Counters where the weights are: loading may put weights in the place of some without memory."""
        if self._leaf_counts.is_meta and not weight.is_meta:
            self._leaf_counts = torch.zeros_like(self._leaf_counts, device=weight.device)

    def reset_usage(self) -> None:
        """Forget the rows counted so far."""
        self._leaf_counts.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # In half precision a balance would soon be too large for its step to move it.
        before, counts = self.balance, self._leaf_counts
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if counts.is_meta and not self._leaf_counts.is_meta:  # to_empty() leaves what memory held
            self._leaf_counts.zero_()
        if before is not None and self.balance is not None and self.balance.dtype != before.dtype:
            self.balance = before.to(self.balance.device)
        return self

    @property
    def in_features(self) -> int:
        """Width of a row."""
        return self.config.in_features

    @property
    def leaves(self) -> int:
        """Leaves that it knows."""
        return self.config.leaves

    @property
    def k(self) -> int:
        """Leaves that it chooses for a row."""
        return self.config.k

    @property
    def flops_per_row(self) -> int:
        """Floating-point operations of one row's matrix work (a multiply and an add are two)."""
        return self.config.flops_per_row

    def extra_repr(self) -> str:
        c = self.config
        return f"{c.in_features}, leaves={c.leaves}, k={c.k}, gate={c.gate!r}, bias={c.bias}"


class TreeRouter(Router):
    """Binary trees: a row takes one leaf of each tree by a greedy descent, or with `paths` that many by a beam.

    in_features  width of a row
    depth        decisions from root to leaf; a tree has 2**depth leaves
    trees        their leaves follow one another: leaf tree * 2**depth + leaf in the tree
    paths        None: greedy, score > 0 turns right; zero, negative and NaN turn left.
                 k: the k best leaves of each tree by the sum of +score where the path turns right and -score where it
                 turns left, found by a beam that keeps k nodes a level
    gate         greedy: None, "boundary" (default) or "boundary_min", as in TreeConfig, with their tau;
                 with paths: None or "normalised" (default)
    bias, balance_step  see Router; only with paths there is something to balance

    weight (trees, nodes, in_features), heap order. Raises ShapeError, ValueError.
    """

    def __init__(
        self,
        in_features: int,
        depth: int,
        trees: int = 1,
        paths: int | None = None,
        *,
        gate: RouterGate | Auto | None = "auto",
        tau: float = 0.5,
        bias: bool = False,
        **options: Any,
    ) -> None:
        config = RouterConfig(
            kind="tree" if paths is None else "paths",
            in_features=in_features,
            depth=depth,
            trees=trees,
            chosen=1 if paths is None else paths,
            gate=("boundary" if paths is None else "normalised") if gate == "auto" else gate,
            tau=tau,
            bias=bias,
        )
        super().__init__(config, **options)

    def _route(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None, balance: Tensor | None
    ) -> tuple[Tensor, Tensor, Load]:
        config = self.config
        if config.kind == "paths" and (made := self._on_gpu(rows, weight, bias, balance)) is not None:
            return made
        score = self._scores(rows, weight, bias).view(rows.shape[0], config.trees, config.nodes)
        first = torch.arange(config.trees, device=rows.device)[:, None]
        if config.kind == "tree":
            leaf, gate = self._descend(score)
            leaf = leaf + first * 2**config.depth
            return leaf.flatten(1), gate.flatten(1), _counted(leaf, (config.trees, 2**config.depth))
        if choose_ops.available(score, 2**config.depth):
            leaf, total, counts = choose_ops.beam(score, balance, config.chosen)
            return (leaf + first * 2**config.depth).flatten(1), self._gate(total).flatten(1), lambda: counts
        found = beam(score, config.chosen, balance)
        leaf, per_tree = found.leaf + first * 2**config.depth, 2 * 2**config.depth - 1
        load = _counted(found.kept + first * per_tree, (config.trees, per_tree))
        return leaf.flatten(1), self._gate(found.score).flatten(1), load

    def _of_leaves(self, load: Tensor) -> Tensor:
        return load[:, -(2**self.config.depth) :]

    def _descend(self, score: Tensor) -> tuple[Tensor, Tensor]:
        """Leaf and gate (rows, trees, 1) of a greedy descent by node scores (rows, trees, nodes)."""
        node = torch.zeros(*score.shape[:2], 1, dtype=torch.int64, device=score.device)
        gate = score.new_ones(node.shape)
        for _ in range(self.config.depth):
            own = score.gather(2, node)
            decision = gate_of(own, self.config.tau)
            gate = least(gate, decision) if self.config.gate == "boundary_min" else gate * decision
            node = 2 * node + 1 + (own > 0).to(node.dtype)
        if self.config.gate is None:
            gate = torch.ones_like(gate)
        return node - self.config.nodes, gate

    def _levels(self, load: Tensor) -> list[Tensor]:
        return [load[:, 2**level - 1 : 2 ** (level + 1) - 1] for level in range(self.config.depth + 1)]


class FlatRouter(Router):
    """One linear score a leaf, the k best: what a mixture of experts does.

    in_features width of a row; leaves to choose among; k of them for a row; gate None or "normalised"; options as of
    Router. weight (leaves, in_features). Raises ShapeError, ValueError.
    """

    def __init__(
        self,
        in_features: int,
        leaves: int,
        k: int,
        *,
        gate: RouterGate | None = "normalised",
        bias: bool = False,
        **options: Any,
    ) -> None:
        config = RouterConfig(kind="flat", in_features=in_features, candidates=leaves, chosen=k, gate=gate, bias=bias)
        super().__init__(config, **options)

    def _route(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None, balance: Tensor | None
    ) -> tuple[Tensor, Tensor, Load]:
        return self._on_gpu(rows, weight, bias, balance) or self._best(self._scores(rows, weight, bias), balance)

    def _best(self, score: Tensor, balance: Tensor | None) -> tuple[Tensor, Tensor, Load]:
        """The k best of leaf scores (rows, leaves)."""
        if choose_ops.available(score, self.leaves):
            leaf, counts = choose_ops.best(score, balance, self.config.chosen)
            return leaf, self._gate(score.gather(1, leaf)), lambda: counts
        leaf = best(preference(score, balance), self.config.chosen)
        return leaf, self._gate(score.gather(1, leaf)), _counted(leaf, (self.leaves,))


class ProductKeyRouter(FlatRouter):
    """Two codebooks of n keys, one for each half of a row; of the n * n leaves the k whose two scores sum highest.

    Leaf a * n + b scores first[a] + second[b]: n * n leaves at the price of n. in_features must be even; gate None or
    "normalised"; options as of Router. weight (2, n, in_features / 2). Raises ShapeError, ValueError.
    Source: Lample et al. 2019, arXiv:1907.05242.
    """

    def __init__(
        self,
        in_features: int,
        n: int,
        k: int,
        *,
        gate: RouterGate | None = "normalised",
        bias: bool = False,
        **options: Any,
    ) -> None:
        config = RouterConfig(kind="product_key", in_features=in_features, candidates=n, chosen=k, gate=gate, bias=bias)
        Router.__init__(self, config, **options)

    def _route(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None, balance: Tensor | None
    ) -> tuple[Tensor, Tensor, Load]:
        biases = (None, None) if bias is None else bias
        halves = zip(rows.chunk(2, -1), weight, biases, strict=True)
        first, second = (self._linear(half, keys, own) for half, keys, own in halves)
        return self._best((first.unsqueeze(2) + second.unsqueeze(1)).flatten(1), balance)


def _counted(index: Tensor, shape: tuple[int, ...]) -> Load:
    return lambda: histogram(index, math.prod(shape)).view(shape)


def make_router(config: RouterConfig, **options: Any) -> Router:
    """The router that a configuration describes; options: balance_step, device and dtype."""
    options |= {"gate": config.gate, "bias": config.bias}
    if config.kind == "flat":
        return FlatRouter(config.in_features, config.candidates, config.chosen, **options)
    if config.kind == "product_key":
        return ProductKeyRouter(config.in_features, config.candidates, config.chosen, **options)
    paths = None if config.kind == "tree" else config.chosen
    return TreeRouter(config.in_features, config.depth, config.trees, paths, tau=config.tau, **options)
