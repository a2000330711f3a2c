"""The nine GLUE tasks: where their rows come from, what is missing of them, and how predictions are scored.

Source: Wang et al. 2019, arXiv:1804.07461; official sizes as published there and in its data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastff.errors import TrainingError

HUB_NAME = "nyu-mll/glue"
DEV_SHARE, DEV_MOST = 0.1, 1000  # of a train split that must give up a dev part
_DEV_SEED = 1  # the same rows whatever the seed of training


@dataclass(frozen=True)
class Task:
    """labels: classes, 1 for a regression; train, dev: official rows; columns: names on the hub."""

    name: str
    hub: str
    columns: tuple[str, ...]
    labels: int
    metrics: tuple[str, ...]
    train: int
    dev: int
    epochs: int = 5


TASKS = {
    task.name: task
    for task in (
        Task("CoLA", "cola", ("sentence",), 2, ("matthews",), 8551, 1043, epochs=15),
        Task("SST-2", "sst2", ("sentence",), 2, ("accuracy",), 67349, 872),
        Task("MRPC", "mrpc", ("sentence1", "sentence2"), 2, ("accuracy", "f1"), 3668, 408),
        Task("STS-B", "stsb", ("sentence1", "sentence2"), 1, ("pearson", "spearman"), 5749, 1500),
        Task("QQP", "qqp", ("question1", "question2"), 2, ("accuracy", "f1"), 363846, 40430),
        Task("MNLI", "mnli", ("premise", "hypothesis"), 3, ("accuracy",), 392702, 9815),
        Task("QNLI", "qnli", ("question", "sentence"), 2, ("accuracy",), 104743, 5463),
        Task("RTE", "rte", ("sentence1", "sentence2"), 2, ("accuracy",), 2490, 277),
        Task("WNLI", "wnli", ("sentence1", "sentence2"), 2, ("accuracy",), 635, 71),
    )
}


@dataclass(frozen=True)
class Rows:
    """Labelled rows of one split. official: how many the whole split has, None for a part split from train."""

    texts: list[tuple[str, ...]]
    labels: list[float]
    official: int | None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def note(self) -> str:
        """What must be said beside every score: how much is missing, or that the split is not the official one."""
        if self.official is None:
            return f"{len(self)} rows split from train"
        return "" if len(self) == self.official else f"subset: {len(self)} of {self.official} rows"

    def take(self, which: Sequence[int] | np.ndarray[Any, Any], official: int | None) -> Rows:
        """Some of the rows."""
        return Rows([self.texts[i] for i in which], [self.labels[i] for i in which], official)


def load(task: Task, data: Path | None, *, limit: int | None = None) -> tuple[Rows, dict[str, Rows]]:
    """The train rows and the dev rows by split name, from `data`/TASK/*.parquet or, without `data`, from the hub.

    In a directory `train` or `train_subset`, and `dev`, `dev_subset`, `dev_matched`, `dev_mismatched` count; columns
    are `sentence` or `sentence1` and `sentence2`, and `label`. Without dev rows, a tenth of train (at most 1000) is
    taken off. limit: use the first rows only. Raises TrainingError for a directory, column or label that does not fit.
    """
    splits = _from_hub(task) if data is None else _from_directory(task, data / task.name)
    train = splits.pop("train", None)
    if train is None:
        raise TrainingError(f"{task.name} has no train rows")
    if not splits:
        order = np.random.default_rng(_DEV_SEED).permutation(len(train))
        count = max(1, min(DEV_MOST, round(DEV_SHARE * len(train))))
        splits = {"dev": train.take(np.sort(order[:count]), None)}
        train = train.take(np.sort(order[count:]), task.train)
    if limit is not None:
        train = train.take(range(min(limit, len(train))), task.train)
        splits = {name: rows.take(range(min(limit, len(rows))), rows.official) for name, rows in splits.items()}
    return train, splits


def at_most(rows: Rows, most: int | None, task: Task) -> Rows:
    """So many rows of a longer train split, the same at every call; None: all."""
    if most is None or len(rows) <= most:
        return rows
    drawn = np.random.default_rng(_DEV_SEED).permutation(len(rows))[:most]
    return rows.take(np.sort(drawn), task.train)


def _from_directory(task: Task, folder: Path) -> dict[str, Rows]:
    from pyarrow import ArrowException, parquet

    if not folder.is_dir():
        raise TrainingError(f"{folder} is not a directory")
    names = ("sentence",) if len(task.columns) == 1 else ("sentence1", "sentence2")
    found = {}
    for path in sorted(folder.glob("*.parquet")):
        split = path.stem.removesuffix("_subset")
        if split != "train" and not split.startswith("dev"):
            continue
        try:
            table = parquet.read_table(path)
        except (ArrowException, OSError) as error:
            raise TrainingError(f"{path} cannot be read: {error}") from error
        missing = [name for name in (*names, "label") if name not in table.schema.names]
        if missing:
            raise TrainingError(f"{path} has no column {', '.join(missing)}, only {', '.join(table.schema.names)}")
        columns = {name: table.column(name).to_pylist() for name in (*names, "label")}
        found[split] = _rows(task, split, str(path), columns, names)
    if not found:
        raise TrainingError(f"{folder} holds no train.parquet, train_subset.parquet or dev*.parquet")
    return found


def _from_hub(task: Task) -> dict[str, Rows]:
    from datasets import load_dataset

    try:
        splits = load_dataset(HUB_NAME, task.hub)
    except (OSError, ValueError) as error:
        raise TrainingError(f"{HUB_NAME} {task.hub} cannot be read: {error}") from error
    found = {}
    for name, table in splits.items():
        split = name.replace("validation", "dev")
        if not split.startswith("test"):
            columns = {column: list(table[column]) for column in (*task.columns, "label")}
            found[split] = _rows(task, split, f"{HUB_NAME} {task.hub} {name}", columns, task.columns)
    return found


def _rows(task: Task, split: str, source: str, columns: dict[str, list[Any]], names: tuple[str, ...]) -> Rows:
    labels = columns["label"]
    wrong = [
        label for label in labels if label is None or not 0 <= label <= (5 if task.labels == 1 else task.labels - 1)
    ]
    if wrong or not labels:
        seen = f"{len(wrong)} labels such as {wrong[0]!r}" if wrong else "no rows"
        raise TrainingError(f"{source} has {seen}; {task.name} needs {_allowed(task)}")
    texts = list(zip(*(columns[name] for name in names), strict=True))
    return Rows(texts, labels, _official(task, split))


def _allowed(task: Task) -> str:
    return "scores from 0 to 5" if task.labels == 1 else f"labels from 0 to {task.labels - 1}"


def _official(task: Task, split: str) -> int:
    if split == "train":
        return task.train
    return 9832 if split == "dev_mismatched" else task.dev


def scores(task: Task, predicted: np.ndarray[Any, Any], wanted: Sequence[float]) -> dict[str, float | None]:
    """The task's metrics in percent. A correlation of predictions that are all equal does not exist: None."""
    from scipy import stats
    from sklearn import metrics

    if task.labels == 1:
        if np.ptp(predicted) == 0 or np.ptp(wanted) == 0:
            return dict.fromkeys(task.metrics)
        found = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}
        return {name: 100 * float(found[name](predicted, wanted).statistic) for name in task.metrics}
    measures = {
        "accuracy": metrics.accuracy_score,
        "f1": metrics.f1_score,
        "matthews": metrics.matthews_corrcoef,
    }
    return {name: 100 * float(measures[name](wanted, predicted)) for name in task.metrics}


def mean(values: dict[str, float | None]) -> float | None:
    """The score of a task: the mean of its metrics, None if one does not exist."""
    known = [value for value in values.values() if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def with_epochs(task: Task, epochs: int | None) -> Task:
    """The task with other epochs; None leaves its own."""
    return task if epochs is None else replace(task, epochs=epochs)
