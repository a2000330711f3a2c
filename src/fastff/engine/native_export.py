"""Export to the native engine: a directory with the packed weights, the tokenizer and what else generation needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastff.engine import decoders, encoders
from fastff.engine.decoders import Bits
from fastff.engine.encoder_heads import sentence_length, sentence_pooling, write_head
from fastff.engine.facts import MODEL_FILE, DecoderFacts, EncoderFacts, write_facts
from fastff.engine.gguf import Gguf, GgufWeights, configuration
from fastff.engine.gguf_tokenizer import tokenizer_of
from fastff.engine.native_file import write_model
from fastff.errors import CheckpointError, FileError
from fastff.io import replacing_folder
from fastff.models.carried_files import carry
from fastff.models.families import FAMILIES
from fastff.models.kinds import Kind


def check_weights(weights: str, kind: Kind) -> Bits:
    """Raises ValueError for a form of weights that the engine does not have for such a model."""
    if weights == "int8" or (weights == "int4" and kind == "causal"):
        return "int4" if weights == "int4" else "int8"
    raise ValueError(f"weights {weights!r}: the native engine takes 'int8', and of causal models 'int4'")


def export_model(model: Any, tokenizer: Any, out: Path, *, bits: Bits = "int8") -> None:
    """Write a causal model of Transformers, in float32 on the CPU. Raises CheckpointError for one the engine lacks."""
    stop = _numbers(getattr(getattr(model, "generation_config", None), "eos_token_id", None))
    described = decoders.describe(model.config, *_parts(model), bits=bits)
    write(described, tokenizer, stop, out)


def export_encoder(model: Any, tokenizer: Any, source: str, kind: Kind, out: Path, *, activation_bits: int = 8) -> None:
    """Write an encoder of Transformers with its head, in float32 on the CPU, and what sentence-transformers keeps
    beside it in the directory or hub model `source`. activation_bits: of `encoders.describe`. Raises CheckpointError
    for one the engine lacks."""
    described = encoders.describe(model, activation_bits=activation_bits)
    with replacing_folder(out) as folder:
        write_model(folder / MODEL_FILE, described.model, described.tensors)
        head = write_head(model, kind, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        carry(source, folder)
        pooling, normalise = sentence_pooling(folder)
        write_facts(folder, EncoderFacts(pooling, normalise, head, sentence_length(folder)))


def export_gguf(path: Path, out: Path, *, bits: Bits = "int8") -> None:
    """Write the model of a GGUF file; blocks that have no more bits are kept as they are.

    Raises CheckpointError for one that is damaged or that the engine lacks."""
    gguf = Gguf(path)
    config = configuration(gguf)
    stop = gguf.fact("tokenizer.ggml.eos_token_id", int, -1)
    tokenizer = tokenizer_of(gguf)
    try:
        write(
            decoders.describe(config, GgufWeights(gguf, config), bits=bits), tokenizer, [stop] if stop >= 0 else [], out
        )
    except FileError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _parts(model: Any) -> tuple[dict[str, Tensor], list[nn.Module | None]]:
    """Weights by name, and what stands in the place of each block's feedforward."""
    weights: dict[str, Tensor] = model.state_dict()
    if model.config.model_type == "ultrafastbert":
        embeddings = model.encoder.embeddings
        weights["encoder.embeddings.positions.weight"] = embeddings.position_scale * embeddings.position_table
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        return weights, []
    return weights, [getattr(block, family.slot) for block in family.blocks_of(model)]


def _numbers(ids: Any) -> list[int]:
    return [] if ids is None else [int(i) for i in (ids if isinstance(ids, Iterable) else [ids])]


def write(described: decoders.Decoder, tokenizer: Any, stop: Sequence[int], out: Path) -> None:
    """Write a described model as a directory that `fastff.engine.load` opens."""
    with replacing_folder(out) as folder:
        write_model(folder / MODEL_FILE, described.model, described.tensors)
        write_facts(folder, DecoderFacts(list(stop)))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
