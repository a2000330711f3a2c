"""The feedforward layer of one transformer block, built from its description in a model's configuration.

A description is a name that `fastff.conditional.parse_layer` reads, or a dict with `kind` and the options of that kind:

fff    conditional: `depth`, and optionally `trees`, `leaf_width`, `node_output`, `activation`, `gate`, `tau`, `bias`,
       `surrogate`, `region_leak`, `quantization`, with the meaning and the defaults of `fastff.FFF`; with `shared` it
       is a ConvertedFeedforward, trees with so many (or 0) ordinary neurons beside them and an output bias, and
       `shared_activation` is theirs
paths, flat, product_key  conditional, behind another router: `depth`, `trees` (default 1) and `paths`; `leaves` and
       `k`; `n` and `k`, with the meaning of `fastff.TreeRouter`, `FlatRouter`, `ProductKeyRouter`; for all of them
       `leaf_width`, and optionally `activation` (default "swiglu"), `bias`, `gate`, `balance_step`, `quantization` and
       `reads`, how many features of a row, its first, the router reads (default all); `shared` and `shared_activation`
       as above
dense  `intermediate_size`, and optionally `activation` (default "gelu") and `bias` (default False)
none   no feedforward at all: the baseline that shows what attention does alone
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastff.conditional import ConditionalFeedforward, parse_layer
from fastff.config import Quantization
from fastff.errors import ShapeError
from fastff.layers import FFF
from fastff.ops.reference import activate
from fastff.routers import FlatRouter, ProductKeyRouter, Router, TreeRouter
from fastff.routers.modules import BALANCE_STEP

GATED_ACTIVATIONS = {"geglu": "gelu", "reglu": "relu", "swiglu": "silu"}
DENSE_ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", *GATED_ACTIVATIONS)

Model = TypeVar("Model", bound=nn.Module)

_NOT_DESCRIBED = ("self", "in_features", "out_features", "backend", "sparse_grad", "device", "dtype")
_SHARED: dict[str, Any] = {"shared": None, "shared_activation": None}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "fff": {
        name: parameter.default
        for name, parameter in inspect.signature(FFF.__init__).parameters.items()
        if name not in _NOT_DESCRIBED
    }
    | _SHARED,
    "dense": {"intermediate_size": inspect.Parameter.empty, "activation": "gelu", "bias": False},
    "none": {},
}
_ROUTERS: dict[str, tuple[Callable[..., Router], dict[str, Any]]] = {  # and what sizes them
    "paths": (TreeRouter, {"depth": inspect.Parameter.empty, "trees": 1, "paths": inspect.Parameter.empty}),
    "flat": (FlatRouter, {"leaves": inspect.Parameter.empty, "k": inspect.Parameter.empty}),
    "product_key": (ProductKeyRouter, {"n": inspect.Parameter.empty, "k": inspect.Parameter.empty}),
}
_ROUTER_OPTIONS = {"gate": "normalised", "balance_step": BALANCE_STEP}
_LEAF_OPTIONS = {"leaf_width": inspect.Parameter.empty, "activation": "swiglu", "bias": False}
_MORE: dict[str, Any] = {"quantization": None, "reads": None, **_SHARED}
_DEFAULTS |= {kind: sizes | _LEAF_OPTIONS | _ROUTER_OPTIONS | _MORE for kind, (_, sizes) in _ROUTERS.items()}


class DenseFeedforward(nn.Module):
    """Ordinary feedforward `Linear -> activation -> Linear`, every neuron for every row.

    in_features        width of a row, before and after
    intermediate_size  neurons; a neuron of a gated activation (geglu, reglu, swiglu) has two input rows
    activation         one of DENSE_ACTIVATIONS
    bias               whether both projections have one

    Shapes: (..., in_features) to (..., in_features). `linear_in.weight` holds all gate rows, then all value rows.
    Raises ShapeError for a size that is not positive, ValueError for an unknown activation.
    """

    def __init__(
        self,
        in_features: int,
        *,
        intermediate_size: int,
        activation: str = "gelu",
        bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(intermediate_size, bool) or not isinstance(intermediate_size, int) or intermediate_size < 1:
            raise ShapeError(f"intermediate_size {intermediate_size!r} is not an integer of at least 1")
        if activation not in DENSE_ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is not one of {', '.join(DENSE_ACTIVATIONS)}")
        in_rows = intermediate_size * (2 if activation in GATED_ACTIVATIONS else 1)
        self.activation = activation
        self.linear_in = nn.Linear(in_features, in_rows, bias=bias, device=device)
        self.linear_out = nn.Linear(intermediate_size, in_features, bias=bias, device=device)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear_out(self.values(x))
        return y

    def values(self, x: Tensor) -> Tensor:
        """Neuron values (..., neurons): what `linear_out` reads."""
        scores: Tensor = self.linear_in(x)
        if self.activation in GATED_ACTIVATIONS:
            gate, value = scores.chunk(2, dim=-1)
            return activate(gate, GATED_ACTIVATIONS[self.activation]) * value
        return activate(scores, self.activation)

    @property
    def neurons(self) -> int:
        """Neurons stored."""
        return self.linear_out.in_features

    @property
    def active_neurons(self) -> int:
        """Neurons evaluated for one row: all of them."""
        return self.neurons

    @property
    def flops_per_row(self) -> int:
        """Floating-point operations of one row's matrix work (a multiply and an add are two)."""
        layers = (self.linear_in, self.linear_out)
        return 2 * sum(layer.in_features * layer.out_features for layer in layers)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, neurons={self.neurons}"


class ConvertedFeedforward(nn.Module):
    """What stands in a dense layer's place: the described layer plus an output bias, (..., hidden) to (..., hidden).

    The description of a conditional layer may add `shared`: neurons of an ordinary layer beside it, computed for every
    row; their activation is `shared_activation` (default: the leaves' own, swiglu where they are gated).
    masked_training: while training, conditional layers are computed by dense products and a mask: the same function
    at dense cost, faster than conditional kernels for small layers on a GPU.
    """

    def __init__(
        self, description: Mapping[str, Any], hidden_size: int, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        main, beside = split_shared(description)
        layer = build_feedforward(main, hidden_size, device=device)
        assert not isinstance(layer, ConvertedFeedforward), "the shared part was split off"
        self.layer = layer
        self.shared: DenseFeedforward | None = None
        if beside is not None:
            self.shared = DenseFeedforward(hidden_size, **beside, device=device)
            self.shared.linear_out.register_parameter("bias", None)  # there is one for the sum
        self.bias = nn.Parameter(torch.zeros(hidden_size, device=device))
        self._masked = False

    def forward(self, x: Tensor) -> Tensor:
        # New memory for every sum: a hook may keep what a part gave, or give the same tensor again and again.
        if self.layer is None:
            return self.bias.expand_as(x).clone(memory_format=torch.contiguous_format)
        if self._masked and self.training and isinstance(self.layer, ConditionalFeedforward):
            y = masked_leaves(self.layer, x)
        else:
            y = self.layer(x)
        if self.shared is not None:
            y = y + self.shared(x)
        return y + self.bias

    @property
    def masked_training(self) -> bool:
        """Whether conditional layers are computed by dense products and a mask while training."""
        return self._masked

    @masked_training.setter
    def masked_training(self, enabled: bool) -> None:
        self._masked = enabled
        if isinstance(self.layer, FFF):
            self.layer.masked_training = enabled

    @property
    def neurons(self) -> int:
        """Neurons stored, those of the shared part too."""
        return sum(part.neurons for part in (self.layer, self.shared) if part is not None)

    @property
    def active_neurons(self) -> int:
        """Neurons evaluated for one row, those of the shared part too."""
        return sum(part.active_neurons for part in (self.layer, self.shared) if part is not None)

    @property
    def flops_per_row(self) -> int:
        """Floating-point operations of one row's matrix work, routing included; 0 without a layer."""
        return sum(part.flops_per_row for part in (self.layer, self.shared) if part is not None)


def masked_leaves(layer: ConditionalFeedforward, x: Tensor) -> Tensor:
    """What the layer gives for x (..., in_features), by products over all leaves: gates are zero where a row does not
    take a leaf."""
    leaf, gate = layer.router(x)
    gates = torch.zeros(*leaf.shape[:-1], layer.config.leaves, device=x.device, dtype=gate.dtype)
    gates = gates.scatter(-1, leaf.long(), gate)
    y: Tensor = F.linear(leaf_values(layer, x, gates), layer.w_out.flatten(0, 1).t())
    return y if layer.b_out is None else y + F.linear(gates.to(x.dtype), layer.b_out.t())


def leaf_values(layer: ConditionalFeedforward, x: Tensor, gates: Tensor) -> Tensor:
    """Neurons of all leaves (..., leaves x leaf_width) for x (..., in_features), times the gates (..., leaves)."""
    scores = F.linear(x, layer.w_in.flatten(0, 1), None if layer.b_in is None else layer.b_in.flatten())
    value = activate(scores.unflatten(-1, layer.w_in.shape[:2]), layer.config.activation)
    return (value * gates.to(value.dtype).unsqueeze(-1)).flatten(-2)


def split_shared(description: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The description without `shared`, and the options of the shared part, None where there is none.

    Raises ValueError for a number of neurons that is not an integer of at least 0, or beside a kind without leaves.
    """
    if not isinstance(description, Mapping):
        raise ValueError(f"feedforward {description!r} is not a dict with 'kind' and options")
    main = {name: value for name, value in description.items() if name not in ("shared", "shared_activation")}
    neurons = description.get("shared") or 0
    if neurons == 0 and not isinstance(description.get("shared"), bool):
        return main, None
    known = description.get("kind") in ("fff", *_ROUTERS)
    if isinstance(neurons, bool) or not isinstance(neurons, int) or neurons < 1 or not known:
        raise ValueError(f"shared {neurons!r} is not a number of neurons beside leaves: {dict(description)}")
    own = main.get("activation", _DEFAULTS[main["kind"]]["activation"])
    activation = description.get("shared_activation") or own
    return main, {"intermediate_size": neurons, "activation": activation, "bias": True}


def build_feedforward(
    description: Mapping[str, Any] | str, hidden_size: int, *, device: torch.device | str | None = None
) -> FFF | ConditionalFeedforward | DenseFeedforward | ConvertedFeedforward | None:
    """The layer that `description` describes, for rows of `hidden_size`; None for the kind "none".

    Raises ShapeError for a size out of range, ValueError for an unknown kind, option or value.
    """
    options = complete(description)
    kind = options.pop("kind")
    if options.get("shared") is not None:
        return ConvertedFeedforward({"kind": kind, **options}, hidden_size, device=device)
    if kind == "fff":
        own = {name: value for name, value in options.items() if name not in ("shared", "shared_activation")}
        return FFF(hidden_size, **own, device=device)
    if kind == "dense":
        return DenseFeedforward(hidden_size, **options, device=device)
    if kind in _ROUTERS:
        cls, sizes = _ROUTERS[kind]
        reads = hidden_size if options["reads"] is None else options["reads"]
        router = cls(reads, **{name: options[name] for name in (*sizes, *_ROUTER_OPTIONS)}, device=device)
        own = {name: options[name] for name in _LEAF_OPTIONS}
        layer = ConditionalFeedforward(hidden_size, router=router, leaves=router.leaves, **own, device=device)
        return layer.quantize(options["quantization"])
    return None


def quantize(model: Model, quantization: Quantization | None) -> Model:
    """Evaluate every conditional layer of `model` with weights in "bf16" or "int8"; None: as the parameters are.

    The model's configuration notes it, so that `save_pretrained` and `from_pretrained` keep it. Returns the model.
    Raises ValueError for another name. See `fastff.FFF.quantize`.
    """
    for module in model.modules():
        if isinstance(module, FFF | ConditionalFeedforward):
            module.quantize(quantization)
    config = getattr(model, "config", None)
    for name in ("feedforward", "fastff_feedforwards"):  # of UltraFastBERT; of a converted model
        descriptions = getattr(config, name, None) or []
        for description in [descriptions] if isinstance(descriptions, dict) else descriptions:
            if description is not None and description["kind"] in ("fff", *_ROUTERS):
                description["quantization"] = quantization
    return model


def complete(description: Mapping[str, Any] | str) -> dict[str, Any]:
    """The description with every default written out. Raises ValueError for an unknown kind, option or name."""
    if isinstance(description, str):
        description = parse_layer(description)
    if not isinstance(description, Mapping):
        raise ValueError(f"feedforward {description!r} is not a dict with 'kind' and options")
    kind = description.get("kind")
    if kind not in _DEFAULTS:
        raise ValueError(f"feedforward kind {kind!r} is not one of {', '.join(_DEFAULTS)}")
    known = _DEFAULTS[kind]
    given = {name: value for name, value in description.items() if name != "kind"}
    for name in given:
        if name not in known:
            raise ValueError(f"feedforward kind {kind!r} has no option {name!r}, only {', '.join(known) or 'none'}")
    options = {**known, **given}
    for name, value in options.items():
        if value is inspect.Parameter.empty:
            raise ValueError(f"feedforward kind {kind!r} needs the option {name!r}")
    return {"kind": kind, **options}
