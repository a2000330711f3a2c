"""Encoders to serve: fastff's engine, OpenVINO or PyTorch, behind one function from a batch of tokens to rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fastff.errors import CheckpointError
from fastff.io import read_json
from fastff.serve.batcher import Compute, Rows, Tokens
from fastff.serve.serve_settings import BackendName
from fastff.serve.texts import Texts
from fastff.text.positions import first_position

_WASTE = 1.25  # padded tokens over tokens, of one call
_WIDTHS = ("hidden_size", "dim", "d_model", "emb_dim", "n_embd")  # what configurations call that of a hidden state
_ONLY_HIDDEN = "last_hidden_state"
Whole = dict[str, NDArray[np.int64]]


@dataclass(frozen=True)
class EncoderModel:
    """compute: of every input its embedding, not normalised, or the logits of `labels`.

    outputs: numbers of an input. threads: how many work on a batch.
    """

    backend: BackendName
    texts: Texts
    compute: Compute
    outputs: int
    threads: int
    labels: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return "classifier" if self.labels else "embedding"


def open_native(folder: Path, threads: int) -> EncoderModel:
    """An export for fastff's engine."""
    from fastff.engine.encode import EncoderEngine

    engine = EncoderEngine(folder, threads=threads)
    if engine.head is not None and engine.head.pooling is None:
        raise CheckpointError(f"{folder} is a masked language model: embeddings, classifiers and decoders are served")

    def embed(batch: Sequence[Tokens]) -> Rows:
        return engine.embed([one.ids for one in batch], normalise=False).numpy()

    def classify(batch: Sequence[Tokens]) -> Rows:
        types = None
        if engine.model.types and any(one.types for one in batch):
            types = [one.types or [0] * len(one.ids) for one in batch]
        return engine.classify([one.ids for one in batch], types=types).numpy()

    texts = Texts(_tokenizer(folder), max_length=engine.max_length, vocab_size=engine.model.vocab_size)
    if engine.head is None:
        return EncoderModel("native", texts, embed, engine.model.hidden, threads)
    labels = _labels(engine.labels, folder)
    return EncoderModel("native", texts, classify, len(labels), threads, labels)


def open_openvino(folder: Path, threads: int) -> EncoderModel:
    """An export for OpenVINO."""
    from fastff.engine import openvino
    from fastff.engine.facts import OPENVINO_FILE

    record = read_json(folder / OPENVINO_FILE, needs={"inputs": list, "output": str}, remedy="export the model again")
    config = read_json(folder / "config.json", needs={"vocab_size": int})
    run = openvino.read(folder, INFERENCE_NUM_THREADS=threads)
    pooled = record["output"] == _ONLY_HIDDEN

    def call(whole: Whole) -> NDArray[np.float32]:
        found: NDArray[np.float32] = run(**{name: whole[name] for name in record["inputs"]})
        return found

    labels = [] if pooled else _labels(_configured_labels(config), folder)
    hidden = 0 if labels else _hidden(config, folder)
    return _padded("openvino", folder, call, _tokenizer(folder), config, threads, labels, hidden)


def open_torch(folder: Path, model: Any, tokenizer: Any, threads: int) -> EncoderModel:
    """A model of Transformers, dense or conditional, as `fastff.engine.export.load_model` loads it."""
    config, classifier = model.config.to_dict(), "SequenceClassification" in type(model).__name__
    if tokenizer is None:
        raise CheckpointError(f"{folder} has no tokenizer")
    with_types = "token_type_ids" in tokenizer.model_input_names

    def call(whole: Whole) -> NDArray[np.float32]:
        tensors = {name: torch.from_numpy(value) for name, value in whole.items()}
        if not with_types:
            tensors.pop("token_type_ids")
        with torch.inference_mode():
            output = model(**tensors)
        found: torch.Tensor = output.logits if classifier else output[0]
        return found.float().numpy()

    labels = _labels(_configured_labels(config), folder) if classifier else []
    return _padded(
        "torch", folder, call, tokenizer.backend_tokenizer, config, threads, labels, model.config.hidden_size
    )


def _padded(
    backend: BackendName,
    folder: Path,
    call: Callable[[Whole], NDArray[np.float32]],
    tokenizer: Tokenizer,
    config: dict[str, Any],
    threads: int,
    labels: list[str],
    hidden: int,
) -> EncoderModel:
    """A model that takes arrays (inputs, length), filled up to the longest."""
    from fastff.engine.encoder_heads import sentence_length, sentence_pooling

    first_token = sentence_pooling(folder)[0] == "first"
    outputs = len(labels) or hidden

    def compute(batch: Sequence[Tokens]) -> Rows:
        rows = np.empty((len(batch), outputs), np.float32)
        for places in calls([len(one.ids) for one in batch]):
            whole = filled([batch[i] for i in places], config.get("pad_token_id") or 0)
            found = call(whole)
            rows[places] = found if labels else _pool(found, whole["attention_mask"], first_token)
        return rows

    length = min(sentence_length(folder) or _positions(config), _positions(config))
    texts = Texts(tokenizer, max_length=length, vocab_size=config["vocab_size"])
    return EncoderModel(backend, texts, compute, outputs, threads, labels)


def calls(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Inputs by length, cut where padding would exceed _WASTE."""
    places: list[int] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if places and lengths[places[0]] * (len(places) + 1) > _WASTE * (tokens + lengths[i]):
            yield places
            places, tokens = [], 0
        places.append(i)
        tokens += lengths[i]
    if places:
        yield places


def filled(batch: Sequence[Tokens], pad: int) -> Whole:
    """Ids, mask and segments (inputs, length) int64."""
    shape = len(batch), max(len(one.ids) for one in batch)
    ids, mask, types = np.full(shape, pad), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, one in enumerate(batch):
        ids[row, : len(one.ids)] = one.ids
        mask[row, : len(one.ids)] = 1
        if one.types is not None:
            types[row, : len(one.ids)] = one.types
    return {"input_ids": ids.astype(np.int64), "attention_mask": mask, "token_type_ids": types}


def _pool(hidden: NDArray[np.float32], mask: NDArray[np.int64], first_token: bool) -> Rows:
    if first_token:
        return hidden[:, 0]
    weights = mask[..., None].astype(np.float32)
    pooled: Rows = (hidden * weights).sum(1) / weights.sum(1)
    return pooled


def _tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json: export a model that has a tokenizer")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exceptions
        raise CheckpointError(f"{path} is damaged ({error}): export the model again") from error


def _positions(config: dict[str, Any]) -> int:
    positions = int(config.get("max_position_embeddings") or 512)
    return positions - first_position(config.get("model_type"), config.get("pad_token_id"))


def _hidden(config: dict[str, Any], folder: Path) -> int:
    """Numbers of a hidden state. Raises CheckpointError for a configuration that does not say."""
    hidden = next((config[name] for name in _WIDTHS if config.get(name) is not None), None)
    if type(hidden) is not int or hidden < 1:
        raise CheckpointError(f"{folder / 'config.json'} says that hidden_size is {hidden!r}, expected above 0")
    return int(hidden)


def _configured_labels(config: dict[str, Any]) -> list[str]:
    names = config.get("id2label") or {}
    return [str(names[key]) for key in sorted(names, key=int)]


def _labels(names: list[str], folder: Path) -> list[str]:
    if not names:
        raise CheckpointError(f"{folder} is a classifier without labels: its configuration has no id2label")
    return names
