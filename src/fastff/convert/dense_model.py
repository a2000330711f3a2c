"""The dense model that is to be converted: loaded whole, or refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer

from fastff.convert.pictures import patches_of
from fastff.engine.gguf import Gguf, GgufWeights, configuration
from fastff.engine.gguf_tokenizer import tokenizer_of
from fastff.errors import CheckpointError
from fastff.models.converted import load_tensors
from fastff.models.families import family_of
from fastff.models.kinds import AUTO, Kind, kind_of
from fastff.text.positions import token_positions


def load_dense(model: str, *, gguf: bool = False) -> tuple[Any, Any, Kind]:
    """Model (float32, evaluation mode, on a GPU if there is one), tokenizer or image processor, and kind; of a GGUF
    file if its name says so, or gguf.

    Raises CheckpointError for an unknown model type, no weights, missing tensors, or no image processor."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if gguf or model.endswith(".gguf"):
        dense, tokenizer = _of_gguf(Path(model))
        return dense.to(device).eval(), tokenizer, "causal"
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model} has no configuration that Transformers knows: {error}") from error
    family_of(config.model_type)
    kind = kind_of(config)
    _check_head(config, kind)
    processor = _image_processor(model) if kind == "image" else None
    try:
        dense, info = AUTO[kind].from_pretrained(model, dtype=torch.float32, output_loading_info=True)
        processor = AutoTokenizer.from_pretrained(model) if processor is None else processor
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model} cannot be loaded: {error}") from error
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise CheckpointError(f"{model} lacks {len(missing)} tensors, {missing[0]} among them")
    if kind == "image" and len(missing) < len(info["missing_keys"]):
        dense.pooler = None  # never trained: the mean over all positions is what the pictures' features are
    return dense.to(device).eval(), processor, kind


def _image_processor(model: str) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(model)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{model} has no image processor that loads (preprocessor_config.json): {reason}"
        ) from error


def longest_input(model: Any, processor: Any, kind: Kind, most: int) -> int:
    """Tokens that the model takes, at most `most`; of an image model the patches that it makes of every picture."""
    if kind == "image":
        return patches_of(model, processor)
    return int(min(most, token_positions(model.config, most), processor.model_max_length))


def _check_head(config: Any, kind: Kind) -> None:
    name = (getattr(config, "architectures", None) or [""])[0]
    heads = ("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
    if name.endswith(heads) or (kind == "image" and ("For" in name or name.endswith("WithProjection"))):
        without = "AutoModel.from_pretrained(MODEL).save_pretrained(FOLDER)"
        if kind == "image":
            tower = name.replace("WithProjection", "") if name.endswith("WithProjection") else "AutoModel"
            bare = ", add_pooling_layer=False" if config.model_type in ("vit", "deit") else ""
            without = f"{tower}.from_pretrained(MODEL{bare}).save_pretrained(FOLDER), its image processor beside it"
        raise CheckpointError(
            f"{name} has a head that a conversion would lose: convert the model without it, {without}"
        )


def _of_gguf(path: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file. Raises CheckpointError for a damaged file or an unknown architecture."""
    file = Gguf(path)
    config = configuration(file)
    family_of(config.model_type)
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lacking, _ = load_tensors(dense, dict(GgufWeights(file, config).items()), path)
    if lacking:
        raise CheckpointError(f"{path} lacks {len(lacking)} tensors, {lacking[0]} among them")
    dense.config.architectures = [type(dense).__name__]
    stop = file.fact("tokenizer.ggml.eos_token_id", int, -1)
    if stop >= 0:
        dense.generation_config.eos_token_id = stop
    return dense, tokenizer_of(file)
