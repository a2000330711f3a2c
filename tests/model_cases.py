"""Small models and published checkpoints that the tests of `fastff.models` share."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastff.models import UltraFastBertConfig

GOLDEN = Path(__file__).parent / "golden"
FEEDFORWARDS = {
    "fff": {"kind": "fff", "depth": 3, "bias": True},
    "gated_swiglu_leaves": {
        "kind": "fff",
        "depth": 2,
        "trees": 2,
        "leaf_width": 3,
        "node_output": False,
        "activation": "swiglu",
        "gate": "boundary",
    },
    "soft": {"kind": "fff", "depth": 2, "node_output": False, "surrogate": "soft", "region_leak": 0.1},
    "dense": {"kind": "dense", "intermediate_size": 24},
    "dense_swiglu": {"kind": "dense", "intermediate_size": 16, "activation": "swiglu", "bias": True},
    "none": {"kind": "none"},
}


def small_config(**changes: Any) -> UltraFastBertConfig:
    """Two layers of width 16 over 50 tokens, without dropout."""
    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 24,
        "head_dim": 12,
        "feedforward": FEEDFORWARDS["fff"],
    }
    dropouts = ("hidden_dropout_prob", "attention_probs_dropout_prob", "embedding_dropout", "classifier_dropout")
    return UltraFastBertConfig(**{**sizes, **dict.fromkeys(dropouts, 0.0), **changes})


def values(config: UltraFastBertConfig) -> dict[str, Any]:
    """A configuration without the fields that say where and by what it was written."""
    return {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}


def small_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask and labels, each (3, 10): the rows have 10, 7 and 4 tokens, then padding."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, 50, (3, 10), generator=generator)
    attention_mask = (torch.arange(10) < torch.tensor([[10], [7], [4]])).long()
    chosen = (torch.rand(3, 10, generator=generator) < 0.4) & attention_mask.bool()
    return input_ids * attention_mask, attention_mask, torch.where(chosen, input_ids, -100)


def published_arch(**changes: Any) -> dict[str, Any]:
    """The arch of a small published model, one layer of width 16; `changes` maps dotted paths, `__` for the dot."""
    arch: dict[str, Any] = json.loads((GOLDEN / "lm_fff_2l_h48_d3_p1" / "config.json").read_text())["arch"]
    defaults = {
        "hidden_size": 16,
        "num_transformer_layers": 1,
        "intermed_depth": 2,
        "embedding__embedding_dim": 16,
        "embedding__vocab_size": 40,
        "attention__num_attention_heads": 2,
        "classification_head__head_dim": 12,
    }
    for path, value in {**defaults, **changes}.items():
        *parents, key = path.split("__")
        holder = arch
        for parent in parents:
            holder = holder[parent]
        holder[key] = value
    return arch


def published_state(arch: dict[str, Any], labels: int | None = None) -> dict[str, Tensor]:
    """Random tensors of a published masked-language-model checkpoint or, with `labels`, of a classifier's."""
    width, vocabulary = arch["hidden_size"], arch["embedding"]["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.embedding.word_embedding.weight": (vocabulary, width),
        "encoder.embedding.pos_embedding.scale_factor": (1,),
        **_norm_shapes("encoder.embedding.norm", width),
        **_norm_shapes("encoder.final_norm", width),
    }
    for layer in range(arch["num_transformer_layers"]):
        shapes |= _layer_shapes(f"encoder.layers.{layer}", arch)
    if labels is not None:
        head = arch["classification_head"]["head_dim"]
        shapes |= _linear_shapes("pooler.dense", (head, width), True) | _linear_shapes("head", (labels, head), True)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    for layer in range(arch["num_transformer_layers"]):
        head_width = torch.tensor(float(width // arch["attention"]["num_attention_heads"]))
        state[f"encoder.layers.{layer}.attn.self_attention.norm_factor"] = head_width.rsqrt()
    if labels is None:
        state["decoder.weight"] = state["encoder.embedding.word_embedding.weight"].clone()
        if arch["decoder_bias"]:
            state["decoder.bias"] = torch.randn(vocabulary, generator=generator)
    return state


def _norm_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear_shapes(name: str, shape: tuple[int, int], bias: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, **({f"{name}.bias": shape[:1]} if bias else {})}


def _layer_shapes(name: str, arch: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, size, use_bias = arch["hidden_size"], arch["intermed_size"], arch["use_bias"]
    if arch.get("intermed_type", "ff") == "fff":
        neurons = size * (2 ** (arch["intermed_depth"] + 1) - 1)
        feedforward = _linear_shapes(f"{name}.ffn.linear_in", (neurons, width), True)
        feedforward |= _linear_shapes(f"{name}.ffn.linear_out", (width, neurons), False)
    else:
        neurons = size // 2 if "glu" in arch["nonlin"] else size
        feedforward = _linear_shapes(f"{name}.ffn.dense_in", (size, width), use_bias)
        feedforward |= _linear_shapes(f"{name}.ffn.dense_out", (width, neurons), use_bias)
    qkv, qkv_bias = f"{name}.attn.self_attention.query_key_value", arch["attention"]["qkv_bias"]
    return {
        **_norm_shapes(f"{name}.norm1", width),
        **_norm_shapes(f"{name}.norm2", width),
        **_linear_shapes(qkv, (3 * width, width), qkv_bias),
        **_linear_shapes(f"{name}.attn.dense", (width, width), use_bias),
        **feedforward,
    }


def write_published(
    folder: Path, arch: dict[str, Any], state: dict[str, Tensor], *, layout: str = "hub", weights: str = "safetensors"
) -> Path:
    """Write a published directory: layout "hub" (config.json) or "flat" (model_config.json), weights a format."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "flat":
        flat = {**arch, "embedding": {**arch["embedding"], "vocab_size": None}}
        (folder / "model_config.json").write_text(json.dumps(flat))
    else:
        classifier = "head.weight" in state
        config: dict[str, Any] = {
            "arch": arch,
            "architectures": [f"ScriptableLMFor{'SequenceClassification' if classifier else 'PreTraining'}"],
            "model_type": "crammedBERT",
            "torch_dtype": "float32",
        }
        if classifier:
            config["id2label"] = {str(label): f"LABEL_{label}" for label in range(len(state["head.weight"]))}
        (folder / "config.json").write_text(json.dumps(config))
    if weights == "safetensors":
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(state, folder / "pytorch_model.bin")
    return folder
