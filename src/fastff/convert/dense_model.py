"""The dense model that is to be converted: loaded whole, or refused with the reason."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from fastff.errors import CheckpointError
from fastff.models.families import family_of
from fastff.models.kinds import AUTO, Kind, kind_of


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
