"""Hidden states, embeddings and classes from an exported encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastff.engine.encoder_heads import pool, read_head
from fastff.engine.facts import MODEL_FILE, EncoderFacts, Pooling, read_facts
from fastff.errors import CheckpointError, ShapeError
from fastff.ops.native_encoder import NativeEncoder

__all__ = ["EncoderEngine"]

Inputs = str | Sequence[str] | Sequence[Sequence[int]]
# Options of SentenceTransformer.encode: those that leave the result alone, and what others may be.
_ONLY_HOW = ("batch_size", "show_progress_bar", "device", "num_workers", "pool", "chunk_size")
_AS_IT_IS: dict[str, tuple[Any, ...]] = {
    "convert_to_numpy": (True, None),
    "output_value": ("sentence_embedding",),
    "precision": ("float32",),
    "prompt_name": (None,),
    "prompt": (None,),
    "truncate_dim": (None,),
}
_BATCH_TOKENS = 16384  # that pass the layers in one call


class EncoderEngine:
    """An encoder from a directory that `fastff export --to native` wrote; any number of threads may use it.

    Inputs are texts (one or several) or sequences of token ids. They are sorted by length and laid end to end: nothing
    is computed for padding. threads: at most how many work on a call, 0 for all that this process may use.
    """

    def __init__(self, folder: Path, *, map: bool = False, threads: int = 0) -> None:
        facts = read_facts(folder, EncoderFacts)
        self.model = NativeEncoder(folder / MODEL_FILE, map=map)
        self.threads = threads
        self.pooling: Pooling = facts.pooling  # type: ignore[assignment]
        self.normalise = facts.normalise
        self.head = read_head(facts.head, folder, self.model.hidden)
        self.labels: list[str] = facts.head.labels if facts.head else []
        self.max_length = min(facts.max_length or self.model.positions, self.model.positions)
        self._folder = folder
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """Made at its first use. Raises CheckpointError for a model that was exported without one."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self._folder)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{self._folder} has no tokenizer: give token ids ({error})") from error
        return self._tokenizer

    def hidden_states(self, inputs: Inputs, *, types: Sequence[Sequence[int]] | None = None) -> list[Tensor]:
        """Last hidden states (length, hidden) of each input, in order. types: segments of the tokens (default: the
        first). Texts are cut to `max_length` tokens: the model's positions, or what sentence-transformers cuts them to.

        Raises ShapeError for an empty or too long sequence of ids, FastffError for an id out of range.
        """
        ids = self._ids(inputs)
        if types is not None and [len(t) for t in types] != [len(i) for i in ids]:
            raise ShapeError("types are not one for each token of the inputs")
        for number, sequence in enumerate(ids):
            if not 1 <= len(sequence) <= self.model.positions:
                raise ShapeError(f"input {number} has {len(sequence)} tokens, expected 1 to {self.model.positions}")
        found: list[Tensor] = [torch.empty(0)] * len(ids)
        for batch in _batches([len(i) for i in ids]):
            lengths = [len(ids[i]) for i in batch]
            flat = [token for i in batch for token in ids[i]]
            kinds = None if types is None else [kind for i in batch for kind in types[i]]
            hidden = self.model.run(flat, lengths, types=kinds, threads=self.threads)
            for i, part in zip(batch, hidden.split(lengths), strict=True):
                found[i] = part
        return found

    def embed(self, inputs: Inputs, *, normalise: bool | None = None) -> Tensor:
        """Embeddings (inputs, hidden), pooled and normalised as the model's sentence-transformers modules say."""
        pooled = self._pooled(inputs, self.pooling, None)
        return F.normalize(pooled, dim=-1) if (self.normalise if normalise is None else normalise) else pooled

    def encode(
        self,
        sentences: str | Sequence[str],
        *,
        normalize_embeddings: bool = False,
        convert_to_tensor: bool = False,
        **others: Any,
    ) -> Any:
        """As SentenceTransformer.encode: embeddings (sentences, hidden), or (hidden,) of one string, as a numpy array
        or, with convert_to_tensor, a tensor. Options of its that only say how to compute, such as batch_size, change
        nothing; TypeError for the others, which would change the result."""
        differing = {name for name in others if name not in _ONLY_HOW} - {
            name for name, value in _AS_IT_IS.items() if others.get(name) in value
        }
        if differing:
            raise TypeError(f"encode has no option {', '.join(sorted(differing))}")
        found = self.embed(sentences, normalise=self.normalise or normalize_embeddings)
        found = found[0] if isinstance(sentences, str) else found
        return found if convert_to_tensor else found.numpy()

    def classify(self, inputs: Inputs, *, types: Sequence[Sequence[int]] | None = None) -> Tensor:
        """Logits (inputs, labels) of a sequence classifier. Raises CheckpointError for a model that is none."""
        if self.head is None or self.head.pooling is None:
            raise CheckpointError(f"{self._folder} is no sequence classifier")
        return self.head(self._pooled(inputs, self.head.pooling, types))

    def predict_words(self, inputs: Inputs) -> list[Tensor]:
        """Logits (length, vocabulary) of each input by a masked language model. Raises CheckpointError for another."""
        if self.head is None or self.head.pooling is not None:
            raise CheckpointError(f"{self._folder} is no masked language model")
        return [self.head(hidden) for hidden in self.hidden_states(inputs)]

    def _pooled(self, inputs: Inputs, pooling: Pooling, types: Sequence[Sequence[int]] | None) -> Tensor:
        hidden = self.hidden_states(inputs, types=types)
        if not hidden:
            return torch.empty(0, self.model.hidden)
        return pool(torch.cat(hidden), [len(part) for part in hidden], pooling)

    def _ids(self, inputs: Inputs) -> list[Sequence[int]]:
        given: list[Any] = [inputs] if isinstance(inputs, str) else list(inputs)
        texts = [text for text in given if isinstance(text, str)]
        if not texts:
            return [list(sequence) for sequence in given]
        if len(texts) < len(given):
            raise ValueError("inputs are texts and token ids mixed: expected one kind")
        cut: dict[str, Any] = {"truncation": True, "max_length": self.max_length, "return_attention_mask": False}
        found: list[Sequence[int]] = self.tokenizer(texts, **cut)["input_ids"]
        return found


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Inputs by length, longest first, cut into batches of at most _BATCH_TOKENS."""
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if room < lengths[i]:
            batches.append([])
            room = max(_BATCH_TOKENS, lengths[i])
        batches[-1].append(i)
        room -= lengths[i]
    return batches
