"""Quality of a model on the user's table: Spearman correlation, accuracy, or perplexity; on pictures, likeness."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from fastff.convert.distil_loss import has_pooler, mean_pool, picture_features
from fastff.errors import CheckpointError
from fastff.io import reading
from fastff.models.kinds import Kind
from fastff.text.examples import Examples, tokenise

BATCH = 64
_TEXTS = ("sentence", "sentence1", "sentence2")  # columns of a classifier's table
_SCORED: tuple[Kind, ...] = ("embedding", "causal", "classifier")  # on a table of the user's
METRIC: dict[Kind, str] = {
    "embedding": "Spearman x 100",
    "causal": "perplexity",
    "classifier": "accuracy, percent",
    "image": "cosine with dense features x 100",
}
Measure = Callable[[Any], float]  # of a model


def measures_of(
    kind: Kind, tokenizer: Any, tables: Sequence[Path], folder: Path, *, max_length: int, max_tokens: int
) -> dict[str, Measure]:
    """The metric of a kind of model on each table, by the table's name. Tokens of texts are written into `folder`.

    Raises CheckpointError for a file that cannot be used, or a kind that has no metric."""
    if tables and kind not in _SCORED:
        raise CheckpointError(f"a {kind} model has no metric here: it cannot be scored on {tables[0]}")
    found: dict[str, Measure] = {}
    for k, path in enumerate(tables):
        name = table_name(path)
        if name in found:
            raise CheckpointError(f"two tables are named {name}: rename one, or put it into another folder")
        if kind == "causal":
            sizes: dict[str, Any] = {"max_length": max_length, "max_tokens": max_tokens, "whole_blocks": True}
            examples = tokenise(tokenizer, path, folder / f"table-{k}", **sizes)
            if not len(examples):
                raise CheckpointError(f"{path} has less than one block of {max_length} tokens")
            found[name] = partial(perplexity, examples=examples)
        else:
            measure = similarity if kind == "embedding" else accuracy
            table = read_table(path)
            for column in ("sentence1", "sentence2", "label") if kind == "embedding" else ("label",):
                if column not in table:
                    raise CheckpointError(f"{path} has no column {column}, only {', '.join(table) or 'none'}")
            if kind == "classifier":
                _check_classes(path, table)
            found[name] = partial(measure, tokenizer=tokenizer, table=table, max_length=max_length)
    return found


def table_name(path: Path) -> str:
    """Its folder's name and its own, such as STS-B/dev."""
    return f"{path.resolve().parent.name}/{path.stem}"


def _check_classes(path: Path, table: dict[str, list[Any]]) -> None:
    if not set(_TEXTS) & set(table):
        raise CheckpointError(f"{path} has no column sentence or sentence1, only {', '.join(table)}")
    for number, label in enumerate(table["label"], 1):
        try:
            int(label)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: label {label!r} of row {number} is not the number of a class") from error


def read_table(path: Path) -> dict[str, list[Any]]:
    """Columns of a .parquet, .tsv or .csv table by name. Raises CheckpointError for another format or no file."""
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    if path.suffix not in (".parquet", ".tsv", ".csv"):
        raise CheckpointError(f"{path.name}: expected .parquet, .tsv or .csv")
    with reading(path, "make the table again"):
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return dict(pq.read_table(path).to_pydict())
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
        for number, row in enumerate(rows, 1):
            if None in row.values():
                raise ValueError(f"row {number} has fewer columns than the header")
        return {name: [row[name] for row in rows] for name in (rows[0] if rows else {}) if name is not None}


@torch.no_grad()
def embed(model: Any, tokenizer: Any, sentences: list[str], max_length: int = 128) -> torch.Tensor:
    """Normalised mean-pooled embeddings (sentences, width) on the CPU."""
    model.eval()
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    out: list[torch.Tensor] = [torch.empty(0)] * len(sentences)
    for start in range(0, len(order), BATCH):
        which = order[start : start + BATCH]
        inputs = tokenizer(
            [sentences[i] for i in which], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        ).to(model.device)
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        pooled = F.normalize(mean_pool(hidden, inputs["attention_mask"]), dim=-1).float().cpu()
        for i, row in zip(which, pooled, strict=True):
            out[i] = row
    return torch.stack(out)


def similarity(
    model: Any, tokenizer: Any, table: dict[str, list[Any]], score: str = "label", *, max_length: int = 128
) -> float:
    """100 x Spearman of cosine similarity with the column `score`, over sentence1 and sentence2."""
    both = embed(model, tokenizer, [*table["sentence1"], *table["sentence2"]], max_length)
    a, b = both.chunk(2)
    return 100 * float(spearmanr((a * b).sum(-1).numpy(), np.asarray(table[score], dtype=np.float64)).statistic)


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, table: dict[str, list[Any]], *, max_length: int = 128) -> float:
    """Percent of rows whose label a classifier finds; columns sentence (or sentence1 and sentence2) and label."""
    model.eval()
    texts = [table[name] for name in _TEXTS if name in table]
    right = 0
    for start in range(0, len(table["label"]), BATCH):
        part = [column[start : start + BATCH] for column in texts]
        cut = {"padding": True, "truncation": True, "max_length": max_length, "return_tensors": "pt"}
        inputs = tokenizer(*part, **cut).to(model.device)
        want = torch.tensor([int(label) for label in table["label"][start : start + BATCH]])
        right += int((model(**inputs).logits.argmax(-1).cpu() == want).sum())
    return 100 * right / len(table["label"])


@torch.no_grad()
def likeness(teacher: Any, examples: Examples, batch: int = 16) -> Measure:
    """What measures, of a model, 100 x the mean cosine of its features of the pictures and the teacher's: 100 is the
    teacher itself. The teacher's features are kept on the CPU."""
    pooler, wanted = False, []
    for which in examples.in_order(batch):
        output = teacher(**examples.batch(which, teacher.device))
        pooler = has_pooler(output)
        wanted.append(picture_features(output, pooler=pooler).float().cpu())

    @torch.no_grad()
    def measure(model: Any) -> float:
        model.eval()
        total = 0.0
        for which, want in zip(examples.in_order(batch), wanted, strict=True):
            output = model(**examples.batch(which, model.device))
            got = picture_features(output, pooler=pooler).float().cpu()
            total += float(F.cosine_similarity(got, want, dim=-1).sum())
        return 100 * total / len(examples)

    return measure


@torch.no_grad()
def perplexity(model: Any, examples: Examples, batch: int = 16) -> float:
    """Of the next token, over all examples."""
    model.eval()
    total, count = 0.0, 0
    for which in examples.in_order(batch):
        inputs = examples.batch(which, model.device)
        logits = model(**inputs).logits[:, :-1].float()
        target = inputs["input_ids"][:, 1:]
        valid = inputs["attention_mask"][:, 1:].bool()
        total += float(F.cross_entropy(logits[valid], target[valid], reduction="sum"))
        count += int(valid.sum())
    return math.exp(total / count)
