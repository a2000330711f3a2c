"""Examples to learn from, and the user's text as such: tokens on disk, padded when a batch is drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import torch
from torch import Tensor

from fastff.errors import CheckpointError, FileError
from fastff.io import read_array, remove_stale, replacing, write_array
from fastff.text.reading import lines

LINES_A_CALL = 4096


class Examples(ABC):
    """Unlabelled examples of a model's input: offsets (examples + 1) say how many of its tokens, or of a picture's
    patches, there are before each.

    picture  channels, height and width of every example that is a picture
    """

    picture: tuple[int, ...] | None = None

    def __init__(self, offsets: np.ndarray[Any, Any]) -> None:
        self.offsets = offsets

    @abstractmethod
    def slice(self, first: int, last: int) -> Self:
        """Examples [first, last)."""

    @abstractmethod
    def batch(self, which: np.ndarray[Any, Any], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The model's inputs; with attention_mask (examples, longest) where examples may be padded."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        """Tokens in all examples."""
        return int(self.offsets[-1] - self.offsets[0])

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """Tokens of each example (examples,)."""
        return np.diff(self.offsets)

    def in_order(self, batch: int) -> Iterator[np.ndarray[Any, Any]]:
        """Indices of batches, first example to last."""
        for start in range(0, len(self), batch):
            yield np.arange(start, min(start + batch, len(self)))

    def shuffled(self, batch: int, seed: int) -> Iterator[np.ndarray[Any, Any]]:
        """Indices of batches without end, pass after pass of `batches_by_length`."""
        lengths, rng = self.lengths, np.random.default_rng(seed)
        while True:
            yield from batches_by_length(lengths, batch, rng)


class TextExamples(Examples):
    """Token sequences: ids (all tokens, flat) and offsets (examples + 1); `pad` fills a batch to its longest."""

    def __init__(self, ids: np.ndarray[Any, Any], offsets: np.ndarray[Any, Any], pad: int) -> None:
        super().__init__(offsets)
        self.ids, self.pad = ids, pad

    def slice(self, first: int, last: int) -> Self:
        return type(self)(self.ids, self.offsets[first : last + 1], self.pad)

    def batch(self, which: np.ndarray[Any, Any], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """input_ids and attention_mask (examples, longest), int64."""
        rows = [self.ids[self.offsets[i] : self.offsets[i + 1]] for i in which]
        longest = max(len(row) for row in rows)
        ids = np.full((len(rows), longest), self.pad, dtype=np.int64)
        mask = np.zeros((len(rows), longest), dtype=np.int64)
        for k, row in enumerate(rows):
            ids[k, : len(row)] = row
            mask[k, : len(row)] = 1
        return {
            "input_ids": torch.from_numpy(ids).to(device, non_blocking=True),
            "attention_mask": torch.from_numpy(mask).to(device, non_blocking=True),
        }


def batches_by_length(
    lengths: np.ndarray[Any, Any], size: int, rng: np.random.Generator, *, pool: int = 64
) -> list[np.ndarray[Any, Any]]:
    """Indices of all rows in batches of `size`, in random order. Rows of like length, of those of `pool` batches, share
    one, so that little is padding. One pass."""
    order, batches = rng.permutation(len(lengths)), []
    for start in range(0, len(order), size * pool):
        part = order[start : start + size * pool]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[k : k + size] for k in range(0, len(part), size)]
    return [batches[k] for k in rng.permutation(len(batches))]


def tokenise(
    tokenizer: Any, text: Path, folder: Path, *, max_length: int, max_tokens: int, whole_blocks: bool
) -> TextExamples:
    """Read `text` into `folder`/tokens.bin and offsets.npy, or open those that are there.

    One line is one example, cut at max_length; with whole_blocks (causal models) lines are joined and cut into blocks
    of exactly max_length tokens, each beginning as the tokenizer begins a text. Other special tokens are left out: no
    model has seen those at every line. Empty lines are skipped. Stops after max_tokens. Raises CheckpointError if
    there is no such file or no room in a block.
    """
    ids_path, offsets_path = folder / "tokens.bin", folder / "offsets.npy"
    if not offsets_path.exists():
        if not text.is_file():
            raise CheckpointError(f"{text} is not a file")
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale(folder)
        with replacing(ids_path) as file:
            lengths = _write_tokens(tokenizer, text, file, max_length, max_tokens, whole_blocks)
        write_array(offsets_path, np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))))
    pad = tokenizer.pad_token_id
    return TextExamples(*_open(ids_path, offsets_path), 0 if pad is None else pad)


def _open(ids_path: Path, offsets_path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Tokens and offsets. Raises FileError if they are not those of one text."""
    remedy = f"remove {ids_path.parent} and run the same command again"
    offsets = read_array(offsets_path, remedy=remedy)
    fits = offsets.ndim == 1 and offsets.dtype == np.int64 and len(offsets) > 0 and offsets[0] == 0
    if not (fits and bool((np.diff(offsets) >= 0).all())):
        raise FileError(f"{offsets_path} is damaged (not offsets from 0 that do not fall): {remedy}")
    if not ids_path.is_file():
        raise FileError(f"{ids_path} is missing: {remedy}")
    size, expected = ids_path.stat().st_size, int(offsets[-1]) * np.dtype(np.uint32).itemsize
    if size != expected:
        raise FileError(f"{ids_path} has {size} bytes, expected {expected}: {remedy}")
    return (np.memmap(ids_path, dtype=np.uint32, mode="r") if size else np.zeros(0, dtype=np.uint32)), offsets


def _write_tokens(
    tokenizer: Any, text: Path, out: IO[bytes], max_length: int, max_tokens: int, whole_blocks: bool
) -> list[int]:
    first = _first_tokens(tokenizer) if whole_blocks else np.zeros(0, dtype=np.uint32)
    if max_length <= len(first):
        raise CheckpointError(f"max_length {max_length} has no room beside {len(first)} special tokens")
    filled = (line for line in lines(text) if line)
    cut = _blocks(tokenizer, filled, first, max_length) if whole_blocks else _cut(tokenizer, filled, max_length)
    lengths: list[int] = []
    total = 0
    for rows in cut:
        for row in rows:
            out.write(row.tobytes())
            lengths.append(len(row))
            total += len(row)
        if total >= max_tokens:
            break
    return lengths


def _cut(tokenizer: Any, filled: Iterator[str], max_length: int) -> Iterator[list[np.ndarray[Any, Any]]]:
    """The lines' tokens, a call's lines at once."""
    while some := list(islice(filled, LINES_A_CALL)):
        encoded = tokenizer(some, truncation=True, max_length=max_length)["input_ids"]
        yield [np.asarray(ids, dtype=np.uint32) for ids in encoded]


def _blocks(
    tokenizer: Any, filled: Iterator[str], first: np.ndarray[Any, Any], max_length: int
) -> Iterator[list[np.ndarray[Any, Any]]]:
    """Blocks of the joined lines' tokens, a call's lines at once."""
    inner, rest = max_length - len(first), np.zeros(0, dtype=np.uint32)
    while some := list(islice(filled, LINES_A_CALL)):
        plain = tokenizer([s + "\n" for s in some], add_special_tokens=False, verbose=False)["input_ids"]
        rest = np.concatenate((rest, np.fromiter((t for ids in plain for t in ids), dtype=np.uint32)))
        count = len(rest) // inner
        blocks, rest = rest[: count * inner].reshape(count, inner), rest[count * inner :]
        yield [np.concatenate((first, block)) for block in blocks]


def _first_tokens(tokenizer: Any) -> np.ndarray[Any, Any]:
    """The special tokens that the tokenizer puts before a text, such as [CLS] or <s>: models learned with them."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    before = next((k for k in range(len(whole)) if plain and whole[k : k + len(plain)] == plain), 0)
    return np.asarray(whole[:before], dtype=np.uint32)
