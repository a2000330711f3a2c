"""A tokenizer made or read, and the text as tokens on disk: windows of it are read through a memory map."""

# Transformers' own methods are not typed.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastff.errors import TrainingError
from fastff.io import read_json, replacing, write_json
from fastff.text.reading import documents

SPECIALS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_DOCUMENTS_A_CALL = 512
Progress = Callable[[str, int], None]  # what, how many so far


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, alphabet: int | None = None) -> Tokenizer:
    """A lower-casing WordPiece tokenizer with the five special tokens of BERT at the ids 0 to 4.

    alphabet: how many characters get an entry, most frequent first; None: all."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIALS["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = list(SPECIALS.values())
    options: dict[str, Any] = {} if alphabet is None else {"limit_alphabet": alphabet}
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False, **options)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def wrap(tokenizer: Tokenizer, length: int) -> PreTrainedTokenizerFast:
    """A tokenizer with BERT's special tokens as Transformers uses it, for sequences of `length`."""
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **SPECIALS)


def load_tokenizer(source: str | Path) -> Any:
    """A tokenizer from a directory, a `tokenizer.json` or the hub. Raises TrainingError if it cannot be read."""
    path = Path(source)
    try:
        if path.is_file():
            return wrap(Tokenizer.from_file(str(path)), 128)
        return AutoTokenizer.from_pretrained(str(source))
    except Exception as error:  # the libraries raise many kinds, all of which mean the same here
        raise TrainingError(f"{source} holds no tokenizer that can be read: {error}") from error


@dataclass(frozen=True)
class Vocabulary:
    """What packing and masking must know of a tokenizer; ids below `special` are special or unused."""

    size: int
    pad: int
    first: int
    last: int
    mask: int
    special: int

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """Raises TrainingError for a tokenizer without BERT's special tokens, or with special ids among the others."""
        ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep", "mask")}
        missing = [name for name, value in ids.items() if value is None]
        if missing:
            raise TrainingError(f"the tokenizer has no {', '.join(missing)} token")
        special = max(tokenizer.all_special_ids) + 1
        if special > len(tokenizer) // 4:
            raise TrainingError(
                f"the tokenizer's special ids reach {special - 1} of {len(tokenizer)}; they must come before all others"
            )
        return cls(len(tokenizer), ids["pad"], ids["cls"], ids["sep"], ids["mask"], special)


class Tokens:
    """A text's tokens in one file, documents one after the other, each closed by the separator.

    A window is the token `first`, a piece of the text and, if it is closed, the token `last`, which a causal model
    would learn to expect in the last place of any window. What does not fill one at the end is not used. Raises
    TrainingError for a text shorter than one window.
    """

    def __init__(self, folder: Path, vocabulary: Vocabulary, length: int, *, closed: bool = True) -> None:
        self.meta = read_json(folder / "tokens.json")
        self.ids = np.memmap(folder / "tokens.bin", dtype=self.meta["dtype"], mode="r", shape=(self.meta["tokens"],))
        self.vocabulary, self.length = vocabulary, length
        self.inner = length - 2 if closed else length - 1  # tokens of the text in a window
        if len(self) == 0:
            raise TrainingError(f"the text has {self.meta['tokens']} tokens, a window needs {self.inner}")

    def __len__(self) -> int:
        return int(len(self.ids) // self.inner)

    def windows(self, which: Sequence[int] | np.ndarray[Any, Any]) -> Tensor:
        """Windows (windows, length) int64 by their numbers."""
        ids = np.full((len(which), self.length), self.vocabulary.last, dtype=np.int64)
        ids[:, 0] = self.vocabulary.first
        ids[:, 1 : 1 + self.inner] = self.ids[: len(self) * self.inner].reshape(-1, self.inner)[np.asarray(which)]
        return torch.from_numpy(ids)


def prepare_tokens(
    sources: Sequence[str],
    tokenizer: Any,
    folder: Path,
    *,
    length: int,
    closed: bool = True,
    column: str = "text",
    most: int | None = None,
    progress: Progress = lambda what, count: None,
) -> Tokens:
    """Tokenise the sources into `folder`, at most `most` tokens, or open what an equal call has left there.

    The file takes 2 bytes a token (4 for a vocabulary above 65536) and is renamed at the end: complete or not there.
    Raises TrainingError for text that is empty or cannot be read, OSError for a full disk.
    """
    vocabulary = Vocabulary.of(tokenizer)
    dtype = "uint16" if vocabulary.size <= 2**16 else "uint32"
    asked = {
        "sources": list(sources),
        "column": column,
        "most": most,
        "dtype": dtype,
        "tokenizer": fingerprint(tokenizer),
    }
    path = folder / "tokens.json"
    if not path.is_file() or {key: value for key, value in read_json(path).items() if key in asked} != asked:
        counts = {"tokens": 0, "documents": 0}

        def write(file: IO[bytes]) -> None:
            for ids in _encoded(documents(sources, column=column), tokenizer, vocabulary.last):
                kept = ids if most is None else ids[: most - counts["tokens"]]
                file.write(np.asarray(kept, dtype=dtype).tobytes())
                counts["tokens"] += len(kept)
                counts["documents"] += 1
                if counts["documents"] % _DOCUMENTS_A_CALL == 0:
                    progress("tokens", counts["tokens"])
                if counts["tokens"] == most:
                    return

        with replacing(folder / "tokens.bin") as file:
            write(file)
        if counts["tokens"] == 0:
            raise TrainingError(f"the text is empty: {', '.join(sources)}")
        write_json(path, {**asked, **counts})
    return Tokens(folder, vocabulary, length, closed=closed)


def _encoded(texts: Iterator[str], tokenizer: Any, separator: int) -> Iterator[list[int]]:
    while batch := list(islice(texts, _DOCUMENTS_A_CALL)):
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        yield from ([*ids, separator] for ids in encoded["input_ids"] if ids)


def fingerprint(tokenizer: Any) -> str:
    """A short hash of everything that decides how a tokenizer cuts text."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]


def make_tokenizer(
    sources: Sequence[str], folder: Path, *, vocab_size: int, length: int, column: str, most: int
) -> Any:
    """The tokenizer that an earlier call left in `folder`, or one trained on the first `most` characters."""
    if not (folder / "tokenizer.json").is_file():

        def beginning() -> Iterator[str]:
            left = most
            for text in documents(sources, column=column):
                yield text[:left]
                left -= len(text)
                if left <= 0:
                    return

        trained = wrap(train_tokenizer(beginning(), vocab_size), length)
        if len(trained) <= len(SPECIALS):
            raise TrainingError(f"the text is empty: {', '.join(sources)}")
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")
        trained.save_pretrained(partial)
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(folder)
    return load_tokenizer(folder)
