"""The dense model that is to be converted: loaded whole, or refused with the reason."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from fastff.convert.distil import Kind
from fastff.errors import CheckpointError
from fastff.models.families import family_of

AUTO: dict[Kind, Any] = {
    "embedding": AutoModel,
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "classifier": AutoModelForSequenceClassification,
}


def kind_of(config: Any) -> Kind:
    """What a model is used for, by the class that its configuration names."""
    name = (getattr(config, "architectures", None) or [""])[0]
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    if name.endswith("ForSequenceClassification"):
        return "classifier"
    return "masked" if name.endswith("ForMaskedLM") else "embedding"


def load_dense(model: str) -> tuple[Any, Any, Kind]:
    """Model (float32, evaluation mode, on a GPU if there is one), tokenizer and kind.

    Raises CheckpointError for an unknown model type, no weights, or missing tensors."""
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model} has no configuration that Transformers knows: {error}") from error
    family_of(config.model_type)
    kind = kind_of(config)
    try:
        dense, info = AUTO[kind].from_pretrained(model, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model} cannot be loaded: {error}") from error
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise CheckpointError(f"{model} lacks {len(missing)} tensors, {missing[0]} among them")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return dense.to(device).eval(), tokenizer, kind
