"""Fine-tuning on GLUE and scoring: several seeds a task, each a file, so that a second run goes on where one stopped.

Recipe of the paper (arXiv:2311.10770): lr 4e-5, 5 epochs (CoLA 15), batch 16, cosine, dropout 0.1, median of 5 seeds.
"""

# Transformers' own methods are not typed.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import hashlib
import inspect
import statistics
import tempfile
from collections.abc import Callable, Container
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from fastff import models
from fastff.errors import FileError, TrainingError
from fastff.inspect import conditional_layers
from fastff.io import REMEDY, digest, read_json, reading, write_json
from fastff.machine import machine
from fastff.report.progress import Progress, silent
from fastff.text.positions import token_positions
from fastff.text.tokenizer import load_tokenizer
from fastff.train import tasks
from fastff.train.glue_settings import RENAMED_OPTIONS, GlueSettings
from fastff.train.pretrain import quietly
from fastff.train.saving import claim_run
from fastff.train.tasks import TASKS, Rows, Task
from fastff.train.trainer import parameter_groups

RESULT = "glue.json"
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "embedding_dropout", "classifier_dropout")


def glue(settings: GlueSettings, *, progress: Progress = silent) -> dict[str, Any]:
    """Fine-tune and score every task and seed that has no file yet; returns the summary, also in `out`/glue.json.

    `out`/TASK/seed-N.json holds the scores, the predictions and the notes of one. Raises TrainingError for data that is
    not there or a tokenizer that does not fit the model, CheckpointError for a model that cannot be read.
    """
    claim(settings)
    for name, seed in missing(settings):
        score(settings, name, seed, progress=progress)
    summary = summarise(settings)
    write_json(settings.out / RESULT, summary)
    return summary


def claim(settings: GlueSettings) -> None:
    """Make `out` the folder of this scoring, of the model as it is now. Raises FileError, naming each difference, if it
    is another's."""
    content = {"model_sha256": content_of(Path(settings.model))}
    # A scoring that an earlier version began says nothing of the content.
    claim_run(
        settings.out,
        settings.identity | content,
        lambda kept: content | {RENAMED_OPTIONS.get(k, k): v for k, v in kept.items()},
    )


def content_of(folder: Path) -> str | None:
    """SHA-256 of a model directory's files, names and contents; None where it is a name on the hub."""
    if not folder.is_dir():
        return None
    files = sorted(path for kind in ("*.safetensors", "*.bin", "*.json") for path in folder.glob(kind))
    return hashlib.sha256("".join(f"{path.name} {digest(path)}\n" for path in files).encode()).hexdigest()


def read_record(settings: GlueSettings, name: str, seed: int) -> dict[str, Any]:
    """What `score` wrote. Raises FileError if it is damaged."""
    path = record_path(settings, name, seed)
    record: dict[str, Any] = read_json(path, needs={"train_note": str, "dev": dict, "curve": list})
    if not isinstance(record.get("score"), (float, int, type(None))):
        raise FileError(f"{path} is damaged (score {record.get('score')!r:.80}): {REMEDY}")
    return record


def record_path(settings: GlueSettings, name: str, seed: int) -> Path:
    """The file of one task and seed."""
    return settings.out / name / f"seed-{seed}.json"


def missing(settings: GlueSettings) -> list[tuple[str, int]]:
    """Tasks and seeds that have no file yet."""
    every = [(name, seed) for name in settings.tasks for seed in range(settings.seeds)]
    return [(name, seed) for name, seed in every if not record_path(settings, name, seed).is_file()]


def score(settings: GlueSettings, name: str, seed: int, *, progress: Progress = silent) -> None:
    """Fine-tune and score one seed of one task, and write its file. Raises as `glue` does."""
    task = tasks.with_epochs(TASKS[name], settings.epochs)
    train, dev = _rows(task, settings.data, settings.limit)
    with quietly():
        record = fine_tune(settings, task, tasks.at_most(train, settings.max_train_rows, task), dev, seed, progress)
    write_json(record_path(settings, name, seed), record)


@lru_cache(maxsize=1)  # the seeds of a task come one after the other
def _rows(task: Task, data: Path | None, limit: int | None) -> tuple[Rows, dict[str, Rows]]:
    return tasks.load(task, data, limit=limit)


def fine_tune(
    settings: GlueSettings, task: Task, train: Rows, dev: dict[str, Rows], seed: int, progress: Progress
) -> dict[str, Any]:
    """One seed of one task: scores and predictions by dev split, and the training loss in ten parts ("curve")."""
    set_seed(seed)
    model, tokenizer = load_model(settings, task)
    longest = token_positions(model.config, tokenizer.model_max_length)
    takes = inspect.signature(model.forward).parameters
    encoded, cut = encode(tokenizer, train, longest, takes)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _GlueTrainer(
            settings.layer_lr_scale,
            model=model,
            args=_arguments(settings, task, seed, folder),
            train_dataset=_items(encoded, train, task),
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[_ProgressCallback(partial(progress, f"{task.name}, seed {seed}"))],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        found: dict[str, Any] = {}
        for name, rows in dev.items():
            encoded, _ = encode(tokenizer, rows, longest, takes)
            logits: Any = trainer.predict(_items(encoded, rows, task)).predictions  # type: ignore[arg-type]
            predicted = logits[:, 0].astype(float) if task.labels == 1 else logits.argmax(1)
            if not np.isfinite(logits).all():
                raise TrainingError(f"{task.name}, seed {seed}: the predictions are not finite")
            measures = tasks.scores(task, predicted, rows.labels)
            found[name] = {**measures, "note": rows.note, "predictions": [round(float(p), 5) for p in predicted]}
    return {
        "task": task.name,
        "seed": seed,
        "score": tasks.mean({f"{n}-{m}": found[n][m] for n in found for m in task.metrics}),
        "train_note": train.note,
        "train_rows": len(train),
        "rows_cut": cut,
        "epochs": None if settings.steps else task.epochs,
        "steps": trainer.state.global_step,
        "curve": [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry],
        "dev": found,
        "machine": machine("transformers"),
    }


def load_model(settings: GlueSettings, task: Task) -> tuple[Any, Any]:
    """The model with a new head, and its tokenizer. Raises TrainingError if they do not fit together, or if there is no
    model that can be read."""
    config = _original_config(settings.model)
    changes: dict[str, Any] = {"num_labels": task.labels}
    if isinstance(config, models.UltraFastBertConfig):
        changes |= dict.fromkeys(DROPOUTS, settings.dropout)
    tokenizer = load_tokenizer(settings.model)
    if len(tokenizer) > config.vocab_size:
        raise TrainingError(
            f"the tokenizer of {settings.model} has {len(tokenizer)} entries, its model {config.vocab_size}"
        )
    if tokenizer.pad_token_id != config.pad_token_id:
        pads = f"pads with {tokenizer.pad_token_id}, its model with {config.pad_token_id}"
        raise TrainingError(f"the tokenizer of {settings.model} {pads}")
    with reading(Path(settings.model), "make or fetch that model again"):
        model = AutoModelForSequenceClassification.from_pretrained(settings.model, **changes)
    if settings.layer_lr_scale == 0:
        for layer in conditional_layers(model).values():
            layer.requires_grad_(False)
    return model, tokenizer


def _original_config(model: str) -> Any:
    """The configuration of a model; of the original architecture if it was converted. Raises TrainingError."""
    try:
        config = AutoConfig.from_pretrained(model)
    except OSError as error:
        nothing = "is neither a directory nor a name of the hub with a configuration that can be read"
        raise TrainingError(f"model {model} {nothing}: {error}") from error
    return config.base_config() if isinstance(config, models.ConvertedConfig) else config


def encode(tokenizer: Any, rows: Rows, longest: int, takes: Container[str]) -> tuple[dict[str, list[list[int]]], int]:
    """What a model takes of what the tokenizer gives for every row (token ids, segments), cut to its positions, and how
    many rows were cut."""
    columns = [list(column) for column in zip(*rows.texts, strict=True)]
    found = tokenizer(*columns, truncation=False, verbose=False)
    cut = sum(len(row) > longest for row in found["input_ids"])
    if cut:
        found = tokenizer(*columns, truncation="longest_first", max_length=longest)
    return {name: column for name, column in found.items() if name in takes}, cut


def _items(encoded: dict[str, list[list[int]]], rows: Rows, task: Task) -> list[dict[str, Any]]:
    kind = float if task.labels == 1 else int
    return [
        {**{name: column[k] for name, column in encoded.items()}, "label": kind(label)}
        for k, label in enumerate(rows.labels)
    ]


def _arguments(settings: GlueSettings, task: Task, seed: int, folder: str) -> TrainingArguments:
    cpu = settings.cpu or not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=task.epochs,
        max_steps=settings.steps or -1,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=64,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        max_grad_norm=1.0,
        logging_steps=0.1,  # of all
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        use_cpu=cpu,
        bf16=settings.precision == "bf16",
        dataloader_pin_memory=not cpu,
    )


class _GlueTrainer(Trainer):
    """The library's, with a rate of their own for conditional layers."""

    def __init__(self, layer_lr_scale: float, **arguments: Any) -> None:
        self.layer_lr_scale = layer_lr_scale
        super().__init__(**arguments)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained: Any = model or self.model
            lr = self.args.learning_rate
            groups = parameter_groups(trained, lr, self.layer_lr_scale, self.args.weight_decay)
            self.optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
        return self.optimizer


class _ProgressCallback(TrainerCallback):
    """Says how far the fine-tuning is."""

    def __init__(self, progress: Callable[[float, float], None]) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress(state.global_step, state.max_steps)


def summarise(settings: GlueSettings) -> dict[str, Any]:
    """Median, least and greatest score of each task over its seeds, and the mean of the medians.

    A score that does not exist for one seed (all predictions equal) leaves the task, and the mean, without one.
    """
    found: dict[str, Any] = {}
    for name in settings.tasks:
        records = [read_record(settings, name, seed) for seed in range(settings.seeds)]
        values = [record["score"] for record in records]
        known = all(value is not None for value in values)
        notes = [f"train {records[0]['train_note']}" if records[0]["train_note"] else ""]
        notes += [f"{split} {dev['note']}" for split, dev in records[0]["dev"].items() if dev["note"]]
        found[name] = {
            "metrics": list(TASKS[name].metrics),
            "median": statistics.median(values) if known else None,
            "least": min(values) if known else None,
            "greatest": max(values) if known else None,
            "scores": values,
            "note": "; ".join(note for note in notes if note),
        }
    medians = [task["median"] for task in found.values()]
    whole = all(median is not None for median in medians)
    return {
        "settings": {**settings.identity, "seeds": settings.seeds},
        "tasks": found,
        "mean": sum(medians) / len(medians) if whole else None,
        "comparable_with_published": not any(task["note"] for task in found.values()),
    }
