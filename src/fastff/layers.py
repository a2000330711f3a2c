"""FFF layer: binary trees of neurons in place of a dense feedforward.

Shapes  input (..., in_features), output (..., out_features), any float dtype.
Cost    `active_neurons` per row, of `neurons` stored; `flops_per_row` counts routing too.
Errors  ShapeError when the last dimension is not in_features.
Source  Belcak & Wattenhofer 2023, arXiv:2308.14711 (FFF) and arXiv:2311.10770 (UltraFastBERT).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_calls

from fastff import ops
from fastff.conditional import ConditionalFeedforward
from fastff.config import Activation, Gate, Quantization, SizedLayer, TreeConfig, check_quantization
from fastff.errors import BackendUnavailable, ShapeError
from fastff.ops import reference
from fastff.ops.backends import forced_backend, why_unavailable_cached
from fastff.ops.cost import mostly_active
from fastff.ops.eager import is_autocast_enabled, is_plain_call, is_side_effect_free
from fastff.ops.interface import check_dtypes, check_shapes
from fastff.ops.packed import PackedLayer
from fastff.ops.quantized import check_no_learning
from fastff.ops.reference import Mixed, Routed
from fastff.ops.weights import Weights
from fastff.paths import NodeRouter
from fastff.published_layer import read_published
from fastff.routers.usage import Usage, add_counts, path_of

# Looked up once: the direct path of inference counts tenths of a microsecond.
_grad_enabled, _compiling = torch.is_grad_enabled, torch.compiler.is_compiling
_any_global_hook = cast(Callable[[], bool], module_calls._has_any_global_hook)

Surrogate = Literal["straight_through", "soft"]


class FFF(SizedLayer, nn.Module):
    """Conditional feedforward layer, a drop-in for `Linear -> activation -> Linear`.

    in_features, out_features  widths of a row; out_features defaults to in_features
    depth, trees, leaf_width, node_output, activation, gate, tau, bias, paths  see TreeConfig
    surrogate    gradient of the routing in training mode: None (only the gate's, conditional cost) or, at dense cost,
                 "straight_through" (each decision differentiated as a sigmoid), "soft" (the 2023 mixture of all leaves,
                 needs node_output=False and no gate). Evaluation always routes hard.
    region_leak  with surrogate="soft": probability that a node swaps its sides for a row, in [0, 0.5]
    backend      a name of `fastff.ops.available_backends()`, or None to choose by device and dtype
    sparse_grad  gradients of w_in, w_out and b_out as sparse tensors of the visited rows, as torch.nn.Embedding's
                 `sparse`: a step of a large layer then costs what it visits, with an optimiser that takes them (SGD
                 without momentum or weight decay, SparseAdam). On the CPU, by backend native, in eager mode.
    quantization None, or the weights with which evaluation runs on the CPU: see `quantize`
    Parameters: w_in (trees, in_rows, in_features), w_out (trees, out_rows, out_features); with bias b_in
    (trees, in_rows), and for node_output=False b_out (trees, leaves, out_features). With paths there is `router`, which
    keeps the balance of the load (see fastff.routers.Router) as a buffer and moves it in training.
    Raises ShapeError (a ValueError) for a size out of range, ValueError for options that exclude each other.
    Source: Belcak & Wattenhofer 2023, arXiv:2308.14711 and arXiv:2311.10770.
    """

    config: TreeConfig
    b_in: nn.Parameter | None
    b_out: nn.Parameter | None
    router: NodeRouter | None
    _leaf_counts: Tensor
    masked_training: bool = False  # train by products over all neurons and a mask: the same function at dense cost

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        depth: int,
        trees: int = 1,
        leaf_width: int = 1,
        node_output: bool = True,
        activation: Activation = "gelu",
        gate: Gate | None = None,
        tau: float = 0.5,
        bias: bool = False,
        paths: int | None = None,
        surrogate: Surrogate | None = None,
        region_leak: float = 0.0,
        backend: str | None = None,
        sparse_grad: bool = False,
        quantization: Quantization | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_quantization(quantization)
        self.config = config = TreeConfig(
            in_features=in_features,
            out_features=in_features if out_features is None else out_features,
            depth=depth,
            trees=trees,
            leaf_width=leaf_width,
            node_output=node_output,
            activation=activation,
            gate=gate,
            tau=tau,
            bias=bias,
            paths=paths,
        )
        _check_surrogate(surrogate, region_leak, config)
        if sparse_grad:
            _check_sparse(surrogate, paths)
        self.surrogate = surrogate
        self.region_leak = region_leak
        self.backend = backend
        self.sparse_grad = sparse_grad
        self.quantization = quantization
        make: dict[str, Any] = {"device": device, "dtype": dtype}
        with torch.inference_mode(False):  # tensors made in that mode would have no version counter to follow
            self.w_in = nn.Parameter(torch.empty(config.shape_of_w_in, **make))
            self.w_out = nn.Parameter(torch.empty(config.shape_of_w_out, **make))
            self.register_parameter("b_in", _parameter(config.shape_of_b_in, make))
            self.register_parameter("b_out", _parameter(config.shape_of_b_out, make))
        self.router = None if paths is None else NodeRouter(config, device=device)
        counts = torch.zeros(config.trees, config.leaves, dtype=torch.int64, device=device)
        self.register_buffer("_leaf_counts", counts, persistent=False)
        self._track_in_eval = False
        self._entropy: Tensor | None = None
        self._packed: PackedLayer | None = None
        self._direct: PackedLayer | None = None
        self._find_direct()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scores start with unit variance for inputs of unit variance, and so do the summed active outputs."""
        nn.init.normal_(self.w_in, std=1 / math.sqrt(self.config.in_features))
        nn.init.normal_(self.w_out, std=1 / math.sqrt(self.config.active_neurons))
        for bias in (self.b_in, self.b_out):
            if bias is not None:
                nn.init.zeros_(bias)
        if self.router is not None:
            self.router.reset_parameters()

    def __call__(self, x: Tensor) -> Tensor:
        """As nn.Module's, which takes longer to find that nothing surrounds `forward` than a row takes."""
        if not (
            self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
            or _any_global_hook()
            or "forward" in self.__dict__  # put there by libraries that wrap a module
            or self.__class__.forward is not _forward
            or self._compiled_call_impl is not None
        ):
            y = self._shortcut(x)
            if y is not None:
                return y
        return cast(Tensor, super().__call__(x))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features). Raises ShapeError."""
        y = self._shortcut(x)
        if y is not None:
            return y
        if self.router is not None:
            return self.router.output(x, self._weights(), backend=self.backend, quantization=self.quantization)
        if self.training and (self.surrogate is not None or self.masked_training):
            return self._dense_cost_forward(x)
        routed = self.routed(x)
        if self.training or self._track_in_eval:
            self._count(routed.leaf)
        return routed.y

    def _shortcut(self, x: Tensor) -> Tensor | None:
        """Plain inference by the packed C++ layer; None where this call or this x needs what `routed` can do."""
        if (
            self.training
            or _grad_enabled()
            or not is_plain_call()
            or self._direct is None
            or x.__class__ is not Tensor
            or forced_backend() is not None
            or is_autocast_enabled()
        ):
            return None
        return self._direct.infer(x, self._parameters)

    def _find_direct(self) -> None:
        """The packed C++ layer that serves plain inference, unless another backend is named or leaves are counted."""
        free = self.backend is None and self.config.depth > 0 and not mostly_active(self.config)
        named = self.backend == "native" or free
        wanted = self.router is None and ((named and not self._track_in_eval) or self.quantization is not None)
        ready = wanted and why_unavailable_cached("native") is None
        self._packed = PackedLayer(self.config, self.quantization) if ready else None
        self._direct = None if self._track_in_eval else self._packed

    def train(self, mode: bool = True) -> Self:
        """As nn.Module's. Entering or leaving training also drops the packed copy of the weights."""
        if (mode or self.training) and self._packed is not None:
            self._packed.drop()
        return super().train(mode)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Edit weights within the block, by whatever means, while other threads may evaluate the layer on the CPU.

        They use the weights from before the block or wait for its end, and every call after it uses the new ones, also
        after an edit that autograd does not see: a part of `.data`, memory shared with numpy. `load_state_dict` does
        this by itself. A single replaced parameter or an edit that autograd sees needs no block."""
        if self._packed is None:
            try:
                yield
            finally:
                if self.router is not None:
                    self.router.drop()
            return
        with self._packed.updating():
            yield

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self.updating():
            super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .to() may swap a parameter's memory and come back to the same address with the same version.
        before = self._leaf_counts
        with self.updating():
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not self._leaf_counts.is_meta and self._leaf_counts is not before:  # to_empty() leaves what memory held
            self._leaf_counts.zero_() if before.is_meta else self._leaf_counts.copy_(before)
        return self

    def routed(self, x: Tensor) -> Routed:
        """Output, leaf and margin of each row: y (..., out_features), leaf (..., trees), margin (...).

        With paths leaf is (..., trees * paths), and margin how much better the last kept node of a beam was than the
        first that it dropped."""
        if self.router is not None:
            return self.router.routed(x, self._weights(), backend=self.backend, quantization=self.quantization)
        if self.quantization is not None:
            # Only a compiler that is at work needs the mark, and making it imports the compiler.
            return _outside_graphs()(self, x) if _compiling() else self._quantized_forward(x)
        if self.sparse_grad and _compiling():
            raise RuntimeError("sparse_grad has no compiled form: leave the layer out with torch.compiler.disable")
        if self._packed is not None and not _compiling() and _grad_enabled():
            self._packed.doubt()  # an update of the weights may follow
        return ops.forward(x, *self._weights(), config=self.config, backend=self.backend, sparse_grad=self.sparse_grad)

    def quantize(self, quantization: Quantization | None) -> Self:
        """Evaluate with weights in "bf16", or in "int8" with one scale to a row; None returns to the parameters' fp32.

        Every row takes the leaves that it takes in fp32: scores whose sign quantisation could have changed are computed
        again from the fp32 row. Only values are rounded. For inference on the CPU: no gradients, no training. The
        parameters stay fp32, and so do saved files; a model's configuration holds the name.
        Raises ValueError for another name.
        """
        check_quantization(quantization)
        self.quantization = quantization
        if self.router is not None:
            self.router.drop()
        self._find_direct()
        return self

    def _quantized_forward(self, x: Tensor) -> Routed:
        assert self.quantization is not None
        check_no_learning(self.quantization, x, training=self.training)
        backend = self.backend or forced_backend() or "native"
        if backend != "native" or self._packed is None:
            reason = why_unavailable_cached("native") or f"backend {backend!r} has no quantized weights, only 'native'"
            raise BackendUnavailable(reason)
        check_shapes(x, self._weights(), self.config)
        rows = x.detach().reshape(-1, self.config.in_features).float().resolve_neg().contiguous()
        routed = self._packed.routed(rows, self._weights)
        if routed is None:
            raise BackendUnavailable(
                f"quantized weights need contiguous parameters of one dtype up to float32, and rows, on the CPU, "
                f"got {self.w_in.dtype} on {self.w_in.device} and x on {x.device}"
            )
        lead = x.shape[:-1]
        y = routed.y.to(x.dtype).reshape(*lead, self.config.out_features)
        return Routed(y, routed.leaf.reshape(*lead, self.config.trees), routed.margin.reshape(lead))

    @torch.no_grad()
    def route(self, x: Tensor) -> Tensor:
        """Leaf index (..., trees) int64 that each row reaches; with paths (..., trees * paths), tree by tree."""
        if self.router is not None:
            return self.router.route(x, self._weights(), backend=self.backend)
        return self.routed(x).leaf

    @torch.no_grad()
    def path(self, x: Tensor) -> Tensor:
        """Heap indices (..., trees, levels) int64 of the nodes each row visits, root first, leaf last; with paths
        (..., trees * paths, levels)."""
        return path_of(self.route(x), self.config.depth)

    def usage(self, x: Tensor | None = None) -> Usage:
        """How rows spread over the leaves: those of `x`, or, without it, all rows seen in training mode (and in
        evaluation after `track_usage()`) since the last `reset_usage()`."""
        if x is None:
            return Usage.of(self._counts().clone())
        counts = torch.zeros_like(self._counts())
        add_counts(counts, self.route(x))
        return Usage.of(counts)

    def track_usage(self, enabled: bool = True) -> None:
        """Count leaves in evaluation too. Off by default: the fast path of inference then returns no leaves."""
        self._track_in_eval = enabled
        if self.router is not None:
            self.router.track_usage(enabled)
        self._find_direct()

    def reset_usage(self) -> None:
        """Forget the rows counted so far."""
        self._counts().zero_()

    def hardening_loss(self) -> Tensor:
        """Mean node entropy (nats, scalar, differentiable) of the last training forward with surrogate="soft"."""
        if self._entropy is None:
            raise RuntimeError('hardening_loss() needs a forward in training mode with surrogate="soft" first')
        return self._entropy.mean()

    def soft(self, x: Tensor) -> Mixed:
        """The 2023 soft layer on x (..., in_features): y, node entropies (trees, nodes) in nats, mixture of leaves."""
        if self.router is not None:
            raise ShapeError(f"a layer with paths={self.config.paths} has no soft form, only greedy trees")
        check_shapes(x, self._weights(), self.config)
        check_dtypes(x, **self._weights()._asdict())
        rows = x.reshape(-1, self.config.in_features)
        leak = self.region_leak if self.training else 0.0
        mixed = reference.forward_soft(rows, self._weights(), config=self.config, region_leak=leak)
        lead = x.shape[:-1]
        y = mixed.y.reshape(*lead, self.config.out_features)
        return Mixed(y, mixed.entropy, mixed.mixture.reshape(*lead, *mixed.mixture.shape[1:]))

    def _dense_cost_forward(self, x: Tensor) -> Tensor:
        if self.surrogate == "soft":
            mixed = self.soft(x)
            self._entropy = mixed.entropy
            self._count(mixed.mixture.detach().argmax(-1))
            return mixed.y
        check_shapes(x, self._weights(), self.config)
        rows = x.reshape(-1, self.config.in_features)
        straight = self.surrogate == "straight_through"
        routed = reference.forward_masked(rows, self._weights(), config=self.config, straight_through=straight)
        self._count(routed.leaf)
        return routed.y.reshape(*x.shape[:-1], self.config.out_features)

    def _weights(self) -> Weights:
        """The tensors in use: the parameters, or what stands in their place, as a parametrization's or pruning's."""
        return Weights(self.w_in, self.b_in, self.w_out, self.b_out)

    def _count(self, leaf: Tensor) -> None:
        if leaf.is_meta or is_side_effect_free():
            return
        with torch.no_grad():
            add_counts(self._counts(), leaf)

    def _counts(self) -> Tensor:
        """The counters, real where the weights are: loading may put weights in place of a layer without memory."""
        if self.router is not None:
            return self.router.counts
        if self._leaf_counts.is_meta and not self.w_in.is_meta:
            self._leaf_counts = torch.zeros_like(self._leaf_counts, device=self.w_in.device)
        return self._leaf_counts

    def joined(self) -> ConditionalFeedforward:
        """A layer with paths as one with a router of its own and a copy of the weights. ShapeError without paths."""
        if self.router is None:
            raise ShapeError("joined() needs a layer with paths, this one has paths=None")
        return self.router.joined(self._weights())

    @property
    def active_neurons(self) -> int:
        """Neurons evaluated for one row, over all trees."""
        return self.config.active_neurons

    @property
    def flops_per_row(self) -> int:
        """Floating-point operations of one row, routing included."""
        return self.config.flops_per_row

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"{c.in_features}, {c.out_features}, {c.name}, node_output={c.node_output}, activation={c.activation!r}, "
            f"bias={c.bias}, neurons={c.neurons}, active={c.active_neurons}"
        )

    @classmethod
    def from_published(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        depth: int | None = None,
        activation: Activation | None = None,
        **options: Any,
    ) -> Self:
        """Layer from a published state dict, dtype kept.

        UltraFastBERT: `linear_in.weight`, `linear_in.bias` (optional), `linear_out.weight`; needs `depth`,
        trees follow from the shape. fastfeedforward: `node_weights`, `node_biases`, `w1s`, `b1s`, `w2s`, `b2s`.
        activation: default gelu for the first and relu for the second, as published. options: as for FFF.
        Raises CheckpointError naming a missing, extra or misshapen tensor, or an unknown layout.
        Source: pbelcak/UltraFastBERT and pbelcak/fastfeedforward.
        """
        arguments, weights = read_published(state_dict, depth)
        if activation is not None:
            arguments["activation"] = activation
        dtype = next(iter(weights.values())).dtype
        device = options.pop("device", None) or next(iter(weights.values())).device
        layer = cls(**{**arguments, "dtype": dtype, **options, "device": "meta"}).to_empty(
            device=device
        )  # no random draws
        layer.reset_usage()
        with torch.no_grad():
            for name, value in weights.items():
                getattr(layer, name).copy_(value)
        return layer


_forward = FFF.forward


def _outside_graphs() -> Callable[[FFF, Tensor], Routed]:
    """`_quantized_forward` for torch.compile to leave alone."""
    return cast(Callable[[FFF, Tensor], Routed], torch.compiler.disable(FFF._quantized_forward))


def _check_sparse(surrogate: str | None, paths: int | None) -> None:
    if surrogate is not None:
        raise ValueError(f"sparse_grad needs surrogate None, got {surrogate!r}, whose gradients reach every row")
    if paths is not None:
        raise ValueError(f"sparse_grad needs paths None, got {paths}: only greedy descents have sparse gradients")


def _parameter(shape: tuple[int, ...] | None, make: dict[str, Any]) -> nn.Parameter | None:
    return None if shape is None else nn.Parameter(torch.empty(shape, **make))


def _check_surrogate(surrogate: str | None, region_leak: float, config: TreeConfig) -> None:
    if surrogate not in (None, "straight_through", "soft"):
        raise ValueError(f"surrogate {surrogate!r} is not None, 'straight_through' or 'soft'")
    if surrogate == "soft" and (config.node_output or config.gate is not None):
        raise ShapeError(
            f"surrogate 'soft' needs node_output=False and gate=None, got {config.node_output} and {config.gate!r}"
        )
    if surrogate is not None and config.paths is not None:
        raise ShapeError(f"surrogate {surrogate!r} is for greedy trees, got paths={config.paths}")
    if not 0.0 <= region_leak <= 0.5:
        raise ValueError(f"region_leak {region_leak} is not in [0, 0.5]")
