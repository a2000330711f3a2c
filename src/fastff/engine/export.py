"""A model directory written in the form that an engine reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import AutoConfig, AutoTokenizer

import fastff.models  # noqa: F401  the Auto classes know our models then
from fastff.engine.facts import FACTS_FILE, OPENVINO_FILE
from fastff.errors import CheckpointError, FileError
from fastff.models.kinds import AUTO, Kind, kind_of

Target = Literal["native", "openvino"]


def export(
    model: str | Path, out: str | Path, *, to: Target, weights: str = "int8", texts: Sequence[str] | None = None
) -> Path:
    """Write a model, dense, narrow or conditional, for inference without PyTorch. Returns `out`.

    model    directory or hub name of a Transformers model, converted ones and UltraFastBERT included
    out      directory to write; an earlier export there is replaced
    to       "native": for `fastff.engine.load` (`docs/engine.md`), where `model` may be a GGUF file too;
             "openvino": an IR with fastff's operations (`docs/openvino.md`)
    weights  "int8", or for OpenVINO "fp32", for causal models in the native engine "int4"
    texts    "openvino": what the ranges of int8 activations are measured on (default: a few plain sentences)

    Raises ValueError for another target or weights, CheckpointError for a model that cannot be loaded or has no such
    form, BackendUnavailable where the target's tools are missing, FileError if `out` cannot be written or holds files
    that no export wrote.
    """
    if to not in get_args(Target):
        raise ValueError(f"to {to!r} is not one of {', '.join(get_args(Target))}")
    _check_replaceable(Path(out))
    if to == "native":
        return _to_native(str(model), Path(out), weights)
    from fastff.engine import openvino

    openvino.check_weights(weights)
    loaded, tokenizer, kind = load_model(str(model))
    if kind == "causal":
        raise CheckpointError(f"{model} is a causal model; to 'openvino' go encoders and classifiers")
    output = "last_hidden_state" if kind == "embedding" else "logits"
    openvino.export(loaded, tokenizer, Path(out), output=output, weights=weights, texts=texts, source=str(model))  # type: ignore[arg-type]
    return Path(out)


def _check_replaceable(out: Path) -> None:
    """Raises FileError unless `out` is absent, empty or an earlier export: it could be the model itself."""
    if out.is_dir() and any(out.iterdir()) and not any((out / name).is_file() for name in (FACTS_FILE, OPENVINO_FILE)):
        raise FileError(f"{out} holds files that no export wrote: choose another directory, or empty it")


def _to_native(model: str, out: Path, weights: str) -> Path:
    from fastff.engine import native_export

    if model.endswith(".gguf"):
        native_export.export_gguf(Path(model), out, bits=native_export.check_weights(weights, "causal"))
        return out
    loaded, tokenizer, kind = load_model(model)
    bits = native_export.check_weights(weights, kind)
    if kind == "causal":
        native_export.export_model(loaded, tokenizer, out, bits=bits)
    else:
        native_export.export_encoder(loaded, tokenizer, model, kind, out)
    return out


def load_model(model: str) -> tuple[Any, Any, Kind]:
    """Model (float32, evaluation mode, on the CPU), tokenizer (None where there is none) and kind.

    Raises CheckpointError for a directory or name without a configuration or weights that Transformers knows, and for
    an image model, which no engine has.
    """
    try:
        kind = kind_of(AutoConfig.from_pretrained(model))
        if kind == "image":
            raise CheckpointError("it reads pictures, expected a model of text")
        loaded = AUTO[kind].from_pretrained(model, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model} cannot be loaded: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError):
        tokenizer = None
    return loaded, tokenizer, kind
