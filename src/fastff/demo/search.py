"""Semantic search over the bundled novels: sentences a second of two models, and how far their hits agree."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import fastff.engine
from fastff.demo.data import labelled, manifest

HITS = 10
PART = 128  # sentences that a model embeds before it is the other's turn
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


def searched(models: Mapping[str, Path], texts: Sequence[str]) -> dict[str, Searched]:
    """Embed sentences and queries by exports for the native engine, which take turns: other work meets all of them."""
    engines: dict[str, Any] = {name: fastff.engine.load(path) for name, path in models.items()}
    for engine in engines.values():
        engine.encode(list(texts[:32]))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    rows: dict[str, list[Any]] = {name: [] for name in models}
    parts = [list(texts[at : at + PART]) for at in range(0, len(texts), PART)]
    for part in parts:
        for name, engine in engines.items():
            start = time.perf_counter()
            rows[name].append(engine.encode(part, normalize_embeddings=True))
            seconds[name].append((time.perf_counter() - start) / len(part))
    return {
        name: Searched(1 / float(np.median(seconds[name])), _hits(engine, np.concatenate(rows[name])))
        for name, engine in engines.items()
    }


def _hits(engine: Any, rows: Any) -> list[list[int]]:
    queries = engine.encode(list(QUERIES), normalize_embeddings=True)
    found: list[list[int]] = np.argsort(-(queries @ rows.T), axis=1, kind="stable")[:, :HITS].tolist()
    return found


def agreement(one: Searched, other: Searched) -> float:
    """Share of the best hits of a query that two models share."""
    pairs = zip(one.hits, other.hits, strict=True)
    return float(np.mean([len(set(a) & set(b)) / max(1, len(a)) for a, b in pairs]))
