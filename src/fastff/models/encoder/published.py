"""The published layout of UltraFastBERT and crammedBERT: its configuration and its tensors, in this project's terms.

Two shapes of configuration exist: `config.json` with `model_type` "crammedBERT" and an `arch` dict, and the flat
`model_config.json` of local checkpoints, which is the `arch` dict itself. Keys that no weight or output depends on are
not read. Source: pbelcak/UltraFastBERT, pbelcak/UltraFastBERT-1x11-long.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastff.errors import CheckpointError
from fastff.layers import FFF

if TYPE_CHECKING:
    from fastff.models.encoder.configuration import UltraFastBertConfig

MODEL_TYPE = "crammedBERT"
OWN_CLASSES = {
    "ScriptableLM": "UltraFastBertModel",
    "ScriptableLMForPreTraining": "UltraFastBertForMaskedLM",
    "ScriptableLMForSequenceClassification": "UltraFastBertForSequenceClassification",
}
_ANY_CLASS = "ScriptableCrammedBERT"  # what the flat configuration names, whatever the class was
_ACTIVATIONS = {"GELU": "gelu", "ReLU": "relu", "SiLU": "silu"}
_GATED_ACTIVATIONS = {"GELUglu": "geglu", "ReLUglu": "reglu", "SiLUglu": "swiglu"}
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "norm": ("LayerNorm",),
    "norm_scheme": ("pre",),
    "objective_layout": ("MLM",),
    "ffn_layer_frequency": (1,),
    "skip_head_transform": (True,),
    "final_norm": (True,),
    "embedding.pos_embedding": ("scaled-sinusoidal",),
    "embedding.normalization": (True,),
    "attention.type": ("self-attention",),
    "attention.causal_attention": (False,),
    "attention.rotary_embedding": (False,),
    "attention.sequence_op": ("torch-softmax",),
    "attention.skip_output_projection": (False,),
    "classification_head.include_ff_layer": (True,),
    "classification_head.nonlin": ("Tanh",),
    "classification_head.pooler": ("avg", "zero_index"),
}
_EMBEDDING = "embeddings.word_embeddings.weight"
_REQUIRED = object()


def is_published(config: Mapping[str, Any]) -> bool:
    """Whether a configuration file's content has one of the two published shapes."""
    flat = "model_type" not in config and "num_transformer_layers" in config
    return config.get("model_type") == MODEL_TYPE or flat


def translated(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of UltraFastBertConfig for a published configuration; vocab_size only if the configuration has it.

    Raises CheckpointError naming a missing key or an architecture that these models do not have.
    """
    flat = config.get("model_type") != MODEL_TYPE
    arch = config if flat else config.get("arch")
    if not isinstance(arch, Mapping):
        raise CheckpointError(f"config of model_type {MODEL_TYPE!r} has arch {arch!r}, expected a dict")
    _check_supported(arch)
    names = [OWN_CLASSES[name] for name in config.get("architectures") or [] if name in OWN_CLASSES]
    return {
        "model_type": "ultrafastbert",
        "architectures": names or None,
        **({} if flat else _shared_fields(config)),
        **_labels(config, arch),
        **_sizes(arch),
        **_options(arch),
    }


def class_of(state: Mapping[str, Tensor], content: Mapping[str, Any]) -> str:
    """The published class that wrote a checkpoint: the configuration file's word, else what the tensors' names say.

    Raises CheckpointError for a class that has no counterpart here.
    """
    for name in content.get("architectures") or []:
        if name in OWN_CLASSES:
            return str(name)
        if name != _ANY_CLASS:
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


def _get(arch: Mapping[str, Any], path: str, default: Any = _REQUIRED) -> Any:
    value: Any = arch
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            if default is _REQUIRED:
                raise CheckpointError(f"arch has no value for {path}")
            return default
        value = value[key]
    return value


def _integer(arch: Mapping[str, Any], path: str) -> int:
    value = _get(arch, path)
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"arch has {path} {value!r}, expected an integer")
    return value


def _check_supported(arch: Mapping[str, Any]) -> None:
    for path, supported in _SUPPORTED.items():
        value = _get(arch, path, supported[0])
        if value not in supported:
            raise CheckpointError(f"arch has {path} {value!r}, supported: {', '.join(map(repr, supported))}")
    width = _integer(arch, "hidden_size")
    embedding = _get(arch, "embedding.embedding_dim", width)
    if embedding != width:
        raise CheckpointError(f"arch has embedding.embedding_dim {embedding!r}, supported: hidden_size {width}")


def _shared_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = {"dtype": config.get("dtype", config.get("torch_dtype")), "problem_type": config.get("problem_type")}
    return {name: value for name, value in fields.items() if value is not None}


def _labels(config: Mapping[str, Any], arch: Mapping[str, Any]) -> dict[str, Any]:
    """The number of labels is the arch's, from which the head was built; the names count if they are as many."""
    number, names = _get(arch, "num_labels", None), config.get("id2label")
    if names is None or (number is not None and number != len(names)):
        return {} if number is None else {"num_labels": number}
    return {"id2label": names, "label2id": {name: int(index) for index, name in names.items()}}


def _sizes(arch: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {
        "hidden_size": _integer(arch, "hidden_size"),
        "num_hidden_layers": _integer(arch, "num_transformer_layers"),
        "num_attention_heads": _integer(arch, "attention.num_attention_heads"),
        "max_position_embeddings": _integer(arch, "embedding.max_seq_length"),
        "head_dim": _get(arch, "classification_head.head_dim", 1024),
        "pad_token_id": _get(arch, "embedding.pad_token_id", None),
        "feedforward": _feedforward(arch),
    }
    vocab_size = _get(arch, "embedding.vocab_size", None)
    return sizes if vocab_size is None else {"vocab_size": vocab_size, **sizes}


def _options(arch: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "feedforward_init": "published",
        "initializer_range": _get(arch, "init.std", 0.02),
        "layer_norm_eps": _get(arch, "norm_eps", 1e-12),
        "hidden_dropout_prob": _get(arch, "hidden_dropout_prob", 0.1),
        "attention_probs_dropout_prob": _get(arch, "attention.dropout_prob", 0.1),
        "embedding_dropout": _get(arch, "embedding.dropout_prob", 0.1),
        "classifier_dropout": _get(arch, "classification_head.classifier_dropout", 0.1),
        "attention_bias": _get(arch, "use_bias", False),
        "qkv_bias": _get(arch, "attention.qkv_bias", False),
        "decoder_bias": _get(arch, "decoder_bias", False),
        "tie_word_embeddings": True,
        "sparse_prediction": bool(_get(arch, "sparse_prediction", False)),
        "pooler": _get(arch, "classification_head.pooler", "avg"),
    }


def _feedforward(arch: Mapping[str, Any]) -> dict[str, Any]:
    kind, nonlin = _get(arch, "intermed_type", "ff"), _get(arch, "nonlin", "GELU")
    known = {"ff": {**_ACTIVATIONS, **_GATED_ACTIVATIONS}, "fff": _ACTIVATIONS}
    if kind not in known:
        raise CheckpointError(f"arch has intermed_type {kind!r}, supported: 'ff', 'fff'")
    if nonlin not in known[kind]:
        raise CheckpointError(
            f"arch has nonlin {nonlin!r}, supported for intermed_type {kind!r}: {', '.join(known[kind])}"
        )
    activation, width = known[kind][nonlin], _integer(arch, "intermed_size")
    if kind == "fff":
        depth = _integer(arch, "intermed_depth")
        return {"kind": "fff", "depth": depth, "trees": width, "activation": activation, "bias": True}
    if nonlin in _GATED_ACTIVATIONS:
        if width % 2:
            raise CheckpointError(f"arch has intermed_size {width}, expected an even number for nonlin {nonlin!r}")
        width //= 2
    bias = _get(arch, "use_bias", False)
    return {"kind": "dense", "intermediate_size": width, "activation": activation, "bias": bias}


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
    neurons, gated = description["intermediate_size"], description["activation"] in _GATED_ACTIVATIONS.values()
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
