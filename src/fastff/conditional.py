"""ConditionalFeedforward: leaves of neurons behind any router.

Shapes  input (..., in_features), output (..., out_features), any float dtype.
Cost    `active_neurons` per row, of `neurons` stored; `flops_per_row` counts routing too.
Errors  ShapeError when the last dimension is not in_features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from fastff.config import (
    ACTIVATIONS,
    Activation,
    Quantization,
    SizedLayer,
    TreeConfig,
    check_addressable,
    check_quantization,
)
from fastff.errors import ShapeError
from fastff.ops import conditional_interface
from fastff.ops.conditional_interface import check_shapes, conditional_matmul
from fastff.ops.followed import RECHECK, FollowedPack
from fastff.ops.native_conditional import PackedLeaves
from fastff.ops.quantized import check_quantized_call
from fastff.ops.weights import Leaves
from fastff.routers import Chosen, Router, RouterConfig, Usage, make_router

LEAF_STD = 0.02  # with it every layer of the comparison of routers was trained


@dataclass(frozen=True, kw_only=True)
class ConditionalConfig:
    """Everything about a ConditionalFeedforward but its weights.

    router       of its router, which reads the first `router.in_features` features of a row; None for a router that is
                 not one of fastff's
    leaves       stored, each of leaf_width neurons
    activation   as in TreeConfig
    bias         whether the leaves have b_in and b_out

    Raises ShapeError (a ValueError) for a value outside its range, or a router whose leaves are not these.
    """

    in_features: int
    out_features: int
    router: RouterConfig | None
    leaves: int
    leaf_width: int
    activation: Activation = "swiglu"
    bias: bool = False

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features", "leaves", "leaf_width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ShapeError(f"{name} {value!r} is not an integer of at least 1")
        if self.activation not in ACTIVATIONS:
            raise ShapeError(f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.router is not None:
            if self.router.in_features > self.in_features:
                raise ShapeError(f"the router reads {self.router.in_features} features, the layer {self.in_features}")
            check_leaves(self.router.leaves, self.leaves)
        check_addressable(self.leaves * max(self.leaf_in_rows * self.in_features, self.leaf_width * self.out_features))

    @property
    def leaf_in_rows(self) -> int:
        """Rows of w_in that belong to one leaf."""
        return self.leaf_width * (2 if self.activation == "swiglu" else 1)

    @property
    def neurons(self) -> int:
        """Neurons stored."""
        return self.leaves * self.leaf_width

    @property
    def chosen(self) -> int:
        """Leaves of a row. Raises ValueError for a router that is not one of fastff's."""
        return self._known_router.k

    @property
    def routing_scores(self) -> int:
        """Scores, of routing_features products, that choose the leaves of one row. Raises ValueError likewise."""
        return self._known_router.scores_per_row

    @property
    def routing_features(self) -> int:
        """Features of a row that its router reads. Raises ValueError likewise."""
        return self._known_router.in_features

    @property
    def _known_router(self) -> RouterConfig:
        if self.router is None:
            raise ValueError(
                "the router is not one of fastff's: only it knows how many leaves it chooses, and its cost"
            )
        return self.router

    @property
    def name(self) -> str:
        """As `parse_layer` reads it: `flat-96x32-top3`, `pk-784x4-top24`, `1x8-leaf12-paths8`; `-reads128` follows if
        the router reads so many features of a row, not all, and the activation if it is not swiglu. Raises ValueError
        for a router that such a name cannot say."""
        router = self.router
        if router is None or router.kind == "tree":
            raise ValueError(f"no name says a layer with the router {router}")
        end = "" if router.in_features == self.in_features else f"-reads{router.in_features}"
        end += "" if self.activation == "swiglu" else f"-{self.activation}"
        if router.kind == "paths":
            return f"{router.trees}x{router.depth}-leaf{self.leaf_width}-paths{router.chosen}{end}"
        short = "flat" if router.kind == "flat" else "pk"
        return f"{short}-{self.leaves}x{self.leaf_width}-top{router.chosen}{end}"


_END = rf"(?:-reads(?P<reads>\d+))?(?:-(?P<activation>{'|'.join(ACTIVATIONS)}))?"
_NAMES = (
    re.compile(r"(?P<kind>flat|pk)-(?P<leaves>\d+)x(?P<leaf_width>\d+)-top(?P<k>\d+)" + _END),
    re.compile(r"(?P<trees>\d+)x(?P<depth>\d+)(?:-leaf(?P<leaf_width>\d+))?-paths(?P<paths>\d+)" + _END),
)


def parse_layer(name: str) -> dict[str, Any]:
    """The description (`fastff.models.feedforward`) of a layer with the name of a ConditionalConfig or a TreeConfig.

    Raises ValueError for a name of another form, or product keys whose number is not a square.
    """
    found = next((match for form in _NAMES if (match := form.fullmatch(name))), None)
    if found is None:
        return _parse_tree(name)
    text = found.groupdict()
    activation, kind = text.pop("activation") or "swiglu", text.pop("kind", None)
    reads = text.pop("reads")
    sizes = {size: int(value or 1) for size, value in text.items()} | ({} if reads is None else {"reads": int(reads)})
    if kind == "pk":
        leaves = sizes.pop("leaves")
        sizes["n"] = math.isqrt(leaves)
        if sizes["n"] ** 2 != leaves:
            raise ValueError(f"{leaves} leaves of product keys in {name!r} are not a square number")
    return {"kind": {"flat": "flat", "pk": "product_key", None: "paths"}[kind], **sizes, "activation": activation}


def check_leaves(router: int, layer: int) -> None:
    """Raise ShapeError unless a router knows as many leaves as its layer has."""
    if router != layer:
        raise ShapeError(f"the router chooses among {router} leaves, the layer has {layer}: expected one number")


def _parse_tree(name: str) -> dict[str, Any]:
    try:
        tree = asdict(TreeConfig.parse(name, in_features=1))
    except ShapeError as error:
        forms = "flat-96x32-top3, pk-784x4-top24 or 1x8-leaf12-paths8, with -gelu or another activation at its end"
        raise ValueError(f"layer {name!r} is not of the form {forms}, nor a tree: {error}") from error
    said = ("depth", "trees", "leaf_width", "node_output", "activation", "gate", *(["paths"] if tree["paths"] else []))
    return {"kind": "fff", **{option: tree[option] for option in said}}


class ConditionalFeedforward(SizedLayer, nn.Module):
    """Conditional feedforward layer with a router of your choice, a drop-in for `Linear -> activation -> Linear`.

    in_features, out_features  widths of a row; out_features defaults to in_features
    router       TreeRouter, FlatRouter, ProductKeyRouter, or any module that returns leaf (..., k) int64 and gate
                 (..., k) for rows (..., in_features); if it has `leaves`, they must be the layer's. One of fastff's
                 with fewer in_features than the layer reads the first ones of a row, for so much less arithmetic
    leaves, leaf_width, activation, bias  see ConditionalConfig
    backend      a name as for `fastff.ops.conditional_matmul`, or None to choose by device and dtype
    Parameters: w_in (leaves, in_rows, in_features), w_out (leaves, leaf_width, out_features); with bias b_in
    (leaves, in_rows) and b_out (leaves, out_features); and the router's.
    Raises ShapeError (a ValueError) for a size out of range, or a router whose leaves are not the layer's.
    Source: Shazeer et al. 2017, arXiv:1701.06538 (mixtures of experts), with leaves of a few neurons.
    """

    config: ConditionalConfig
    b_in: nn.Parameter | None
    b_out: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        router: nn.Module,
        leaves: int,
        leaf_width: int,
        activation: Activation = "swiglu",
        bias: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_leaves(getattr(router, "leaves", leaves), leaves)
        self.config = config = ConditionalConfig(
            in_features=in_features,
            out_features=in_features if out_features is None else out_features,
            router=router.config if isinstance(router, Router) else None,
            leaves=leaves,
            leaf_width=leaf_width,
            activation=activation,
            bias=bias,
        )
        self.backend = backend
        self.router = router
        self.quantization: Quantization | None = None
        self._packed: FollowedPack[PackedLeaves] = FollowedPack(RECHECK * leaves)  # counts the leaves it reads

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.w_in = parameter(leaves, config.leaf_in_rows, in_features)
        self.w_out = parameter(leaves, leaf_width, config.out_features)
        self.register_parameter("b_in", parameter(leaves, config.leaf_in_rows) if bias else None)
        self.register_parameter("b_out", parameter(leaves, config.out_features) if bias else None)
        self.reset_leaves()

    def reset_leaves(self) -> None:
        """Initialise the leaves: weights of deviation 0.02, no biases."""
        for weight in (self.w_in, self.w_out):
            nn.init.normal_(weight, std=LEAF_STD)
        for bias in (self.b_in, self.b_out):
            if bias is not None:
                nn.init.zeros_(bias)

    def reset_parameters(self) -> None:
        """Initialise leaves and router, whose scores start with unit variance for inputs of unit variance."""
        self.reset_leaves()
        if isinstance(self.router, Router):
            self.router.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features). Raises ShapeError."""
        if self.quantization is not None:
            return _outside_graphs()(self, x)
        leaf, gate = self.router(self._read(x))
        return conditional_matmul(
            x,
            leaf,
            gate.to(x.dtype),
            self.w_in,
            self.w_out,
            activation=self.config.activation,
            b_in=self.b_in,
            b_out=self.b_out,
            backend=self.backend,
            leaf_in_range=isinstance(self.router, Router) and x.is_cuda,
        )

    def _read(self, x: Tensor) -> Tensor:
        """What the router reads of rows (..., in_features)."""
        router = self.config.router
        if router is None or router.in_features == x.shape[-1] or x.shape[-1] != self.config.in_features:
            return x  # rows of another width are for the router to refuse
        return x[..., : router.in_features].contiguous()

    def quantize(self, quantization: Quantization | None) -> Self:
        """Evaluate with leaves in "bf16", or in "int8" with one scale to a row; None returns to the parameters' fp32.

        Every row takes the leaves that it takes in fp32: only values are rounded. For inference on the CPU: no
        gradients, no training. The parameters stay fp32, and so do saved files. Raises ValueError for another name.
        """
        check_quantization(quantization)
        self.quantization = quantization
        self._packed.drop()
        if isinstance(self.router, Router):
            self.router.quantize(quantization)
        return self

    def _quantized_forward(self, x: Tensor) -> Tensor:
        assert self.quantization is not None
        check_quantized_call(self.quantization, x, self.w_in, training=self.training, backend=self.backend)
        with torch.no_grad():
            rows = x.reshape(-1, x.shape[-1]).float()
            leaf, gate = self.router(self._read(rows))
            leaf = leaf.to(torch.int64)
            weights = Leaves(self.w_in, self.b_in, self.w_out, self.b_out)
            check_shapes(rows, leaf, gate, weights, self.config.activation)
            conditional_interface.check_leaves(leaf, self.config.leaves)
            y = self._packed.of(weights, leaf.numel(), partial(self._pack, weights))(rows, leaf, gate.float())
            return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _pack(self, weights: Leaves) -> PackedLeaves:
        w_in, b_in, w_out, b_out = weights
        activation, quantization = self.config.activation, self.quantization
        return PackedLeaves(w_in, w_out, b_in=b_in, b_out=b_out, activation=activation, quantization=quantization)

    def train(self, mode: bool = True) -> Self:
        """As nn.Module's. Entering or leaving training also drops the packed copy of the weights."""
        if mode or self.training:
            self._packed.drop()
        return super().train(mode)

    @torch.no_grad()
    def route(self, x: Tensor) -> Tensor:
        """Leaves (..., k) int64 of each row, ascending. Nothing is counted or balanced."""
        training = self.router.training
        try:
            return cast(Chosen, self.router.eval()(self._read(x))).leaf
        finally:
            self.router.train(training)

    def usage(self, x: Tensor | None = None) -> Usage:
        """As of `Router.usage`."""
        return cast(Router, self.router).usage(None if x is None else self._read(x))

    def track_usage(self, enabled: bool = True) -> None:
        """Count leaves in evaluation too."""
        cast(Router, self.router).track_usage(enabled)

    def reset_usage(self) -> None:
        """Forget the rows counted so far."""
        cast(Router, self.router).reset_usage()

    @property
    def active_neurons(self) -> int:
        """Neurons evaluated for one row; a router of your own must say its `k`."""
        return cast(Router, self.router).k * self.config.leaf_width

    @property
    def flops_per_row(self) -> int:
        """Floating-point operations of one row's matrix work, routing included (a multiply and an add are two); a
        router of your own must say its `k` and its `flops_per_row`."""
        router, c = cast(Router, self.router), self.config
        return router.flops_per_row + 2 * router.k * (c.leaf_in_rows * c.in_features + c.leaf_width * c.out_features)

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"{c.in_features}, {c.out_features}, leaves={c.leaves}, leaf_width={c.leaf_width}, "
            f"activation={c.activation!r}, bias={c.bias}, neurons={c.neurons}"
        )


@cache
def _outside_graphs() -> Callable[[ConditionalFeedforward, Tensor], Tensor]:
    """The quantized forward, for torch.compile to leave alone; made when first needed: that imports the compiler."""
    outside: Callable[[ConditionalFeedforward, Tensor], Tensor]
    outside = torch.compiler.disable(ConditionalFeedforward._quantized_forward)
    return outside


def make_conditional(
    config: ConditionalConfig, *, balance_step: float | None = None, **options: Any
) -> ConditionalFeedforward:
    """The layer with one of fastff's routers that a configuration describes; options: backend, device and dtype."""
    if config.router is None:
        raise ValueError("the configuration has no router to make")
    make = {name: options[name] for name in ("device", "dtype") if name in options}
    step = {} if balance_step is None else {"balance_step": balance_step}
    return ConditionalFeedforward(
        config.in_features,
        config.out_features,
        router=make_router(config.router, **make, **step),
        leaves=config.leaves,
        leaf_width=config.leaf_width,
        activation=config.activation,
        bias=config.bias,
        **options,
    )
