"""Export to the native engine: a directory with the packed weights, the tokenizer and what else generation needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastff.engine import conditional_layers, decoders, encoders
from fastff.engine.encoder_heads import sentence_pooling, write_head
from fastff.engine.gguf import Gguf, GgufWeights, configuration
from fastff.engine.gguf_tokenizer import tokenizer_of
from fastff.engine.native_file import write_model
from fastff.errors import CheckpointError
from fastff.io import read_json, replacing_folder, write_json
from fastff.models.carried_files import carry
from fastff.models.families import FAMILIES
from fastff.models.kinds import Kind

MODEL_FILE, FACTS_FILE, FORMAT = "model.fastff", "engine.json", 1


def check_weights(weights: str) -> None:
    """Raises ValueError for a form of weights that the engine does not have."""
    if weights != "int8":
        raise ValueError(f"weights {weights!r}: the native engine takes 'int8'")


def export_model(model: Any, tokenizer: Any, out: Path) -> None:
    """Write a causal model of Transformers, in float32 on the CPU. Raises CheckpointError for one the engine lacks."""
    stop = _numbers(getattr(model.generation_config, "eos_token_id", None))
    family = FAMILIES.get(model.config.model_type)
    slots = [family.slot_of(block) for block in family.blocks_of(model)] if family else []
    described = decoders.describe(model.config, model.state_dict(), conditional_layers.layers_of(slots))
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
        _write_facts(folder, "encoder", pooling=pooling, normalise=normalise, head=head)


def export_gguf(path: Path, out: Path) -> None:
    """Write the model of a GGUF file. Raises CheckpointError for one that is damaged or that the engine lacks."""
    gguf = Gguf(path)
    config = configuration(gguf)
    stop = _numbers(gguf.metadata.get("tokenizer.ggml.eos_token_id"))
    write(decoders.describe(config, GgufWeights(gguf, config)), tokenizer_of(gguf), stop, out)


def _numbers(ids: Any) -> list[int]:
    return [] if ids is None else [int(i) for i in (ids if isinstance(ids, Iterable) else [ids])]


def write(described: decoders.Decoder, tokenizer: Any, stop: Sequence[int], out: Path) -> None:
    """Write a described model as a directory that `fastff.engine.load` opens."""
    with replacing_folder(out) as folder:
        write_model(folder / MODEL_FILE, described.model, described.tensors)
        _write_facts(folder, described.model["kind"], stop=list(stop))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def _write_facts(folder: Path, kind: str, **more: Any) -> None:
    write_json(folder / FACTS_FILE, {"format": FORMAT, "kind": kind, "weights": "int8", **more})


def read_facts(folder: Path) -> dict[str, Any]:
    """What `engine.json` of an exported directory says. Raises CheckpointError for a directory that is none."""
    path = folder / FACTS_FILE
    remedy = "make one with `fastff export MODEL --to native --out DIR`"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no export for the native engine, it has no {FACTS_FILE}: {remedy}")
    facts: dict[str, Any] = read_json(path, needs={"kind": str}, remedy=remedy)
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"{path} is of another format, expected {FORMAT}: export the model again")
    return facts
