"""The published configuration of UltraFastBERT and crammedBERT, in this project's terms.

Two shapes exist: `config.json` with `model_type` "crammedBERT" and an `arch` dict, and the flat `model_config.json` of
local checkpoints, which is the `arch` dict itself. Keys that no weight or output depends on are not read.
Source: pbelcak/UltraFastBERT, pbelcak/UltraFastBERT-1x11-long.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastff.errors import CheckpointError

MODEL_TYPE = "crammedBERT"
OWN_CLASSES = {
    "ScriptableLM": "UltraFastBertModel",
    "ScriptableLMForPreTraining": "UltraFastBertForMaskedLM",
    "ScriptableLMForSequenceClassification": "UltraFastBertForSequenceClassification",
}
ANY_CLASS = "ScriptableCrammedBERT"  # what the flat configuration names, whatever the class was
_ACTIVATIONS = {"GELU": "gelu", "ReLU": "relu", "SiLU": "silu"}
GATED_ACTIVATIONS = {"GELUglu": "geglu", "ReLUglu": "reglu", "SiLUglu": "swiglu"}
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
    known = {"ff": {**_ACTIVATIONS, **GATED_ACTIVATIONS}, "fff": _ACTIVATIONS}
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
    if nonlin in GATED_ACTIVATIONS:
        if width % 2:
            raise CheckpointError(f"arch has intermed_size {width}, expected an even number for nonlin {nonlin!r}")
        width //= 2
    bias = _get(arch, "use_bias", False)
    return {"kind": "dense", "intermediate_size": width, "activation": activation, "bias": bias}
