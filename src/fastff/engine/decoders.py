"""Decoder-only models of Transformers in the native engine's terms: one table of names, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fastff.config import ACTIVATIONS
from fastff.engine.gguf import GgufWeights
from fastff.engine.native_file import StoredTensor
from fastff.engine.stored_modules import Feedforward, Tensors, feedforward
from fastff.errors import CheckpointError
from fastff.models.families import ACTIVATION_NAMES
from fastff.ops.native_linear import MatrixForm

Weights = Mapping[str, Tensor]  # by Transformers' names
Bits = Literal["int8", "int4"]  # of weights
BODY: dict[Bits, MatrixForm] = {"int8": "int8-groups64", "int4": "int4"}  # of a block's matrices
HEAD: MatrixForm = "int8"  # of embeddings and the prediction of words, which lose most by 4 bits
_KEPT: dict[str, MatrixForm] = {"Q8_0": "int8-groups", "Q4_0": "int4", "Q4_1": "int4-least"}  # types of GGUF


@dataclass(frozen=True)
class Names:
    """Where an architecture keeps its tensors.

    block       prefix of a block's names, with its number to be filled in
    qkv         names of the projections of queries, keys and values; one name where they are one
    up          names of the projections into a dense feedforward: gates first where there are two; none in a family
                whose feedforwards are all modules of fastff's
    epsilon     field of the configuration: of every norm
    transposed  whether matrices are stored (in_features, out_features)
    positions   learned positions, None where heads are rotated
    """

    embedding: str
    block: str
    attention_norm: str
    qkv: tuple[str, ...]
    out: str
    feedforward_norm: str
    up: tuple[str, ...]
    down: str
    norm: str
    epsilon: str = "rms_norm_eps"
    embedding_norm: str | None = None
    head: str = "lm_head"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    transposed: bool = False
    positions: str | None = None
    centred: bool = False  # LayerNorm instead of RMSNorm


_LLAMA = Names(
    embedding="model.embed_tokens",
    block="model.layers.{}.",
    attention_norm="input_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    feedforward_norm="post_attention_layernorm",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    norm="model.norm",
)
_GPT2 = Names(
    embedding="transformer.wte",
    block="transformer.h.{}.",
    attention_norm="ln_1",
    qkv=("attn.c_attn",),
    out="attn.c_proj",
    feedforward_norm="ln_2",
    up=("mlp.c_fc",),
    down="mlp.c_proj",
    norm="transformer.ln_f",
    epsilon="layer_norm_epsilon",
    transposed=True,
    positions="transformer.wpe",
    centred=True,
)
_OURS = Names(
    embedding="encoder.embeddings.word_embeddings",
    embedding_norm="encoder.embeddings.norm",
    block="encoder.layers.{}.",
    attention_norm="attention_norm",
    qkv=("attention.qkv",),
    out="attention.output",
    feedforward_norm="feedforward_norm",
    up=(),
    down="",
    norm="encoder.final_norm",
    epsilon="layer_norm_eps",
    head="decoder",
    positions="encoder.embeddings.positions",
    centred=True,
)
NAMES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": _GPT2,
    "ultrafastbert": _OURS,
}


@dataclass(frozen=True)
class Decoder:
    """What a decoder's file holds: the engine's description of the model, and its tensors in the order of execution."""

    model: dict[str, Any]
    tensors: Tensors


def describe(
    config: Any, weights: Weights, feedforwards: Sequence[nn.Module | None] = (), *, bits: Bits = "int8"
) -> Decoder:
    """A decoder with this Transformers configuration and these weights, for `write_model`.

    feedforwards: what stands in the place of each block's feedforward; modules of fastff's, or none, are stored as they
    are, others are dense and read from the weights by their names, and so are all of them without this argument.
    bits: of the matrices' weights; blocks of a GGUF file that have no more are kept as they are.

    Raises CheckpointError for a model type or a feature that the engine does not have, and for missing tensors.
    """
    names = NAMES.get(config.model_type)
    if names is None:
        raise CheckpointError(f"model type {config.model_type!r} is not one of {', '.join(NAMES)}")
    if not getattr(config, "is_decoder", True) and names is _OURS:
        raise CheckpointError("is_decoder is not set: the engine's decoders look to the left only")
    model = _model(config, names)
    reader, described = _Reader(weights, names, bits), []
    tensors = _first(reader, config, names, model)
    for number in range(model["layers"]):
        found = feedforwards[number] if feedforwards else nn.Identity()
        ours = found is None or isinstance(found, Feedforward)
        tensors |= _block(reader, names, model, number, normed=found is not None)
        to, of = f"layers.{number}.", names.block.format(number)
        if ours:
            described.append(feedforward(found, to, {}, tensors, form=BODY[bits]))
        else:
            described.append(_dense_feedforward(reader, config, names, of, to, model["hidden"], tensors))
    tensors |= _last(reader, config, names, model)
    return Decoder({**model, "feedforwards": described}, tensors)


def _model(config: Any, names: Names) -> dict[str, Any]:
    """The header's description (`csrc/model/decoder_load.cpp`), without feedforwards."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    own = None if names is _OURS else getattr(config, "head_dim", None)  # which means something else there
    head_dim = own or hidden // heads
    rotated, scale = (0, 1.0) if names.positions else _rotation_facts(config)
    return {
        "kind": "decoder",
        "vocab_size": config.vocab_size,
        "hidden": hidden,
        "layers": config.num_hidden_layers,
        "heads": heads,
        "key_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": head_dim,
        "positions": _positions(config),
        "rotated": rotated,
        "rotation_scale": scale,
        "score_scale": _score_scale(config, head_dim),
        "norm_epsilon": getattr(config, names.epsilon),
        "norm_centred": names.centred,
    }


def _positions(config: Any) -> int:
    """At most as many as a sliding window has: up to there it hides nothing."""
    window = getattr(config, "sliding_window", None)
    used = window is not None and getattr(config, "use_sliding_window", True)
    return min(config.max_position_embeddings, window) if used else int(config.max_position_embeddings)


def _score_scale(config: Any, head_dim: int) -> float:
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise CheckpointError("attention scaled by the layer's number is not one of the engine's")
    return float(head_dim**-0.5) if getattr(config, "scale_attn_weights", True) else 1.0


def _activation(config: Any, names: Names) -> str:
    name = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    known = ACTIVATION_NAMES.get(str(name))
    if known is None:
        raise CheckpointError(f"activation {name!r} is not one of {', '.join(ACTIVATION_NAMES)}")
    if len(names.up) == 1:
        return known
    if known != "silu":
        raise CheckpointError(f"gates with {name!r} are not among the engine's: expected 'silu'")
    return "swiglu"


def _rotary(config: Any) -> Any:
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise CheckpointError(f"rotation of kind {kind!r}, which depends on the length, is not one of the engine's")
    return LlamaRotaryEmbedding(config=config)


def _rotation_facts(config: Any) -> tuple[int, float]:
    rotary = _rotary(config)
    return 2 * len(rotary.inv_freq), float(rotary.attention_scaling)


class _Reader:
    """Matrices and vectors of one model by Transformers' names."""

    def __init__(self, weights: Weights, names: Names, bits: Bits) -> None:
        self._weights, self._transposed, self._bits = weights, names.transposed, bits

    def get(self, name: str) -> Tensor:
        if name not in self._weights:
            raise CheckpointError(f"tensor {name} is missing")
        return self._weights[name]

    def matrix(self, names: tuple[str, ...]) -> Tensor:
        """(outputs, in_features), the outputs of several one after another."""
        parts = [self.get(f"{name}.weight") for name in names]
        return torch.cat([part.t() if self._transposed else part for part in parts])

    def stored(
        self, names: tuple[str, ...], shape: tuple[int, int], *, gated: bool = False, head: bool = False
    ) -> StoredTensor:
        """The matrix of `matrix`, to be written: as blocks where the weights have some that need no more bits. head: of
        embeddings or the prediction of words, which no family stores transposed."""
        kept = self._kept(names)
        if kept is None and head:
            return StoredTensor(shape, partial(self.get, f"{names[0]}.weight"), HEAD)
        if kept is None:
            return StoredTensor(shape, partial(self.matrix, names), BODY[self._bits], gated)
        return StoredTensor(shape, partial(self._blocks, names), kept, gated, blocks=True)

    def _kept(self, names: tuple[str, ...]) -> MatrixForm | None:
        if not isinstance(self._weights, GgufWeights):
            return None
        forms = {_KEPT.get(self._weights.type_of(f"{name}.weight")) for name in names if self.has(f"{name}.weight")}
        form = forms.pop() if len(forms) == 1 else None
        return form if form == "int8-groups" or self._bits == "int4" else None

    def _blocks(self, names: tuple[str, ...]) -> Tensor:
        assert isinstance(self._weights, GgufWeights)
        return torch.cat([self._weights.blocks(f"{name}.weight") for name in names])

    def has(self, name: str) -> bool:
        return name in self._weights

    def vectors(self, names: tuple[str, ...]) -> Tensor:
        return torch.cat([self.get(name) for name in names])


def _dense(
    reader: _Reader, to: str, sources: tuple[str, ...], outputs: int, inputs: int, *, gated: bool = False
) -> Tensors:
    made = {to: reader.stored(sources, (outputs, inputs), gated=gated)}
    biases = tuple(f"{source}.bias" for source in sources)
    if all(map(reader.has, biases)):
        made[f"{to}.bias"] = StoredTensor((outputs * (1 + gated),), partial(reader.vectors, biases))
    elif any(map(reader.has, biases)):
        raise CheckpointError(f"of {', '.join(biases)} some are missing")
    return made


def _norm(reader: _Reader, to: str, source: str, features: int) -> Tensors:
    parts = [part for part in ("weight", "bias") if part == "weight" or reader.has(f"{source}.{part}")]
    return {f"{to}.{part}": StoredTensor((features,), partial(reader.get, f"{source}.{part}")) for part in parts}


def _block(reader: _Reader, names: Names, model: Mapping[str, Any], number: int, *, normed: bool) -> Tensors:
    """A block's tensors but those of its feedforward. normed: whether it has one, and so a norm before it."""
    to, of = f"layers.{number}.", names.block.format(number)
    hidden, dim = model["hidden"], model["head_dim"]
    qkv = (model["heads"] + 2 * model["key_heads"]) * dim
    tensors = _norm(reader, f"{to}attention_norm", of + names.attention_norm, hidden)
    tensors |= _dense(reader, f"{to}qkv", tuple(of + part for part in names.qkv), qkv, hidden)
    for kind, name in (("query_norm", names.query_norm), ("key_norm", names.key_norm)):
        if reader.has(f"{of}{name}.weight"):
            tensors |= _norm(reader, to + kind, of + name, dim)
    tensors |= _dense(reader, f"{to}out", (of + names.out,), hidden, model["heads"] * dim)
    if normed:
        tensors |= _norm(reader, f"{to}feedforward_norm", of + names.feedforward_norm, hidden)
    return tensors


def _dense_feedforward(
    reader: _Reader, config: Any, names: Names, of: str, to: str, hidden: int, tensors: Tensors
) -> dict[str, Any]:
    """Adds its tensors; returns its description (`csrc/model/feedforward.h`)."""
    neurons = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    activation = _activation(config, names)
    up = tuple(of + part for part in names.up)
    tensors |= _dense(reader, f"{to}up", up, neurons, hidden, gated=len(names.up) == 2)
    tensors |= _dense(reader, f"{to}down", (of + names.down,), hidden, neurons)
    return {"neurons": neurons, "activation": ACTIVATIONS.index(activation)}


def _first(reader: _Reader, config: Any, names: Names, model: Mapping[str, Any]) -> Tensors:
    """What comes before the blocks."""
    hidden, tensors = model["hidden"], Tensors()
    if names.positions:
        table = f"{names.positions}.weight"
        tensors["positions"] = StoredTensor((model["positions"], hidden), partial(reader.get, table))
    else:
        tensors["frequencies"] = StoredTensor((model["rotated"] // 2,), lambda: _rotary(config).inv_freq)
    if names.embedding_norm:
        tensors |= _norm(reader, "embedding_norm", names.embedding_norm, hidden)
    if not _tied(reader, config, names):
        tensors["embedding"] = reader.stored((names.embedding,), (model["vocab_size"], hidden), head=True)
    return tensors


def _tied(reader: _Reader, config: Any, names: Names) -> bool:
    return not reader.has(f"{names.head}.weight") or getattr(config, "tie_word_embeddings", False)


def _last(reader: _Reader, config: Any, names: Names, model: Mapping[str, Any]) -> Tensors:
    hidden, source = model["hidden"], names.embedding if _tied(reader, config, names) else names.head
    tensors = _norm(reader, "norm", names.norm, hidden)
    tensors["head"] = reader.stored((source,), (model["vocab_size"], hidden), head=True)
    if reader.has(f"{names.head}.bias"):
        bias = partial(reader.get, f"{names.head}.bias")
        tensors["head.bias"] = StoredTensor((model["vocab_size"],), bias)
    return tensors
