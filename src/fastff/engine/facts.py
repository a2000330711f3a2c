"""`engine.json`: what an exported directory says of its model beside the model file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from fastff.errors import CheckpointError
from fastff.io import read_json, reading, restored, write_json

MODEL_FILE, FACTS_FILE, FORMAT = "model.fastff", "engine.json", 1
OPENVINO_FILE = "fastff_openvino.json"  # what an export for OpenVINO says of itself
REMEDY = "export the model again"
Pooling = Literal["first", "mean"]
POOLINGS = get_args(Pooling)


@dataclass(frozen=True)
class DecoderFacts:
    """stop: tokens that end a text."""

    stop: list[int]


@dataclass(frozen=True)
class HeadLayer:
    """epsilon: of a norm; None for a projection."""

    activation: str
    epsilon: float | None


@dataclass(frozen=True)
class HeadFacts:
    """pooling: what the head reads, None for every token. labels: of a classifier."""

    pooling: str | None
    layers: list[HeadLayer]
    labels: list[str]


@dataclass(frozen=True)
class EncoderFacts:
    """pooling and normalise: of embeddings. max_length: tokens that texts are cut to, None for all positions."""

    pooling: str
    normalise: bool
    head: HeadFacts | None
    max_length: int | None = None


Facts = TypeVar("Facts", DecoderFacts, EncoderFacts)
_KINDS: dict[type[Any], str] = {DecoderFacts: "decoder", EncoderFacts: "encoder"}


def write_facts(folder: Path, facts: DecoderFacts | EncoderFacts) -> None:
    common = {"format": FORMAT, "kind": _KINDS[type(facts)], "weights": "int8"}
    write_json(folder / FACTS_FILE, common | asdict(facts))


def kind_of_export(folder: Path) -> str:
    """Decoder or encoder. Raises CheckpointError for a directory that is no export, FileError for a damaged one."""
    return str(_read(folder)["kind"])


def read_facts(folder: Path, kind: type[Facts]) -> Facts:
    """Raises CheckpointError for a directory that is no export or of the other kind, FileError for a damaged one."""
    content = _read(folder)
    if content["kind"] != _KINDS[kind]:
        raise CheckpointError(f"{folder} holds a {content['kind']}, expected a {_KINDS[kind]}")
    own = {name: value for name, value in content.items() if name not in ("format", "kind", "weights")}
    with reading(folder / FACTS_FILE, REMEDY):
        facts = restored(kind, own)
        if isinstance(facts, EncoderFacts):
            _check_encoder(facts)
    return facts


def _read(folder: Path) -> dict[str, Any]:
    path = folder / FACTS_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is no export for the native engine (it has no {FACTS_FILE}): make one with "
            "`fastff export MODEL --to native --out DIR`"
        )
    content: dict[str, Any] = read_json(path, needs={"format": int, "kind": str}, remedy=REMEDY)
    if content["format"] != FORMAT or content["kind"] not in _KINDS.values():
        raise CheckpointError(f"{path} is of another format, expected {FORMAT} of a decoder or encoder: {REMEDY}")
    return content


def _check_encoder(facts: EncoderFacts) -> None:
    poolings = (facts.pooling, *([facts.head.pooling] if facts.head and facts.head.pooling is not None else []))
    if not {*poolings} <= {*POOLINGS}:
        raise ValueError(f"its pooling is {poolings}, expected {' or '.join(POOLINGS)}")
    if facts.max_length is not None and facts.max_length < 1:
        raise ValueError(f"its max_length is {facts.max_length}, expected at least 1")
