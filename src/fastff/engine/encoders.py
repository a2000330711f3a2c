"""Encoders of Transformers in the native engine's terms: one table of names, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastff.engine.smoothing import channel_maxima
from fastff.engine.stored_modules import (
    Feedforward,
    Maxima,
    Tensors,
    dense_tensors,
    feedforward,
    norm_tensors,
    projections,
    stored,
)
from fastff.errors import CheckpointError
from fastff.models.families import ACTIVATION_NAMES
from fastff.text.positions import first_position


@dataclass(frozen=True)
class Names:
    """Where an architecture keeps its modules: `blocks`, embeddings and `norm` below the base model, others in a block.

    feedforward  of a block: a module of fastff's where it stands there, else `up` and `down` are the projections
    types        embeddings of segments, None where there are none
    positions    None: heads are rotated, where `rotary` is set, or the model scales a table of its own
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
    rotary: bool = False
    distances: str | None = None  # an embedding of buckets of distances, added to scores


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
_MPNET = replace(
    _BERT,
    qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    out="attention.attn.o",
    attention_norm="attention.LayerNorm",
    types=None,
    distances="encoder.relative_attention_bias",
)
_MODERNBERT = Names(
    blocks="layers",
    qkv=("attn.Wqkv",),
    out="attn.Wo",
    attention_norm="attn_norm",
    feedforward_norm="mlp_norm",
    feedforward="mlp",
    up="mlp.Wi",
    down="mlp.Wo",
    words="embeddings.tok_embeddings",
    positions=None,
    embedding_norm="embeddings.norm",
    norm="final_norm",
    rotary=True,
)
NAMES = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "distilbert": _DISTILBERT,
    "mpnet": _MPNET,
    "modernbert": _MODERNBERT,
    "ultrafastbert": _OURS,
}


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
        tensors |= norm_tensors("norm", base.get_submodule(names.norm))
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
    positions = None
    if names.rotary:
        tensors["frequencies"] = stored(_frequencies(base, config))
    elif names.positions is None:
        positions = base.embeddings.position_scale.detach() * base.embeddings.position_table
    else:
        positions = base.get_submodule(names.positions).weight
        first = first_position(config.model_type, config.pad_token_id)
    types = None if names.types is None else base.get_submodule(names.types).weight
    for name, table in (("embedding", words), ("positions", positions), ("types", types)):
        if table is not None:
            tensors[name] = stored(table)
    tensors |= norm_tensors("embedding_norm", base.get_submodule(names.embedding_norm))
    count = config.max_position_embeddings if positions is None else len(positions) - first
    if names.distances is not None:
        tensors["distances"] = stored(_distance_biases(base, names.distances, count))
    return {
        "vocab_size": len(words),
        "hidden": words.shape[1],
        "positions": count,
        "rotary": names.rotary,
        "distances": names.distances is not None,
        **_windows(config, names),
        "first_position": first,
        "types": 0 if types is None else len(types),
    }


def _frequencies(base: Any, config: Any) -> Tensor:
    """Radians a position (2, head_dim / 2) of layers that see all tokens, then of those with a window."""
    kinds = ("full_attention", "sliding_attention")
    other = next((kind for kind in kinds if config.rope_parameters[kind]["rope_type"] != "default"), None)
    if other is not None:
        raise CheckpointError(f"rotation of type {config.rope_parameters[other]['rope_type']!r}, expected 'default'")
    found = [base.rotary_emb.compute_default_rope_parameters(config, layer_type=kind)[0] for kind in kinds]
    return torch.stack(found).float()


def _windows(config: Any, names: Names) -> dict[str, Any]:
    """Of each layer how many tokens before and after one it attends to, 0 for all."""
    if not names.rotary:
        return {}
    return {"windows": [0 if kind == "full_attention" else config.sliding_window for kind in config.layer_types]}


def _distance_biases(base: Any, path: str, positions: int) -> Tensor:
    """(heads, 2 * positions - 1): of the key's position minus the query's, from 1 - positions on."""
    encoder, table = base.get_submodule(path.rpartition(".")[0]), base.get_submodule(path).weight
    buckets = encoder.relative_position_bucket(torch.arange(1 - positions, positions), num_buckets=len(table))
    biases: Tensor = table.detach()[buckets].T.contiguous()
    return biases


def _block(block: nn.Module, config: Any, names: Names, to: str, maxima: Maxima, tensors: Tensors) -> dict[str, Any]:
    """Adds a block's tensors; returns the description of its feedforward (`csrc/model/encoder_load.cpp`)."""
    norm = block.get_submodule(names.attention_norm)
    if not isinstance(norm, nn.Identity):
        tensors |= norm_tensors(f"{to}attention_norm", norm)
    tensors |= dense_tensors(f"{to}qkv", *(block.get_submodule(name) for name in names.qkv), maxima=maxima)
    tensors |= dense_tensors(f"{to}out", block.get_submodule(names.out))
    found = getattr(block, names.feedforward)
    if found is not None:
        last = block.get_submodule(names.feedforward_norm)
        if last.eps != (epsilon := getattr(norm, "eps", last.eps)):
            raise CheckpointError(f"norms with epsilon {epsilon} and {last.eps}: the engine has one")
        tensors |= norm_tensors(f"{to}feedforward_norm", last)
    if found is None or isinstance(found, Feedforward):
        return feedforward(found, to, maxima, tensors)
    kinds = (getattr(config, name, None) for name in ("hidden_act", "hidden_activation", "activation"))
    activation = next((kind for kind in kinds if kind is not None), None)
    if activation not in ACTIVATION_NAMES:
        raise CheckpointError(f"activation {activation!r} is not one of {', '.join(ACTIVATION_NAMES)}")
    up, down = block.get_submodule(names.up), block.get_submodule(names.down)
    return projections(up, down, ACTIVATION_NAMES[activation], to, maxima, tensors)
