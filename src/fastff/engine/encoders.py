"""Encoders of Transformers in the native engine's terms: one table of names, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastff.conditional import ConditionalFeedforward
from fastff.config import ACTIVATIONS, GATES
from fastff.engine import conditional_layers
from fastff.engine.native_file import StoredTensor
from fastff.engine.smoothing import channel_maxima, smoothing
from fastff.errors import CheckpointError
from fastff.layers import FFF
from fastff.models.families import ACTIVATION_NAMES
from fastff.models.feedforward import GATED_ACTIVATIONS, ConvertedFeedforward, DenseFeedforward

Tensors = dict[str, StoredTensor]
Maxima = Mapping[nn.Module, Tensor]  # of the channels before a linear layer; those without are not smoothed


@dataclass(frozen=True)
class Names:
    """Where an architecture keeps its modules: `blocks`, embeddings and `norm` below the base model, others in a block.

    feedforward  of a block: a module of fastff's where it stands there, else `up` and `down` are the projections
    types        embeddings of segments, None where there are none
    norm         the last one, of models that normalise before attention and feedforward; None: they normalise after
    """

    blocks: str
    qkv: tuple[str, ...]
    out: str
    attention_norm: str
    feedforward_norm: str
    feedforward: str
    up: str = ""
    down: str = ""
    words: str = "embeddings.word_embeddings"
    positions: str | None = "embeddings.position_embeddings"
    types: str | None = None
    embedding_norm: str = "embeddings.LayerNorm"
    norm: str | None = None


_BERT = Names(
    blocks="encoder.layer",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    out="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    feedforward_norm="output.LayerNorm",
    feedforward="intermediate",
    up="intermediate.dense",
    down="output.dense",
    types="embeddings.token_type_embeddings",
)
_DISTILBERT = Names(
    blocks="transformer.layer",
    qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    out="attention.out_lin",
    attention_norm="sa_layer_norm",
    feedforward_norm="output_layer_norm",
    feedforward="ffn",
    up="ffn.lin1",
    down="ffn.lin2",
)
_OURS = Names(
    blocks="layers",
    qkv=("attention.qkv",),
    out="attention.output",
    attention_norm="attention_norm",
    feedforward_norm="feedforward_norm",
    feedforward="feedforward",
    positions=None,
    embedding_norm="embeddings.norm",
    norm="final_norm",
)
NAMES = {"bert": _BERT, "roberta": _BERT, "xlm-roberta": _BERT, "distilbert": _DISTILBERT, "ultrafastbert": _OURS}


@dataclass(frozen=True)
class Described:
    """What an encoder's file holds: the engine's description, and tensors in the order of execution."""

    model: dict[str, Any]
    tensors: Tensors


def describe(model: Any, *, activation_bits: int = 8) -> Described:
    """A Transformers encoder (with or without a head), dense or conditional, for `write_model`.

    activation_bits: 8 or 16, to which the engine rounds activations before a product. For 8 bits some of a channel's
    size is moved into the weights (`smoothing.py`). Raises CheckpointError for a model type or a feature that the
    engine does not have.
    """
    config, base = model.config, model.base_model
    names = NAMES.get(config.model_type)
    if names is None:
        raise CheckpointError(f"model type {config.model_type!r} is not one of {', '.join(NAMES)}")
    if getattr(config, "is_decoder", False):
        raise CheckpointError("is_decoder is set: the engine's encoders attend in both directions")
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind != "absolute":
        raise CheckpointError(f"positions of kind {kind!r} are not among the engine's: expected 'absolute'")
    tensors: Tensors = {}
    facts = _embeddings(base, config, names, tensors)
    blocks = list(base.get_submodule(names.blocks))
    maxima = channel_maxima(base, facts["vocab_size"], facts["positions"]) if activation_bits == 8 else {}
    feedforwards = [_block(block, config, names, f"layers.{i}.", maxima, tensors) for i, block in enumerate(blocks)]
    if names.norm is not None:
        tensors |= _norm("norm", base.get_submodule(names.norm))
    facts |= {
        "kind": "encoder",
        "layers": len(blocks),
        "heads": config.num_attention_heads,
        "activation_bits": activation_bits,
        "pre_norm": names.norm is not None,
        "norm_epsilon": base.get_submodule(names.embedding_norm).eps,
        "feedforwards": feedforwards,
    }
    return Described(facts, tensors)


def _embeddings(base: Any, config: Any, names: Names, tensors: Tensors) -> dict[str, Any]:
    words = base.get_submodule(names.words).weight
    first = 0
    if names.positions is None:
        positions = base.embeddings.position_scale.detach() * base.embeddings.position_table
    else:
        positions = base.get_submodule(names.positions).weight
        if config.model_type in ("roberta", "xlm-roberta"):  # rows up to the padding's are not for tokens
            first = config.pad_token_id + 1
    types = None if names.types is None else base.get_submodule(names.types).weight
    for name, table in (("embedding", words), ("positions", positions), ("types", types)):
        if table is not None:
            tensors[name] = _stored(table)
    tensors |= _norm("embedding_norm", base.get_submodule(names.embedding_norm))
    return {
        "vocab_size": len(words),
        "hidden": words.shape[1],
        "positions": len(positions) - first,
        "first_position": first,
        "types": 0 if types is None else len(types),
    }


def _block(block: nn.Module, config: Any, names: Names, to: str, maxima: Maxima, tensors: Tensors) -> dict[str, Any]:
    """Adds a block's tensors; returns the description of its feedforward (`csrc/model/encoder_load.cpp`)."""
    norm = block.get_submodule(names.attention_norm)
    tensors |= _norm(f"{to}attention_norm", norm)
    tensors |= _dense(f"{to}qkv", *(block.get_submodule(name) for name in names.qkv), maxima=maxima)
    tensors |= _dense(f"{to}out", block.get_submodule(names.out))
    found = getattr(block, names.feedforward)
    if found is not None:
        last = block.get_submodule(names.feedforward_norm)
        if last.eps != norm.eps:
            raise CheckpointError(f"norms with epsilon {norm.eps} and {last.eps}: the engine has one")
        tensors |= _norm(f"{to}feedforward_norm", last)
    if found is None or isinstance(found, FFF | ConditionalFeedforward | ConvertedFeedforward | DenseFeedforward):
        return _feedforward(found, to, maxima, tensors)
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation", None)
    if activation not in ACTIVATION_NAMES:
        raise CheckpointError(f"activation {activation!r} is not one of {', '.join(ACTIVATION_NAMES)}")
    up, down = block.get_submodule(names.up), block.get_submodule(names.down)
    return _projections(up, down, ACTIVATION_NAMES[activation], to, maxima, tensors)


def _projections(up: Any, down: Any, activation: str, to: str, maxima: Maxima, tensors: Tensors) -> dict[str, Any]:
    if activation in GATED_ACTIVATIONS and activation != "swiglu":
        raise CheckpointError(f"gates of kind {activation!r} are not among the engine's: expected 'swiglu'")
    tensors |= _dense(f"{to}up", up, gated=activation == "swiglu", maxima=maxima)
    tensors |= _dense(f"{to}down", down)
    return {"neurons": down.in_features, "activation": ACTIVATIONS.index(activation)}


def _feedforward(module: nn.Module | None, to: str, maxima: Maxima, tensors: Tensors) -> dict[str, Any]:
    settings: dict[str, Any] = {"neurons": 0, "activation": 0}
    if isinstance(module, ConvertedFeedforward):
        settings = _feedforward(module.layer, to, maxima, tensors)
        if module.shared is not None:
            settings |= _feedforward(module.shared, to, maxima, tensors)
        tensors[f"{to}conditional.bias"] = _stored(module.bias)
    elif isinstance(module, DenseFeedforward):
        settings = _projections(module.linear_in, module.linear_out, module.activation, to, maxima, tensors)
    elif isinstance(module, FFF) and module.router is not None:
        settings = _feedforward(module.joined(), to, maxima, tensors)
    elif isinstance(module, FFF):
        settings["trees"] = _trees(module, f"{to}conditional.", tensors)
    elif isinstance(module, ConditionalFeedforward):
        settings["routed"] = conditional_layers.settings(module)
        tensors |= dict(conditional_layers.tensors(module, f"{to}conditional."))
    return settings


def _trees(layer: FFF, to: str, tensors: Tensors) -> dict[str, Any]:
    c = layer.config
    parts = {name: getattr(layer, name) for name in ("w_in", "b_in", "w_out", "b_out")}
    tensors |= {to + name: _stored(part) for name, part in parts.items() if part is not None}
    settings = {name: getattr(c, name) for name in ("trees", "depth", "leaf_width", "node_output", "tau")}
    gate = 0 if c.gate is None else 1 + GATES.index(c.gate)
    return settings | {"activation": ACTIVATIONS.index(c.activation), "gate": gate}


def _stored(tensor: Tensor) -> StoredTensor:
    kept = tensor.detach()
    return StoredTensor(tuple(kept.shape), lambda: kept)


def _norm(to: str, norm: Any) -> Tensors:
    parts = {"weight": norm.weight, "bias": norm.bias}
    return {f"{to}.{name}": _stored(part) for name, part in parts.items() if part is not None}


def _dense(to: str, *layers: Any, gated: bool = False, maxima: Maxima | None = None) -> Tensors:
    """The projections one after another as one matrix; smoothed where their input's maxima are known."""
    for layer in layers:
        if type(layer) is not nn.Linear:
            raise CheckpointError(f"{to} is made of a {type(layer).__name__}, expected a Linear")
    rows, inputs = sum(layer.out_features for layer in layers), layers[0].in_features
    weights = [layer.weight.detach() for layer in layers]
    largest = (maxima or {}).get(layers[0])
    factors = None if largest is None else smoothing(largest, weights)
    made = {to: StoredTensor((rows // (1 + gated), inputs), lambda: _joined(weights, factors), "int8", gated)}
    if factors is not None:
        made[f"{to}.factors"] = _stored(1 / factors)
    biases = [layer.bias for layer in layers]
    if any(bias is not None for bias in biases):
        parts = [
            torch.zeros(layer.out_features) if bias is None else bias.detach()
            for layer, bias in zip(layers, biases, strict=True)
        ]
        made[f"{to}.bias"] = _stored(torch.cat(parts))
    return made


def _joined(weights: list[Tensor], factors: Tensor | None) -> Tensor:
    joined = torch.cat(weights)
    return joined if factors is None else joined * factors
