"""The user's text as tokens on disk: examples of bounded length, padded when a batch is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastff.errors import CheckpointError
from fastff.text.reading import open_text

LINES_A_CALL = 4096


class Examples:
    """Token sequences: ids (all tokens, flat) and offsets (examples + 1); `pad` fills a batch to its longest."""

    def __init__(self, ids: np.ndarray[Any, Any], offsets: np.ndarray[Any, Any], pad: int) -> None:
        self.ids, self.offsets, self.pad = ids, offsets, pad

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        """Tokens in all examples."""
        return int(self.offsets[-1] - self.offsets[0])

    def slice(self, first: int, last: int) -> Examples:
        """Examples [first, last)."""
        return Examples(self.ids, self.offsets[first : last + 1], self.pad)

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

    def in_order(self, batch: int) -> Iterator[np.ndarray[Any, Any]]:
        """Indices of batches, first example to last."""
        for start in range(0, len(self), batch):
            yield np.arange(start, min(start + batch, len(self)))

    def shuffled(self, batch: int, seed: int) -> Iterator[np.ndarray[Any, Any]]:
        """Indices of batches without end; examples of like length share a batch, so that little is padding."""
        lengths = np.diff(self.offsets)
        rng = np.random.default_rng(seed)
        group = batch * 64
        while True:
            order = rng.permutation(len(self))
            batches: list[np.ndarray[Any, Any]] = []
            for start in range(0, len(order), group):
                part = order[start : start + group]
                part = part[np.argsort(lengths[part], kind="stable")]
                batches += [part[k : k + batch] for k in range(0, len(part), batch)]
            for k in rng.permutation(len(batches)):
                yield batches[k]


def tokenise(
    tokenizer: Any, text: Path, folder: Path, *, max_length: int, max_tokens: int, whole_blocks: bool
) -> Examples:
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
        lengths = _write_tokens(tokenizer, text, ids_path, max_length, max_tokens, whole_blocks)
        np.save(offsets_path, np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))))
    offsets = np.load(offsets_path)
    pad = tokenizer.pad_token_id
    return Examples(_open(ids_path), offsets, 0 if pad is None else pad)


def _open(path: Path) -> np.ndarray[Any, Any]:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=np.uint32)
    return np.memmap(path, dtype=np.uint32, mode="r")


def _write_tokens(
    tokenizer: Any, text: Path, ids_path: Path, max_length: int, max_tokens: int, whole_blocks: bool
) -> list[int]:
    lengths: list[int] = []
    total, rest = 0, np.zeros(0, dtype=np.uint32)
    first = _first_tokens(tokenizer) if whole_blocks else rest
    inner = max_length - len(first)
    if inner < 1:
        raise CheckpointError(f"max_length {max_length} has no room beside {len(first)} special tokens")
    with open_text(text) as lines, ids_path.open("wb") as out:
        stripped = (line.strip() for line in lines)
        filled = (line for line in stripped if line)
        while total < max_tokens and (some := list(islice(filled, LINES_A_CALL))):
            if whole_blocks:
                plain = tokenizer([s + "\n" for s in some], add_special_tokens=False, verbose=False)["input_ids"]
                joined = np.fromiter((t for ids in plain for t in ids), dtype=np.uint32)
                rest = np.concatenate((rest, joined))
                count = len(rest) // inner
                blocks, rest = rest[: count * inner].reshape(count, inner), rest[count * inner :]
                rows = [np.concatenate((first, block)) for block in blocks]
            else:
                encoded = tokenizer(some, truncation=True, max_length=max_length)["input_ids"]
                rows = [np.asarray(ids, dtype=np.uint32) for ids in encoded]
            for row in rows:
                row.tofile(out)
                lengths.append(len(row))
                total += len(row)
    return lengths


def _first_tokens(tokenizer: Any) -> np.ndarray[Any, Any]:
    """The special tokens that the tokenizer puts before a text, such as [CLS] or <s>: models learned with them."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    before = next((k for k in range(len(whole)) if plain and whole[k : k + len(plain)] == plain), 0)
    return np.asarray(whole[:before], dtype=np.uint32)
