"""Decoder-only models of Transformers in the native engine's terms: one table of names, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fastff.conditional import ConditionalFeedforward
from fastff.engine import conditional_layers
from fastff.engine.native_file import StoredTensor
from fastff.errors import CheckpointError
from fastff.models.families import ACTIVATION_NAMES

Weights = Mapping[str, Tensor]  # by Transformers' names


@dataclass(frozen=True)
class Names:
    """Where an architecture keeps its tensors.

    block       prefix of a block's names, with its number to be filled in
    qkv         names of the projections of queries, keys and values; one name where they are one
    up          names of the projections into the feedforward: gates first where there are two
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
    transposed=True,
    positions="transformer.wpe",
    centred=True,
)
NAMES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "gpt2": _GPT2}


@dataclass(frozen=True)
class Decoder:
    """What a decoder's file holds: the engine's description of the model, and its tensors in the order of execution."""

    model: dict[str, Any]
    tensors: dict[str, StoredTensor]


def describe(config: Any, weights: Weights, conditional: Sequence[ConditionalFeedforward] = ()) -> Decoder:
    """A decoder with this Transformers configuration and these weights, for `write_model`.

    conditional: the feedforward of every block, of one kind; none for dense blocks.

    Raises CheckpointError for a model type or a feature that the engine does not have, and for missing tensors.
    """
    names = NAMES.get(config.model_type)
    if names is None:
        raise CheckpointError(f"model type {config.model_type!r} is not one of {', '.join(NAMES)}")
    model = _model(config, names)
    if conditional:
        model |= {"neurons": 0, "conditional": conditional_layers.common_settings(conditional)}
    return Decoder(model, dict(_tensors(config, names, model, weights, conditional)))


def _model(config: Any, names: Names) -> dict[str, Any]:
    """The header's description (`csrc/model/decoder_load.cpp`)."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    rotated, scale = (0, 1.0) if names.positions else _rotation_facts(config)
    epsilon = config.layer_norm_epsilon if names.centred else config.rms_norm_eps
    return {
        "kind": "decoder",
        "vocab_size": config.vocab_size,
        "hidden": hidden,
        "layers": config.num_hidden_layers,
        "heads": heads,
        "key_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": head_dim,
        "neurons": getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden,
        "positions": _positions(config),
        "rotated": rotated,
        "rotation_scale": scale,
        "score_scale": _score_scale(config, head_dim),
        "activation": _activation(config, names),
        "norm_epsilon": epsilon,
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

    def __init__(self, weights: Weights, names: Names) -> None:
        self._weights, self._transposed = weights, names.transposed

    def get(self, name: str) -> Tensor:
        if name not in self._weights:
            raise CheckpointError(f"tensor {name} is missing")
        return self._weights[name]

    def matrix(self, names: tuple[str, ...]) -> Tensor:
        """(outputs, in_features), the outputs of several one after another."""
        parts = [self.get(f"{name}.weight") for name in names]
        return torch.cat([part.t() if self._transposed else part for part in parts])

    def has(self, name: str) -> bool:
        return name in self._weights

    def vectors(self, names: tuple[str, ...]) -> Tensor:
        return torch.cat([self.get(name) for name in names])


def _dense(
    reader: _Reader, to: str, sources: tuple[str, ...], outputs: int, inputs: int, *, gated: bool = False
) -> Iterator[tuple[str, StoredTensor]]:
    yield to, StoredTensor((outputs, inputs), partial(reader.matrix, sources), "int8", gated)
    biases = tuple(f"{source}.bias" for source in sources)
    if all(map(reader.has, biases)):
        yield f"{to}.bias", StoredTensor((outputs * (1 + gated),), partial(reader.vectors, biases))
    elif any(map(reader.has, biases)):
        raise CheckpointError(f"of {', '.join(biases)} some are missing")


def _norm(reader: _Reader, to: str, source: str, features: int) -> Iterator[tuple[str, StoredTensor]]:
    for part in ("weight", "bias"):
        if part == "weight" or reader.has(f"{source}.{part}"):
            yield f"{to}.{part}", StoredTensor((features,), partial(reader.get, f"{source}.{part}"))


def _block(reader: _Reader, names: Names, model: Mapping[str, Any], number: int) -> Iterator[tuple[str, StoredTensor]]:
    to, of = f"layers.{number}.", names.block.format(number)
    hidden, dim = model["hidden"], model["head_dim"]

    def sources(parts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(of + part for part in parts)

    yield from _norm(reader, f"{to}attention_norm", of + names.attention_norm, hidden)
    qkv = (model["heads"] + 2 * model["key_heads"]) * dim
    yield from _dense(reader, f"{to}qkv", sources(names.qkv), qkv, hidden)
    for kind, name in (("query_norm", names.query_norm), ("key_norm", names.key_norm)):
        if reader.has(f"{of}{name}.weight"):
            yield from _norm(reader, to + kind, of + name, dim)
    yield from _dense(reader, f"{to}out", (of + names.out,), hidden, model["heads"] * dim)
    yield from _norm(reader, f"{to}feedforward_norm", of + names.feedforward_norm, hidden)
    if not model["neurons"]:
        return
    gated = len(names.up) == 2
    yield from _dense(reader, f"{to}up", sources(names.up), model["neurons"], hidden, gated=gated)
    yield from _dense(reader, f"{to}down", (of + names.down,), hidden, model["neurons"])


def _tensors(
    config: Any,
    names: Names,
    model: Mapping[str, Any],
    weights: Weights,
    conditional: Sequence[ConditionalFeedforward],
) -> Iterator[tuple[str, StoredTensor]]:
    reader, hidden, vocab = _Reader(weights, names), model["hidden"], model["vocab_size"]
    if names.positions:
        learned: Callable[[], Tensor] = partial(reader.get, f"{names.positions}.weight")
        yield "positions", StoredTensor((model["positions"], hidden), learned)
    else:
        yield "frequencies", StoredTensor((model["rotated"] // 2,), lambda: _rotary(config).inv_freq)
    embedding, head = f"{names.embedding}.weight", f"{names.head}.weight"
    tied = not reader.has(head) or getattr(config, "tie_word_embeddings", False)
    if not tied:
        yield "embedding", StoredTensor((vocab, hidden), partial(reader.get, embedding), "int8")
    for number in range(model["layers"]):
        yield from _block(reader, names, model, number)
        if conditional:
            yield from conditional_layers.tensors(conditional[number], f"layers.{number}.conditional.")
    yield from _norm(reader, "norm", names.norm, hidden)
    yield "head", StoredTensor((vocab, hidden), partial(reader.get, embedding if tied else head), "int8")
