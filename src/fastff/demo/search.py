"""Semantic search over the bundled novels: sentences a second of two models, and how far their hits agree."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import fastff.engine
from fastff.demo.data import labelled, manifest

HITS = 10
QUERIES = (
    "a proposal of marriage",
    "a storm at sea",
    "money that is owed",
    "a funeral on a cold morning",
    "children at play",
    "a letter that brings bad news",
    "a journey by coach at night",
    "an old house in the country",
)


@dataclass(frozen=True)
class Searched:
    """One model. hits: sentence indices of every query, best first."""

    sentences_per_s: float
    hits: list[list[int]]


def sentences(count: int) -> list[tuple[str, str]]:
    """(author, sentence) of unseen novels."""
    names = {book["name"].split("_")[0]: book["author"] for book in manifest()["books"]}
    return [(names[author], text) for author, text in labelled("authors-unseen.tsv.xz")[:count]]


def searched(model: Path, texts: Sequence[str]) -> Searched:
    """Embed sentences and queries by an export for the native engine."""
    engine: Any = fastff.engine.load(model)
    engine.encode(list(texts[:32]))
    start = time.perf_counter()
    rows = engine.encode(list(texts), normalize_embeddings=True)
    seconds = time.perf_counter() - start
    queries = engine.encode(list(QUERIES), normalize_embeddings=True)
    best = np.argsort(-(queries @ rows.T), axis=1, kind="stable")[:, :HITS]
    return Searched(len(texts) / seconds, best.tolist())


def agreement(one: Searched, other: Searched) -> float:
    """Share of the best hits of a query that two models share."""
    pairs = zip(one.hits, other.hits, strict=True)
    return float(np.mean([len(set(a) & set(b)) / HITS for a, b in pairs]))
