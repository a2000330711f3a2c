"""The whole conversion of a model directory, in steps that an interrupted run does not repeat."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from fastff.convert import report
from fastff.convert.capture import Captured, Progress, capture
from fastff.convert.distil import Kind, distil, distillation_loss
from fastff.convert.evaluate import accuracy, perplexity, read_table, similarity
from fastff.convert.measure import latency_ms, layer_times, oracle_missed, routing
from fastff.convert.student import build_student, dense_layers, describe_narrow, flops, tree_for
from fastff.convert.text import Examples, tokenise
from fastff.errors import CheckpointError
from fastff.models.converted import make_converted
from fastff.models.families import family_of

HELD_OUT = 0.02  # share of the text kept for perplexity and the held-out loss
AUTO: dict[Kind, Any] = {
    "embedding": AutoModel,
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "classifier": AutoModelForSequenceClassification,
}
METRIC: dict[Kind, str] = {"embedding": "Spearman x 100", "causal": "perplexity", "classifier": "accuracy, percent"}


@dataclass(frozen=True)
class Settings:
    """What to convert and how.

    model        directory (or hub name) of a dense Transformers model
    text         unlabelled text, one example a line
    out          directory to write
    active       largest share of a dense layer's floating-point operations that its tree may spend, routing included
    table        evaluation table: sentence1, sentence2, label for embedding models; sentence, label for classifiers
    rows         tokens captured a block      layer_steps  steps of each layer alone
    steps        steps of all layers together  batch       examples a step
    max_length   tokens an example            max_tokens   tokens read from the text
    rate         learning rate of the new layers; rate_others of all else but the embeddings
    controls     also convert to a narrow dense layer of equal work, distilled alike, and report it beside the tree
    keep_slow    convert also layers whose tree is measured to be slower than the dense layer
    """

    model: str
    text: Path
    out: Path
    active: float = 0.1
    table: Path | None = None
    rows: int = 200_000
    layer_steps: int = 200
    steps: int = 2000
    batch: int = 32
    max_length: int = 128
    max_tokens: int = 20_000_000
    rate: float = 1e-3
    rate_others: float = 1e-4
    seed: int = 0
    controls: bool = True
    keep_slow: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.active <= 1.0:
            raise ValueError(f"active {self.active} is not in (0, 1]")
        for name in ("rows", "layer_steps", "steps", "batch", "max_length", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not at least 1")


def kind_of(config: Any) -> Kind:
    """What a model is used for, by the class that its configuration names."""
    name = (getattr(config, "architectures", None) or [""])[0]
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    if name.endswith("ForSequenceClassification"):
        return "classifier"
    return "masked" if name.endswith("ForMaskedLM") else "embedding"


def load_dense(model: str) -> tuple[Any, Any, Kind]:
    """Model (float32, evaluation mode, on a GPU if there is one), tokenizer and kind.

    Raises CheckpointError for an unknown model type, no weights, or missing tensors."""
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model} has no configuration that Transformers knows: {error}") from error
    family_of(config.model_type)
    kind = kind_of(config)
    try:
        dense, info = AUTO[kind].from_pretrained(model, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model} cannot be loaded: {error}") from error
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise CheckpointError(f"{model} lacks {len(missing)} tensors, {missing[0]} among them")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return dense.to(device).eval(), tokenizer, kind


def convert(settings: Settings, *, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Convert a model and write OUT: weights, configuration, tokenizer, README.md and report/. Returns the report.

    An interrupted run goes on where it stopped when called again with the same settings; OUT/work holds its state and
    is removed at the end. Raises CheckpointError or ValueError for what cannot be converted, before the long work.
    """
    began = time.perf_counter()
    work = settings.out / "work"
    teacher, tokenizer, kind = load_dense(settings.model)
    dense = dense_layers(teacher)
    descriptions: list[Any] = [tree_for(layer, settings.active) for layer in dense]
    table = None if settings.table is None else read_table(settings.table)
    _claim(work, settings)
    examples, held_out = _examples(settings, tokenizer, kind, work)
    captured = capture(teacher, examples, work, rows=settings.rows, batch=settings.batch, progress=progress)
    torch.manual_seed(settings.seed)
    times = layer_times(teacher, descriptions)
    if not settings.keep_slow:
        descriptions = [d if t["new_us"] < t["dense_us"] else None for d, t in zip(descriptions, times, strict=True)]
    if not any(descriptions):
        raise ValueError(f"no layer is faster as a tree at active {settings.active:.1%} here: ask for less")

    def quality(model: Any) -> float | None:
        if kind == "causal":
            return perplexity(model, held_out)
        if table is None or kind == "masked":
            return None
        return similarity(model, tokenizer, table) if kind == "embedding" else accuracy(model, tokenizer, table)

    arms = {"tree": descriptions}
    if settings.controls:
        arms["narrow dense"] = [_narrow(layer, d) for layer, d in zip(dense, descriptions, strict=True)]
    results: dict[str, Any] = {}
    for name, arm in arms.items():
        folder = work / name.replace(" ", "-")
        student, results[name] = _arm(
            settings, kind, teacher, arm, captured, examples, held_out, quality, folder, progress
        )
        if name == "tree":
            tree = student
    record = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()},
        "kind": kind,
        "metric": METRIC.get(kind),
        "dense": quality(teacher),
        "arms": results,
        "active": _active(dense, descriptions),
        "layers": [
            {"block": k, "description": d, **t, "oracle_missed": oracle_missed(teacher, k, captured[k])}
            for k, (d, t) in enumerate(zip(descriptions, times, strict=True))
        ],
        "latency": {"dense_ms": latency_ms(teacher), "converted_ms": latency_ms(tree)},
        "routing": routing(tree, held_out),
        "device": torch.cuda.get_device_name() if teacher.device.type == "cuda" else "CPU",
        "seconds": time.perf_counter() - began,
    }
    _write(settings, tree, tokenizer, record)
    del captured  # its files are mapped
    shutil.rmtree(work)
    return record


def _narrow(layer: Any, description: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if description is None:
        return None
    share = flops(layer, description) / layer.flops_per_row
    return describe_narrow(layer, max(1, round(share * layer.neurons)))


def _active(dense: Sequence[Any], descriptions: Sequence[Mapping[str, Any] | None]) -> float:
    spent = sum(l.flops_per_row if d is None else flops(l, d) for l, d in zip(dense, descriptions, strict=True))  # noqa: E741
    return float(spent / sum(layer.flops_per_row for layer in dense))


def _claim(work: Path, settings: Settings) -> None:
    """Raise CheckpointError if the folder holds the state of a run with other settings."""
    mine = json.dumps(asdict(settings), default=str, sort_keys=True)
    stamp = work / "settings.json"
    if stamp.exists() and stamp.read_text() != mine:
        raise CheckpointError(f"{work} belongs to an interrupted run with other settings: repeat those or remove it")
    work.mkdir(parents=True, exist_ok=True)
    stamp.write_text(mine)


def _examples(settings: Settings, tokenizer: Any, kind: Kind, work: Path) -> tuple[Examples, Examples]:
    """Examples to learn from, and those held out. Raises CheckpointError for too little text."""
    every = tokenise(
        tokenizer,
        settings.text,
        work,
        max_length=settings.max_length,
        max_tokens=settings.max_tokens,
        whole_blocks=kind == "causal",
    )
    aside = max(1, int(HELD_OUT * len(every)))
    examples = every.slice(0, max(0, len(every) - aside))
    if len(examples) < settings.batch or examples.tokens < settings.rows:
        raise CheckpointError(
            f"{settings.text} gives {len(examples)} examples and {examples.tokens} tokens to learn from: at least "
            f"{settings.batch} examples (batch) and {settings.rows} tokens (rows) are needed"
        )
    return examples, every.slice(len(every) - aside, len(every))


def _arm(
    settings: Settings,
    kind: Kind,
    teacher: Any,
    descriptions: Sequence[Mapping[str, Any] | None],
    captured: Sequence[Captured],
    examples: Examples,
    held_out: Examples,
    quality: Callable[[Any], float | None],
    folder: Path,
    progress: Progress,
) -> tuple[Any, dict[str, Any]]:
    """Build, distil and evaluate one student, going on from what `folder` holds."""
    folder.mkdir(parents=True, exist_ok=True)
    built, saved = folder / "built.pt", folder / "distil.pt"
    if built.exists():
        student = make_converted(teacher, descriptions)
        facts = _load(built, student)
    else:
        student, missed = build_student(
            teacher, descriptions, captured, steps=settings.layer_steps, seed=settings.seed, progress=progress
        )
        facts = {"missed": missed, "before": quality(student)}
        _save(built, student, facts)
    state = _load(saved, student) if saved.exists() else None
    distil(
        student,
        teacher,
        examples,
        kind=kind,
        steps=settings.steps,
        batch=settings.batch,
        rate=settings.rate,
        rate_others=settings.rate_others,
        seed=settings.seed,
        progress=progress,
        start=0 if state is None else state["step"],
        state=state,
        checkpoint=lambda step, more: _save(saved, student, {"step": step, **more}),
    )
    with torch.no_grad():
        losses = [
            float(distillation_loss(student, teacher, held_out.batch(which, student.device), kind))
            for which in held_out.in_order(settings.batch)
        ]
    _save(saved, student, {"step": settings.steps})
    return student, {**facts, "after": quality(student), "held_out_loss": sum(losses) / len(losses)}


def _save(path: Path, student: Any, facts: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    torch.save({"model": student.state_dict(), "facts": facts}, part)
    os.replace(part, path)  # an interruption leaves the old file or the new one


def _load(path: Path, student: Any) -> dict[str, Any]:
    stored = torch.load(path, map_location=student.device, weights_only=True)
    student.load_state_dict(stored["model"])
    facts: dict[str, Any] = stored["facts"]
    return facts


def _write(settings: Settings, student: Any, tokenizer: Any, record: dict[str, Any]) -> None:
    student.eval().save_pretrained(settings.out)
    tokenizer.save_pretrained(settings.out)
    source = Path(settings.model)
    for name in ("modules.json", "1_Pooling", "2_Normalize", "config_sentence_transformers.json"):
        path = source / name
        if path.is_dir():
            shutil.copytree(path, settings.out / name, dirs_exist_ok=True)
        elif path.is_file():
            shutil.copy(path, settings.out / name)
    report.write(settings.out, record)
