"""The whole conversion of a model directory, in steps that an interrupted run does not repeat."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fastff.convert import report, resources
from fastff.convert.arms import Course, active_share, control, keep_loss, teach
from fastff.convert.capture import Progress, capture
from fastff.convert.distil import Kind
from fastff.convert.evaluate import accuracy, perplexity, read_table, similarity
from fastff.convert.load import load_dense
from fastff.convert.measure import WHOLE, feedforward_us, model_us, oracle_missed, routing
from fastff.convert.plan import Clock, Option, choose, largest, shares_of
from fastff.convert.probe import Bench, Survey, probe, survey
from fastff.convert.settings import Settings
from fastff.convert.student import dense_layers
from fastff.convert.text import Examples, tokenise
from fastff.errors import CheckpointError

HELD_OUT = 0.02  # share of the text kept for perplexity and the held-out loss
METRIC: dict[Kind, str] = {"embedding": "Spearman x 100", "causal": "perplexity", "classifier": "accuracy, percent"}


def convert(settings: Settings, *, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Convert a model and write OUT: weights, configuration, tokenizer, README.md and report/. Returns the report.

    An interrupted run goes on where it stopped when called again with the same settings; OUT/work holds its state and
    is removed at the end. Raises CheckpointError or ValueError for what cannot be converted, before the long work.
    """
    began = time.perf_counter()
    work = settings.out / "work"
    teacher, tokenizer, kind = load_dense(settings.model)
    table = None if settings.table is None else read_table(settings.table)
    quality = quality_of(kind, tokenizer, table)
    if settings.max_loss is not None and quality is None and kind != "causal":
        raise ValueError(f"max_loss {settings.max_loss:.2%} needs an evaluation table")
    _claim(work, settings)
    examples, held_out = split_examples(settings, tokenizer, kind, work)
    torch.manual_seed(settings.seed)
    found = None if (work / "plan.json").exists() else survey(teacher, settings, progress)
    resources.check(settings, teacher, kind, largest(settings, dense_layers(teacher)), work)
    captured = capture(teacher, examples, work, rows=settings.rows, batch=settings.batch, progress=progress)
    measure = quality or (lambda model: perplexity(model, held_out) if kind == "causal" else None)
    course = Course(settings, kind, teacher, captured, examples, held_out, measure, progress)
    plan = _planned(work, course, found)
    points = [_point(course, plan, settings, work / "main")]
    for share in settings.curve:
        budget = replace(settings, active=share, speedup=None, max_loss=None)
        points.append(_point(course, plan, budget, work / f"curve-{share:g}"))
    record = _record(course, plan, points) | {"seconds": time.perf_counter() - began}
    _write(settings, points[0]["models"]["tree"], tokenizer, record)
    del captured, course, points  # their files are mapped
    shutil.rmtree(work)
    return record


def quality_of(kind: Kind, tokenizer: Any, table: dict[str, list[Any]] | None) -> Callable[[Any], float | None] | None:
    """The metric on the user's table, None where there is no table or none is needed."""
    if table is None or kind not in ("embedding", "classifier"):
        return None
    measure = similarity if kind == "embedding" else accuracy
    return lambda model: measure(model, tokenizer, table)


def _claim(work: Path, settings: Settings) -> None:
    """Raise CheckpointError if the folder holds the state of a run with other settings."""
    mine = json.dumps(asdict(settings), default=str, sort_keys=True)
    stamp = work / "settings.json"
    if stamp.exists() and stamp.read_text() != mine:
        raise CheckpointError(f"{work} belongs to an interrupted run with other settings: repeat those or remove it")
    work.mkdir(parents=True, exist_ok=True)
    stamp.write_text(mine)


def split_examples(settings: Settings, tokenizer: Any, kind: Kind, work: Path) -> tuple[Examples, Examples]:
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


def _planned(work: Path, course: Course, found: Survey | None) -> dict[str, Any]:
    """Options of every block and what was measured for them; an interrupted run's own, if its file is there."""
    path = work / "plan.json"
    if found is not None:
        settings = course.settings
        shares = sorted({*shares_of(settings), *settings.curve}, reverse=True)
        bench = Bench(course.teacher, course.kind, course.captured, course.held_out, settings)
        options, tried = probe(bench, found, shares, course.progress)
        plan = {
            "clock": asdict(found.clock),
            "tried": tried,
            "options": [[asdict(o) for o in block] for block in options],
        }
        part = path.with_suffix(".part")
        part.write_text(json.dumps(plan))
        os.replace(part, path)
    plan = json.loads(path.read_text())
    return {
        **plan,
        "options": [[Option(**o) for o in block] for block in plan["options"]],
        "clock": Clock(**plan["clock"]),
    }


def _point(course: Course, plan: dict[str, Any], budget: Settings, folder: Path) -> dict[str, Any]:
    """Convert under one budget, with the controls. "none" belongs to the main budget alone: it has no other."""
    dense = dense_layers(course.teacher)
    chosen = choose(budget, plan["options"], plan["clock"])
    trees = [block[k].description for block, k in zip(plan["options"], chosen, strict=True)]
    if not any(trees):
        raise ValueError(f"every layer stays dense: no tree of active {budget.share:.1%} pays here")
    student, facts = teach(course, "tree", trees, folder / "tree")
    back: list[int] = []
    if budget.max_loss is not None:
        student, facts, back = keep_loss(course, student, facts)
        trees = list(student.config.fastff_feedforwards)
    models, arms = {"tree": student}, {"tree": {**facts, "active": active_share(dense, trees)}}
    main = budget is course.settings
    for name in (name for name in budget.controls if main or name != "none"):
        descriptions = control(name, dense, trees)
        models[name], arms[name] = teach(course, name, descriptions, folder / name)
        arms[name]["active"] = active_share(dense, descriptions)
    return {"budget": budget, "models": models, "arms": arms, "trees": trees, "back": back, "chosen": chosen}


def _record(course: Course, plan: dict[str, Any], points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Everything the report says, the latencies measured here with all models taking turns."""
    settings, teacher = course.settings, course.teacher
    models = {"dense": teacher}
    for k, point in enumerate(points):
        models |= {f"{k} {name}": model for name, model in point["models"].items()}
    for k, shape in enumerate(settings.shapes):
        whole = model_us(models, shape, WHOLE * settings.timing_s)
        layers = feedforward_us(models, course.captured, shape, settings.timing_s)
        for name in models:
            at = (
                points[int(name.split()[0])]["arms"][name.split()[1]]
                if name != "dense"
                else plan.setdefault("dense", {})
            )
            at.setdefault("latency_ms", []).append(whole[name] / 1e3)
            at.setdefault("feedforward_ms", []).append(layers[name] / 1e3)
            assert len(at["latency_ms"]) == k + 1
    return {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()},
        "kind": course.kind,
        "metric": METRIC.get(course.kind),
        "shapes": settings.shapes,
        "dense": {"quality": course.quality(teacher), **plan["dense"]},
        "arms": points[0]["arms"],
        "curve": [{"asked": p["budget"].active, "arms": p["arms"]} for p in points[1:]],
        "layers": _layers(course, plan, points[0]),
        "tried": plan["tried"],
        "ceilings": plan["clock"].ceilings(),
        "routing": routing(points[0]["models"]["tree"], course.held_out),
        "device": torch.cuda.get_device_name() if teacher.device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
    }


def _layers(course: Course, plan: dict[str, Any], point: dict[str, Any]) -> list[dict[str, Any]]:
    """Per block: what stands there and why, and every option that was measured."""
    out = []
    for k, (options, description) in enumerate(zip(plan["options"], point["trees"], strict=True)):
        if description is not None:
            reason = "chosen"
        elif k in point["back"]:
            reason = "dense again: with the tree more than the allowed loss"
        elif len(options) > 1 and course.settings.speedup is not None:
            reason = "dense: the speedup is reached without it, and its tree harms more than others"
        else:
            reason = "dense: every tree tried is slower here"
        out.append(
            {
                "block": k,
                "description": description,
                "reason": reason,
                "options": [asdict(option) for option in options],
                "missed": point["arms"]["tree"]["missed"][k],
                "oracle_missed": oracle_missed(course.teacher, k, course.captured[k]),
            }
        )
    return out


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
