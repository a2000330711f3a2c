"""The published tensors of UltraFastBERT and crammedBERT, under this project's names.

Source: pbelcak/UltraFastBERT, pbelcak/UltraFastBERT-1x11-long.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastff.errors import CheckpointError
from fastff.layers import FFF
from fastff.models.encoder.configuration import UltraFastBertConfig
from fastff.models.published.fields import ANY_CLASS, GATED_ACTIVATIONS, OWN_CLASSES

_EMBEDDING = "embeddings.word_embeddings.weight"


def class_of(state: Mapping[str, Tensor], content: Mapping[str, Any]) -> str:
    """The published class that wrote a checkpoint: the configuration file's word, else what the tensors' names say.

    Raises CheckpointError for a class that has no counterpart here.
    """
    for name in content.get("architectures") or []:
        if name in OWN_CLASSES:
            return str(name)
        if name != ANY_CLASS:
            raise CheckpointError(f"architectures has {name!r}, supported: {', '.join(OWN_CLASSES)}")
    if any(name.startswith(("head.", "pooler.")) for name in state):
        return "ScriptableLMForSequenceClassification"
    wrapped = any(name.startswith(("encoder.", "decoder.")) for name in state)
    return "ScriptableLMForPreTraining" if wrapped else "ScriptableLM"


def vocab_size(state: Mapping[str, Tensor]) -> int:
    """Tokens that a published checkpoint embeds; its flat configuration does not say. Raises CheckpointError."""
    for prefix in ("encoder.", ""):
        embedding = state.get(f"{prefix}embedding.word_embedding.weight")
        if embedding is not None and embedding.dim() == 2:
            return int(embedding.shape[0])
    raise CheckpointError("tensor encoder.embedding.word_embedding.weight, of two dimensions, is missing")


def state_of(state: Mapping[str, Tensor], config: UltraFastBertConfig, kind: str) -> dict[str, Tensor]:
    """Our tensors from all tensors of a published checkpoint of class `kind`.

    Raises CheckpointError naming a missing, extra or misshapen tensor, a norm_factor that does not fit the heads, or a
    decoder that differs from the embedding it is tied to.
    """
    reader = _Reader(state, "" if kind == "ScriptableLM" else "encoder.")
    own = _embeddings(reader, config)
    for layer in range(config.num_hidden_layers):
        own |= _layer(reader, f"layers.{layer}", config.feedforward_of(layer), config)
    own |= reader.norm("final_norm", "final_norm", config.hidden_size)
    if kind != "ScriptableLM":
        own = {f"encoder.{name}": tensor for name, tensor in own.items()}
    own |= _head(reader, kind, config)
    reader.finish()
    if "decoder.weight" in own and not torch.equal(own["decoder.weight"], own[f"encoder.{_EMBEDDING}"]):
        raise CheckpointError("decoder.weight differs from encoder.embedding.word_embedding.weight, expected equal")
    return {name: tensor.contiguous() for name, tensor in own.items()}


class _Reader:
    """Takes the tensors of a checkpoint one by one, so that what is missing, misshapen or left over is known."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str) -> None:
        self.left = dict(state)
        self.prefix = prefix

    def take(self, name: str, *shape: int) -> Tensor:
        name = self.prefix + name
        tensor = self.left.pop(name, None)
        if tensor is None:
            raise CheckpointError(f"tensor {name} is missing, expected one of shape {shape}")
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"tensor {name} has shape {tuple(tensor.shape)}, expected {shape}")
        return tensor

    def norm(self, name: str, own: str, width: int) -> dict[str, Tensor]:
        return {f"{own}.{part}": self.take(f"{name}.{part}", width) for part in ("weight", "bias")}

    def linear(self, name: str, own: str, shape: tuple[int, int], bias: bool) -> dict[str, Tensor]:
        tensors = {f"{own}.weight": self.take(f"{name}.weight", *shape)}
        if bias:
            tensors[f"{own}.bias"] = self.take(f"{name}.bias", shape[0])
        return tensors

    def finish(self) -> None:
        if self.left:
            raise CheckpointError(f"unexpected tensors {', '.join(sorted(self.left))}")


def _embeddings(reader: _Reader, config: UltraFastBertConfig) -> dict[str, Tensor]:
    width = config.hidden_size
    return {
        _EMBEDDING: reader.take("embedding.word_embedding.weight", config.vocab_size, width),
        "embeddings.position_scale": reader.take("embedding.pos_embedding.scale_factor", 1),
        **reader.norm("embedding.norm", "embeddings.norm", width),
    }


def _layer(
    reader: _Reader, name: str, feedforward: Mapping[str, Any], config: UltraFastBertConfig
) -> dict[str, Tensor]:
    width, heads = config.hidden_size, config.num_attention_heads
    attention, own = f"{name}.attn.self_attention", f"{name}.attention"
    _check_norm_factor(reader, f"{attention}.norm_factor", width // heads)
    qkv = reader.linear(f"{attention}.query_key_value", f"{own}.qkv", (3 * width, width), bool(config.qkv_bias))
    return {
        **reader.norm(f"{name}.norm1", f"{name}.attention_norm", width),
        **{part: _ungroup_heads(tensor, heads) for part, tensor in qkv.items()},
        **reader.linear(f"{name}.attn.dense", f"{own}.output", (width, width), config.attention_bias),
        **reader.norm(f"{name}.norm2", f"{name}.feedforward_norm", width),
        **_feedforward_state(reader, f"{name}.ffn", f"{name}.feedforward", width, feedforward),
    }


def _ungroup_heads(tensor: Tensor, heads: int) -> Tensor:
    """Rows [q k v] of head 0, then of head 1, ... to all q rows, all k rows, all v rows."""
    rows, columns = tensor.shape[0] // (3 * heads), tensor.shape[1:]
    return tensor.reshape(heads, 3, rows, *columns).transpose(0, 1).reshape(tensor.shape)


def _check_norm_factor(reader: _Reader, name: str, head_width: int) -> None:
    factor, expected = reader.take(name), torch.tensor(float(head_width)).rsqrt()
    if not torch.allclose(factor.float(), expected, rtol=1e-2):  # room for checkpoints stored in half precision
        raise CheckpointError(f"{reader.prefix}{name} is {factor.item()}, expected {expected.item()}")


def _feedforward_state(
    reader: _Reader, theirs: str, own: str, width: int, description: Mapping[str, Any]
) -> dict[str, Tensor]:
    if description["kind"] == "fff":
        depth = description["depth"]
        neurons = description["trees"] * (2 ** (depth + 1) - 1)
        state = {
            "linear_in.weight": reader.take(f"{theirs}.linear_in.weight", neurons, width),
            "linear_in.bias": reader.take(f"{theirs}.linear_in.bias", neurons),
            "linear_out.weight": reader.take(f"{theirs}.linear_out.weight", width, neurons),
        }
        layer = FFF.from_published(state, depth=depth)
        return {f"{own}.{name}": tensor for name, tensor in layer.state_dict().items()}
    neurons, gated = description["intermediate_size"], description["activation"] in GATED_ACTIVATIONS.values()
    in_rows = neurons * (2 if gated else 1)
    tensors = reader.linear(f"{theirs}.dense_in", f"{own}.linear_in", (in_rows, width), description["bias"])
    if gated:  # published: value rows, then gate rows
        tensors = {name: torch.cat(tensor.chunk(2)[::-1]) for name, tensor in tensors.items()}
    return tensors | reader.linear(f"{theirs}.dense_out", f"{own}.linear_out", (width, neurons), description["bias"])


def _head(reader: _Reader, kind: str, config: UltraFastBertConfig) -> dict[str, Tensor]:
    reader.prefix = ""
    width, head_dim = config.hidden_size, config.head_dim
    if kind == "ScriptableLMForPreTraining":
        return reader.linear("decoder", "decoder", (config.vocab_size, width), config.decoder_bias)
    if kind == "ScriptableLMForSequenceClassification":
        return {
            **reader.linear("pooler.dense", "pooler.dense", (head_dim, width), True),
            **reader.linear("head", "classifier", (config.num_labels or 0, head_dim), True),
        }
    return {}
