"""The bundled text: novels to learn from, unseen novels to score on, and the tokenizer made from the former."""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fastff.errors import FastffError
from fastff.text.windows import mask_tokens, pack

PAD, UNK, CLS, SEP, MASK = range(5)
SPECIAL = 5  # ids below are special
FOLDER = resources.files("fastff.demo") / "data"


class Sentences(NamedTuple):
    """Labelled sentences: pieces of each, and the author's index (sentences,) int64."""

    tokens: list[list[int]]
    labels: Tensor
    texts: list[str]

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """Pieces of each."""
        return np.array([len(row) for row in self.tokens])


def manifest() -> dict[str, Any]:
    """Provenance, sizes and checksums of the bundled files. Raises FastffError where they are not."""
    if not (FOLDER / "manifest.json").is_file():
        raise FastffError("the demo's novels are not in an installed package: run it from a checkout, with make demo")
    content: dict[str, Any] = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
    return content


def read(name: str) -> bytes:
    """A bundled file, unpacked. Raises FastffError if it is not the file that the manifest describes."""
    raw = (FOLDER / name).read_bytes()
    want, got = manifest()["files"][name]["sha256"], hashlib.sha256(raw).hexdigest()
    if got != want:
        raise FastffError(f"bundled file {name} has sha256 {got}, expected {want}: install fastff again")
    return lzma.decompress(raw) if name.endswith(".xz") else raw


def documents(name: str) -> dict[str, list[str]]:
    """Books of a bundled text file: name -> paragraphs."""
    books = {}
    for document in read(name).decode().split("\n\n"):
        if document.strip():
            title, *paragraphs = document.split("\n")
            books[title.removeprefix("= ")] = paragraphs
    return books


def labelled(name: str) -> list[tuple[str, str]]:
    """(author, sentence) of a bundled table."""
    rows = (line.split("\t") for line in read(name).decode().splitlines())
    return [(author, sentence) for author, sentence in rows]


@dataclass(frozen=True)
class Corpus:
    """The bundled text as tokens.

    characters  how much of the start of each book is used, None for all
    sentences   labelled sentences used of each file, None for all; the files are shuffled
    """

    characters: int | None = None
    sentences: int | None = None

    @cached_property
    def tokenizer(self) -> Any:
        return Tokenizer.from_str(read("tokenizer.json").decode())

    @cached_property
    def authors(self) -> list[str]:
        """Keys of the authors, in the order of their labels."""
        return sorted({book["name"].split("_")[0] for book in manifest()["books"]})

    @cached_property
    def full_names(self) -> list[str]:
        """Names of the authors, in the order of their labels."""
        names = {book["name"].split("_")[0]: book["author"] for book in manifest()["books"]}
        return [names[author] for author in self.authors]

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    @cached_property
    def learn(self) -> dict[str, list[int]]:
        return self._tokens("learn.txt.xz")

    @cached_property
    def unseen(self) -> dict[str, list[int]]:
        return self._tokens("unseen.txt.xz")

    @cached_property
    def learn_sentences(self) -> Sentences:
        return self._sentences("authors-learn.tsv.xz")

    @cached_property
    def unseen_sentences(self) -> Sentences:
        return self._sentences("authors-unseen.tsv.xz")

    def windows(self, books: dict[str, list[int]], seq_len: int) -> Tensor:
        """All windows (windows, seq_len) of some books, one book after the other."""
        return torch.cat([pack(tokens, seq_len=seq_len, first=CLS, last=SEP) for tokens in books.values()])

    def mask(self, tokens: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels of windows, 25 % masked; the same seed masks the same."""
        generator = torch.Generator().manual_seed(seed)
        return mask_tokens(tokens, mask=MASK, vocab_size=self.vocab_size, special=SPECIAL, generator=generator)

    def _tokens(self, name: str) -> dict[str, list[int]]:
        books = {}
        for title, paragraphs in documents(name).items():
            text = "\n".join(paragraphs)[: self.characters].split("\n")
            encoded = self.tokenizer.encode_batch(text, add_special_tokens=False)
            books[title] = [piece for paragraph in encoded for piece in paragraph.ids]
        return books

    def _sentences(self, name: str) -> Sentences:
        rows = labelled(name)[: self.sentences]
        encoded = self.tokenizer.encode_batch([text for _, text in rows])
        labels = torch.tensor([self.authors.index(author) for author, _ in rows])
        return Sentences([e.ids for e in encoded], labels, [text for _, text in rows])


def pad(rows: Sequence[Sequence[int]], longest: int) -> tuple[Tensor, Tensor]:
    """Cut rows to `longest` and fill them up: tokens and attention mask, (rows, seq_len) int64 each."""
    cut = [list(row[:longest]) for row in rows]
    length = max(map(len, cut))
    tokens = torch.tensor([row + [PAD] * (length - len(row)) for row in cut])
    return tokens, (tokens != PAD).long()
