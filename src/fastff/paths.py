"""What FFF(paths=k) computes: the k best leaves of every tree, by a router that reads the layer's own nodes.

Weights stay as FFF has them, nodes and leaves of a tree side by side. Training takes the nodes for the router and the
leaves for `conditional_matmul` out of them; inference on the CPU runs on a packed copy of both, in one call.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from fastff.conditional import ConditionalFeedforward
from fastff.config import Quantization, TreeConfig
from fastff.ops.conditional_interface import conditional_matmul
from fastff.ops.dense import dense
from fastff.ops.followed import RECHECK, FollowedPack
from fastff.ops.interface import check_shapes
from fastff.ops.native_router import JoinedLayer, can_route
from fastff.ops.quantized import check_quantized_call
from fastff.ops.reference import Routed
from fastff.ops.weights import Leaves, Weights
from fastff.routers.choose import beam_margin
from fastff.routers.modules import Chosen, TreeRouter, make_router


class NodeRouter(TreeRouter):
    """The router of an FFF with paths: it scores by the layer's nodes, and owns the balance and the statistics."""

    def __init__(self, tree: TreeConfig, *, device: torch.device | str | None = None) -> None:
        sizes = (tree.in_features, tree.depth, tree.trees, tree.paths)
        super().__init__(*sizes, gate=tree.gate, bias=tree.bias, own_weights=False, device=device)
        self.tree = tree
        self._joined: FollowedPack[JoinedLayer] = FollowedPack(RECHECK * tree.neurons)  # counts neurons it reads

    def output(self, x: Tensor, weights: Weights, *, backend: str | None, quantization: Quantization | None) -> Tensor:
        """y (..., out_features) of x (..., in_features). In training the load is counted and balanced."""
        check_shapes(x, weights, self.tree)
        if quantization is not None:
            check_quantized_call(quantization, x, weights.w_in, training=self.training, backend=backend)
            if self._track_in_eval:
                self.route(x, weights, backend=backend)
            with torch.no_grad():
                return self._by_pack(x, weights, quantization)
        if self._pack_serves(x, weights, backend):
            return self._by_pack(x, weights, None)
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            self._joined.doubt()  # an update of the weights may follow
        leaf, gate = self._chosen(x, weights, backend)
        leaves = self.leaves_of(weights)
        return conditional_matmul(
            x,
            leaf,
            gate.to(x.dtype),
            leaves.w_in,
            leaves.w_out,
            activation=self.tree.activation,
            b_in=leaves.b_in,
            b_out=leaves.b_out,
            backend=backend,
            leaf_in_range=x.is_cuda,
        )

    def route(self, x: Tensor, weights: Weights, *, backend: str | None) -> Tensor:
        """Leaves (..., trees * paths) int64 of each row, by their number in their tree, ascending within it."""
        return self._chosen(x, weights, backend).leaf % self.tree.leaves

    def routed(self, x: Tensor, weights: Weights, *, backend: str | None, quantization: Quantization | None) -> Routed:
        """y, leaf as of `route`, and the margin by which the last kept of a beam was better than the first dropped."""
        y = self.output(x, weights, backend=backend, quantization=quantization)
        training = self.training
        try:  # `output` has counted and balanced
            leaf = self.eval().route(x, weights, backend=backend)
        finally:
            self.train(training)
        with torch.no_grad():
            rows = x.reshape(-1, self.tree.in_features)
            score = self._scores(rows, *self._nodes(weights)).view(len(rows), self.tree.trees, self.tree.nodes)
            margin = beam_margin(score, self.config.chosen, self.balance)
        return Routed(y, leaf, margin.reshape(x.shape[:-1]))

    def leaves_of(self, weights: Weights) -> Leaves:
        """The leaves of all trees, one after another."""
        c, (w_in, b_in, w_out, b_out) = self.tree, weights
        count = c.trees * c.leaves
        return Leaves(
            w_in[:, c.nodes :].reshape(count, c.leaf_in_rows, c.in_features),
            None if b_in is None else b_in[:, c.nodes :].reshape(count, c.leaf_in_rows),
            w_out.reshape(count, c.leaf_width, c.out_features),
            None if b_out is None else b_out.reshape(count, c.out_features),
        )

    def _nodes(self, weights: Weights) -> tuple[Tensor, Tensor | None]:
        nodes = self.tree.nodes
        return weights.w_in[:, :nodes], None if weights.b_in is None else weights.b_in[:, :nodes]

    def _chosen(self, x: Tensor, weights: Weights, backend: str | None) -> Chosen:
        return self.choose(x, *self._nodes(weights), native=backend in (None, "native"))

    def _pack_serves(self, x: Tensor, weights: Weights, backend: str | None) -> bool:
        """Whether a packed copy computes this call: plain inference in fp32 on the CPU by weights that stay."""
        free = not self.training and not self._track_in_eval and backend in (None, "native")
        stay = all(isinstance(tensor, nn.Parameter) for tensor in weights.present)
        return free and stay and x.dtype == torch.float32 and can_route(x, weights.w_in)

    def _by_pack(self, x: Tensor, weights: Weights, quantization: Quantization | None) -> Tensor:
        (rows,) = dense(x.detach().reshape(-1, self.tree.in_features).float())
        reads = len(rows) * self.tree.active_neurons
        layer = self._joined.of((*weights, self.balance), reads, partial(self._pack, weights, quantization))
        return layer(rows).to(x.dtype).reshape(*x.shape[:-1], self.tree.out_features)

    def _pack(self, weights: Weights, quantization: Quantization | None) -> JoinedLayer:
        router, leaves = (*self._nodes(weights), self.balance), self.leaves_of(weights)
        return JoinedLayer(self.config, router, leaves, activation=self.tree.activation, quantization=quantization)

    def drop(self) -> None:
        """As Router's, and the packed copy of the whole layer."""
        super().drop()
        self._joined.drop()

    def joined(self, weights: Weights) -> ConditionalFeedforward:
        """The same function as a layer with a router and leaves of its own: a copy of the weights."""
        device, dtype = weights.w_in.device, weights.w_in.dtype
        router = make_router(self.config, balance_step=self.balance_step, device=device, dtype=dtype)
        layer = ConditionalFeedforward(
            self.tree.in_features,
            self.tree.out_features,
            router=router,
            leaves=self.leaves,
            leaf_width=self.tree.leaf_width,
            activation=self.tree.activation,
            bias=self.tree.bias,
            device=device,
            dtype=dtype,
        )
        weight, bias = self._nodes(weights)
        parts = {"router.weight": weight, "router.bias": bias, "router.balance": self.balance}
        layer.load_state_dict({n: t for n, t in (parts | self.leaves_of(weights)._asdict()).items() if t is not None})
        return layer.train(self.training)
