"""A text as tokens on disk: windows of it are read through a memory map."""

# Transformers' own methods are not typed.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from fastff.errors import FileError, TrainingError
from fastff.io import digest, read_json, remove_stale, replacing, sync, write_json, writing
from fastff.report.progress import Progress, silent
from fastff.text.reading import changed, documents, state_of
from fastff.text.tokenizer import Vocabulary, fingerprint

IDS, META = "tokens.bin", "tokens.json"
_DOCUMENTS_A_CALL = 512


class Tokens:
    """A text's tokens in one file, documents one after the other, each closed by the separator.

    A window is the token `first`, a piece of the text and, if it is closed, the token `last`, which a causal model
    would learn to expect in the last place of any window. What does not fill one at the end is not used. Raises
    TrainingError for a text shorter than one window, FileError for files that are missing, damaged or not of one text.
    """

    def __init__(self, folder: Path, vocabulary: Vocabulary, seq_len: int, *, closed: bool = True) -> None:
        self.meta = read_json(folder / META, needs={"tokens": int, "dtype": str, "tokenizer": str})
        self.ids = _open(folder / IDS, self.meta, vocabulary)
        self.vocabulary, self.seq_len = vocabulary, seq_len
        self.inner = seq_len - 2 if closed else seq_len - 1  # tokens of the text in a window
        if len(self) == 0:
            raise TrainingError(f"the text has {self.meta['tokens']} tokens, a window needs {self.inner}")

    def __len__(self) -> int:
        return int(len(self.ids) // self.inner)

    def windows(self, which: Sequence[int] | np.ndarray[Any, Any]) -> Tensor:
        """Windows (windows, seq_len) int64 by their numbers."""
        ids = np.full((len(which), self.seq_len), self.vocabulary.last, dtype=np.int64)
        ids[:, 0] = self.vocabulary.first
        ids[:, 1 : 1 + self.inner] = self.ids[: len(self) * self.inner].reshape(-1, self.inner)[np.asarray(which)]
        return torch.from_numpy(ids)


def _open(path: Path, meta: dict[str, Any], vocabulary: Vocabulary) -> np.ndarray[Any, Any]:
    """The tokens that `meta` describes. Raises FileError if the file is not what was written with it."""
    remedy = f"remove {path.parent} and run the same command again"
    if meta["dtype"] not in ("uint16", "uint32") or meta["tokens"] < 0:
        raise FileError(f"{path.parent / META} is damaged (dtype {meta['dtype']!r}, tokens {meta['tokens']}): {remedy}")
    if not path.is_file():
        raise FileError(f"{path} is missing: {remedy}")
    expected, found = meta["tokens"] * np.dtype(meta["dtype"]).itemsize, path.stat().st_size
    if found != expected:
        raise FileError(f"{path} has {found} bytes, expected {expected}: {remedy}")
    if found == 0:
        return np.zeros(0, dtype=meta["dtype"])
    ids = np.memmap(path, dtype=meta["dtype"], mode="r")
    if "sha256" in meta:
        if digest(path) != meta["sha256"]:
            raise FileError(f"{path} is damaged (it is not what {META} was written for): {remedy}")
    elif int(ids.max()) >= vocabulary.size:  # written by an earlier version
        raise FileError(f"{path} is damaged (token {ids.max()} of a vocabulary of {vocabulary.size}): {remedy}")
    return ids


def prepare_tokens(
    sources: Sequence[str],
    tokenizer: Any,
    folder: Path,
    *,
    seq_len: int,
    closed: bool = True,
    column: str = "text",
    most: int | None = None,
    progress: Progress = silent,
) -> Tokens:
    """Tokenise the sources into `folder`, at most `most` tokens, or open what an equal call has left there.

    A text that has changed since is tokenised anew; one that is gone is not missed. The file takes 2 bytes a token (4
    for a vocabulary above 65536). Raises TrainingError for text that is empty or cannot be read, FileError for a full
    disk and for files that are damaged.
    """
    vocabulary = Vocabulary.of(tokenizer)
    asked = {
        "sources": list(sources),
        "column": column,
        "most": most,
        "dtype": "uint16" if vocabulary.size <= 2**16 else "uint32",
        "tokenizer": fingerprint(tokenizer),
    }
    remove_stale(folder)
    if not _made_of(folder / META, asked):
        _tokenise(asked, tokenizer, vocabulary, folder, progress)
    return Tokens(folder, vocabulary, seq_len, closed=closed)


def _made_of(path: Path, asked: dict[str, Any]) -> bool:
    """Whether the tokens beside `path` are those of an equal call on the same text."""
    if not path.is_file():
        return False
    meta = read_json(path, needs={})
    if any(meta.get(name) != value for name, value in asked.items()):
        return False
    files = meta.get("files")
    return not isinstance(files, dict) or changed(asked["sources"], files) is None


def _tokenise(asked: dict[str, Any], tokenizer: Any, vocabulary: Vocabulary, folder: Path, progress: Progress) -> None:
    """Write tokens and what they are of. While the tokens are replaced no description is there, so that none ever lies
    beside the tokens of another text."""
    if (folder / META).exists():
        with writing(folder / META):
            (folder / META).unlink()
            sync(folder)
    files = state_of(asked["sources"])
    with replacing(folder / IDS) as file:
        counts = _write_ids(file, asked, tokenizer, vocabulary.last, progress)
    if counts["tokens"] == 0:
        raise TrainingError(f"the text is empty: {', '.join(asked['sources'])}")
    write_json(folder / META, {**asked, **counts, "files": files})


def _write_ids(
    file: IO[bytes], asked: dict[str, Any], tokenizer: Any, separator: int, progress: Progress
) -> dict[str, Any]:
    tokens = count = 0
    most, hashed = asked["most"], hashlib.sha256()
    for ids in _encoded(documents(asked["sources"], column=asked["column"]), tokenizer, separator):
        kept = np.asarray(ids if most is None else ids[: most - tokens], dtype=asked["dtype"]).tobytes()
        file.write(kept)
        hashed.update(kept)
        tokens += len(kept) // np.dtype(asked["dtype"]).itemsize
        count += 1
        if count % _DOCUMENTS_A_CALL == 0:
            progress("reading tokens", tokens)
        if tokens == most:
            break
    return {"tokens": tokens, "documents": count, "sha256": hashed.hexdigest()}


def _encoded(texts: Iterator[str], tokenizer: Any, separator: int) -> Iterator[list[int]]:
    while batch := list(islice(texts, _DOCUMENTS_A_CALL)):
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        yield from ([*ids, separator] for ids in encoded["input_ids"] if ids)
