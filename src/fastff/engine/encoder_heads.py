"""What follows an encoder: a pooling, and a head of few layers, which PyTorch computes in fp32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastff.engine.facts import REMEDY, HeadFacts, HeadLayer, Pooling
from fastff.errors import CheckpointError
from fastff.io import read_json, read_tensors, reading, write_tensors
from fastff.ops.reference import activate

if TYPE_CHECKING:  # a served export needs no Transformers
    from fastff.models.kinds import Kind

HEAD_FILE = "head.safetensors"
_REMEDY = "take the file from where the model came from"  # of sentence-transformers' settings
_ACTIVATIONS = ("identity", "tanh", "relu", "gelu")
_POOLINGS: dict[str, Pooling] = {
    "cls": "first",
    "mean": "mean",
    "zero_index": "first",
    "masked_avg": "mean",
    "avg": "mean",
}

# Layers of a head by model type: the module's path and the activation after it. A norm has none.
_CLASSIFIERS: dict[str, tuple[tuple[str, str], ...]] = {
    "bert": (("base_model.pooler.dense", "tanh"), ("classifier", "identity")),
    "roberta": (("classifier.dense", "tanh"), ("classifier.out_proj", "identity")),
    "distilbert": (("pre_classifier", "relu"), ("classifier", "identity")),
    "modernbert": (("head.dense", "gelu"), ("head.norm", "identity"), ("classifier", "identity")),
    "ultrafastbert": (("pooler.dense", "tanh"), ("classifier", "identity")),
}
_MASKED: dict[str, tuple[tuple[str, str], ...]] = {
    "bert": (
        ("cls.predictions.transform.dense", "gelu"),
        ("cls.predictions.transform.LayerNorm", "identity"),
        ("cls.predictions.decoder", "identity"),
    ),
    "roberta": (("lm_head.dense", "gelu"), ("lm_head.layer_norm", "identity"), ("lm_head.decoder", "identity")),
    "distilbert": (
        ("vocab_transform", "gelu"),
        ("vocab_layer_norm", "identity"),
        ("vocab_projector", "identity"),
    ),
    "modernbert": (("head.dense", "gelu"), ("head.norm", "identity"), ("decoder", "identity")),
    "ultrafastbert": (("decoder", "identity"),),
}
_SAME_AS = {"xlm-roberta": "roberta", "mpnet": "roberta"}


def pool(hidden: Tensor, lengths: list[int], pooling: Pooling) -> Tensor:
    """(sequences, hidden) of hidden states (tokens, hidden) of sequences that lie end to end."""
    parts = hidden.split(lengths)
    return torch.stack([part[0] if pooling == "first" else part.mean(0) for part in parts])


@dataclass(frozen=True)
class Head:
    """pooling: what it reads, None for every token. layers: of each its activation, weights and, of a norm, epsilon."""

    pooling: Pooling | None
    layers: Sequence[tuple[str, Mapping[str, Tensor], float | None]]

    def __call__(self, rows: Tensor) -> Tensor:
        """Logits (rows, outputs) of pooled or hidden states (rows, hidden)."""
        for activation, weights, epsilon in self.layers:
            weight, bias = weights["weight"], weights.get("bias")
            if epsilon is None:
                rows = F.linear(rows, weight, bias)
            else:
                rows = F.layer_norm(rows, weight.shape, weight, bias, epsilon)
            rows = rows.tanh() if activation == "tanh" else activate(rows, activation)
        return rows


def write_head(model: Any, kind: Kind, folder: Path) -> HeadFacts | None:
    """Write the head of a model, None for one without; returns what `read_head` needs beside the file.

    Raises CheckpointError for a model whose head is not known."""
    if kind == "embedding":
        return None
    table, model_type = (_CLASSIFIERS if kind == "classifier" else _MASKED), model.config.model_type
    paths = table.get(_SAME_AS.get(model_type, model_type))
    if paths is None:
        raise CheckpointError(f"the {kind} head of model type {model_type!r} is not one of {', '.join(table)}")
    tensors: dict[str, Tensor] = {}
    layers = []
    for index, (path, activation) in enumerate(paths):
        module = model.get_submodule(path) if not path.startswith("base_model.") else _below(model, path)
        tensors |= {f"{index}.{name}": t.detach().contiguous().clone() for name, t in module.named_parameters()}
        epsilon = module.eps if isinstance(module, nn.LayerNorm) else None
        layers.append(HeadLayer(activation, epsilon))
    write_tensors(folder / HEAD_FILE, tensors)
    pooling = _POOLINGS.get(_pooler(model.config), "first") if kind == "classifier" else None
    labels = [str(label) for _, label in sorted((model.config.id2label or {}).items())]
    return HeadFacts(pooling, layers, labels if kind == "classifier" else [])


def _pooler(config: Any) -> str:
    return str(getattr(config, "classifier_pooling", None) or getattr(config, "pooler", ""))


def _below(model: Any, path: str) -> nn.Module:
    found: nn.Module = model.base_model.get_submodule(path.removeprefix("base_model."))
    return found


def read_head(facts: HeadFacts | None, folder: Path, hidden: int) -> Head | None:
    """The head, for hidden states of `hidden` numbers, that `write_head` wrote. Raises FileError for a damaged file,
    CheckpointError for a missing or misshapen tensor or an unknown activation."""
    if facts is None:
        return None
    path, width = folder / HEAD_FILE, hidden
    tensors = read_tensors(path, remedy=REMEDY)
    layers = []
    for index, layer in enumerate(facts.layers):
        prefix = f"{index}."
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        if "weight" not in own:
            raise CheckpointError(f"{path} has no tensor {prefix}weight: {REMEDY}")
        if layer.activation not in _ACTIVATIONS:
            raise CheckpointError(f"{folder} has a head with the activation {layer.activation!r}: {REMEDY}")
        width = _checked_width(own, width, layer.epsilon is not None, f"{path}: {prefix}")
        layers.append((layer.activation, own, layer.epsilon))
    if facts.labels and len(facts.labels) != width:
        raise CheckpointError(f"{path} gives {width} logits, for {len(facts.labels)} labels: {REMEDY}")
    return Head(facts.pooling, layers)  # type: ignore[arg-type]


def _checked_width(own: Mapping[str, Tensor], width: int, norm: bool, what: str) -> int:
    """Outputs of a layer that is given rows of `width` numbers."""
    weight = own["weight"]
    if weight.dim() != 2 - norm or weight.shape[-1] != width or not weight.is_floating_point():
        raise CheckpointError(f"{what}weight is {weight.dtype} {tuple(weight.shape)}, for rows of {width}: {REMEDY}")
    bias = own.get("bias")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise CheckpointError(f"{what}bias is {bias.dtype} {tuple(bias.shape)}, expected {len(weight)}: {REMEDY}")
    return len(weight)


def sentence_length(folder: Path) -> int | None:
    """Tokens that sentence-transformers cuts texts to; None without its settings.

    Raises CheckpointError for settings that change texts in a way that the engine does not."""
    length = None
    for path in sorted(folder.glob("sentence_*_config.json")):
        settings = read_json(path, needs={}, remedy=_REMEDY)
        if settings.get("do_lower_case"):
            raise CheckpointError(f"{path.name} sets do_lower_case, which is not one of the engine's")
        found = settings.get("max_seq_length")
        if found is not None and (type(found) is not int or found < 1):
            raise CheckpointError(f"{path.name} says that max_seq_length is {found!r}, expected a positive number")
        length = found or length
    general = folder / "config_sentence_transformers.json"
    if general.is_file():
        name = read_json(general, needs={}).get("default_prompt_name")
        if name is not None:
            raise CheckpointError(f"{general.name} puts the prompt {name!r} before every text: the engine does not")
    return length


def sentence_pooling(folder: Path) -> tuple[Pooling, bool]:
    """How the modules of sentence-transformers in a folder pool, and whether they normalise; the mean without any.

    Raises CheckpointError for modules that the engine does not have."""
    if not (folder / "modules.json").is_file():
        return "mean", False
    pooling: Pooling = "mean"
    normalise = False
    with reading(folder / "modules.json", _REMEDY):
        for module in read_json(folder / "modules.json", remedy=_REMEDY):
            kind = str(module.get("type", "")).rsplit(".", 1)[-1]
            if kind == "Pooling":
                pooling = _pooling_of(read_json(folder / module["path"] / "config.json", needs={}, remedy=_REMEDY))
            elif kind == "Normalize":
                normalise = True
            elif kind != "Transformer":
                raise CheckpointError(f"module {kind} of sentence-transformers is not one of the engine's")
    return pooling, normalise


def _pooling_of(settings: Mapping[str, Any]) -> Pooling:
    mode = settings.get("pooling_mode")  # of newer releases, one name
    chosen = {name.removeprefix("pooling_mode_") for name, on in settings.items() if on is True and "_mode_" in name}
    chosen |= {str(mode)} if mode else set()
    names: dict[str, Pooling] = {"mean_tokens": "mean", "mean": "mean", "cls_token": "first", "cls": "first"}
    if len(chosen) != 1 or not chosen <= set(names):
        raise CheckpointError(f"pooling by {', '.join(sorted(chosen)) or 'nothing'} is not one of the engine's")
    return names[chosen.pop()]
