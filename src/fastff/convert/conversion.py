"""The whole conversion of a model directory, in steps that an interrupted run does not repeat."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from fastff.convert import conversion_report, earlier, resources
from fastff.convert.beside import Beside
from fastff.convert.candidates import Survey, Trials, probe, survey, trial_count
from fastff.convert.capture import capture
from fastff.convert.choose_layers import choose, largest, shares_of
from fastff.convert.conversion_record import KEPT_ASIDE, MAIN, Plan, Point, record_of
from fastff.convert.conversion_settings import ConversionSettings
from fastff.convert.dense_model import load_dense, longest_input
from fastff.convert.distill_context import (
    DISTILLED,
    Descriptions,
    DistillContext,
    baseline,
    built_s,
    steps_taken,
)
from fastff.convert.engine_latency import ENGINES
from fastff.convert.pictures import picture_paths, store_pictures
from fastff.convert.quality import likeness, measures_of, perplexity
from fastff.convert.student import dense_layers
from fastff.convert.time_budget import (
    TRIALS,
    TimeLeft,
    TimeLimit,
    Timetable,
    TooFewSeconds,
    duration,
    least_s,
    timetable,
)
from fastff.errors import CheckpointError, FileError
from fastff.io import alone_in, claim, read_json, reading, remove_folder, remove_stale, restored, write_json
from fastff.models.carried_files import carry
from fastff.models.kinds import Kind
from fastff.report.progress import Progress, silent
from fastff.text.examples import Examples, tokenise

PLAN, TIMETABLE = "plan.json", "timetable.json"
HELD_OUT = 0.02  # share of the text kept for perplexity and the held-out loss
HELD_OUT_PICTURES = 0.05  # fewer than texts, each of more tokens
FREE = ("seconds",)  # settings that a continued run may change
Say = Callable[[str], None]


def convert(settings: ConversionSettings, *, progress: Progress = silent, say: Say = lambda _: None) -> dict[str, Any]:
    """Convert a model and write OUT: weights, configuration, tokenizer or image processor, README.md and report/.

    Returns the report.
    say gets lines about the time that is left: an estimate before candidates are tried and one before the joint
    distillation, and every minute what is going on. An interrupted run resumes where it stopped when called again with
    the same settings; OUT/work holds its state and is removed at the end. Raises CheckpointError or ValueError for
    what cannot be converted, before the long work.
    """
    limit = TimeLimit(settings.seconds)
    _check_out(settings)
    if settings.time_on == "cuda" and not torch.cuda.is_available():
        raise ValueError("time_on 'cuda': there is no GPU here")
    teacher, processor, kind = load_dense(settings.model, gguf=settings.gguf)
    _check_kind(settings, kind)
    other = None if settings.beside is None else Beside.of(settings.beside, kind)
    longest = longest_input(teacher, processor, kind, settings.max_length)
    if kind == "image":  # what a picture is to the layers: so many tokens
        settings = replace(settings, shapes=tuple((pictures, longest) for pictures, _ in settings.shapes))
    settings = replace(settings.of_kind(kind), max_length=longest)
    settings.out.mkdir(parents=True, exist_ok=True)
    with alone_in(settings.out, "converts into"):
        return _convert(settings, teacher, processor, kind, other, limit, progress, say)


def _convert(
    settings: ConversionSettings,
    teacher: Any,
    processor: Any,
    kind: Kind,
    other: Beside | None,
    limit: TimeLimit,
    progress: Progress,
    say: Say,
) -> dict[str, Any]:
    work = settings.out / "work"
    remove_stale(settings.out, work.name)
    earlier.upgrade(work)
    inputs = {"inputs": _inputs(settings), "device": teacher.device.type}
    # A conversion that an earlier version began says nothing of them.
    continued = claim(work, asdict(settings) | inputs, free=FREE, upgrade=lambda kept: inputs | kept)
    try:
        context, found = _prepared(settings, teacher, processor, kind, work, TimeLeft(progress, say), limit)
    except ValueError as error:
        if not continued and not isinstance(error, TooFewSeconds):
            remove_folder(work)  # so that the command may be given again with what was wrong put right
        raise
    start = time.perf_counter()
    dense = context.figures(teacher)
    scores_s = time.perf_counter() - start
    if found is not None:
        write_json(work / PLAN, asdict(_plan(context, found, limit, say)))
    plan = _read_plan(work / PLAN)
    points = _points(context, plan, work)
    taken = joint_steps_taken(points)
    if not taken or not (work / TIMETABLE).exists():
        table = _timetable(context, points, plan, scores_s, limit)
        say(str(table))
        write_json(work / TIMETABLE, asdict(table))
    table = _read_timetable(work / TIMETABLE)
    limit.check(table.joint_s(taken), "the joint steps that are left")
    for point in points:
        point.teach(context, table.steps, dense["quality"])
    record = record_of(context, plan, points, dense)
    record["beside"] = None if other is None else other.figures(settings, work)
    record |= {"timetable": asdict(table), "continued": continued, "seconds": limit.spent_s}
    _write(settings, points[0].models[record["written"]], processor, record)
    del context, points  # their files are mapped
    remove_folder(work)  # in one step: a later conversion would take a part for its own
    return record


def _inputs(settings: ConversionSettings) -> dict[str, list[int]]:
    """Size and time of change of what a conversion reads, of pictures their number, sum and latest: with other files
    under the same names it does not go on."""
    model = Path(settings.model)
    own = [model] if model.is_file() else [p for kind in ("*.safetensors", "*.bin", "*.json") for p in model.glob(kind)]
    files = [path for path in (*own, settings.text, *settings.tables) if path is not None and path.is_file()]
    found = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(files)}
    if settings.images is not None:
        stats = [path.stat() for path in picture_paths(settings.images)]
        found[str(settings.images)] = [len(stats), sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats)]
    return found


def _check_out(settings: ConversionSettings) -> None:
    """Raises ValueError where the converted model would take the dense one's place."""
    model = Path(settings.model)
    if model.exists() and settings.out.resolve() in {
        model.resolve(),
        *([model.resolve().parent] if model.is_file() else []),
    }:
        raise ValueError(f"out {settings.out} is the folder of the model itself: choose another")


def _check_kind(settings: ConversionSettings, kind: Kind) -> None:
    """Raises ValueError for options that are of another kind of model."""
    if kind != "image":
        if settings.text is None:
            raise ValueError(f"images {settings.images}: {settings.model} reads text, expected text")
        return
    if settings.images is None:
        raise ValueError(f"text {settings.text}: {settings.model} is an image model, expected images")
    if settings.tables:
        raise ValueError(f"table {settings.tables[0]}: an image model is measured on a part of the images, without one")
    if settings.time_on in ENGINES:
        raise ValueError(f"time_on {settings.time_on!r}: that engine has no image models, expected cpu or cuda")


def _prepared(
    settings: ConversionSettings,
    teacher: Any,
    processor: Any,
    kind: Kind,
    work: Path,
    progress: Progress,
    limit: TimeLimit,
) -> tuple[DistillContext, Survey | None]:
    """Examples, metrics, and the rows of every layer; and the survey, None where an earlier run made its plan."""
    sizes = {"max_length": settings.max_length, "max_tokens": settings.max_tokens}
    measures = measures_of(kind, processor, settings.tables, work, **sizes)
    if settings.max_loss is not None and not measures and kind not in KEPT_ASIDE:
        raise ValueError(f"max_loss {settings.max_loss:.2%} needs an evaluation table")
    examples, held_out = split_examples(settings, processor, kind, work, progress)
    if kind in KEPT_ASIDE and not measures:
        image = kind == "image"
        measures = {KEPT_ASIDE[kind]: likeness(teacher, held_out) if image else partial(perplexity, examples=held_out)}
    longest = int(examples.lengths.max())
    resources.check(settings, teacher, kind, largest(settings, dense_layers(teacher)), work, longest)
    torch.manual_seed(settings.seed)
    found = None
    if not (work / PLAN).exists():
        found = survey(teacher, settings, progress, picture=examples.picture)
        if limit.seconds is not None:
            limit.check(least_s(settings, teacher, examples), "the dense model's part alone")
    captured = capture(teacher, examples, work, rows=settings.rows, batch=settings.batch, progress=progress)
    quality: Callable[[Any], float | None] = next(iter(measures.values()), lambda _: None)
    further = dict(list(measures.items())[1:])
    return DistillContext(settings, kind, teacher, captured, examples, held_out, quality, further, progress), found


def split_examples(
    settings: ConversionSettings, processor: Any, kind: Kind, work: Path, progress: Progress = silent
) -> tuple[Examples, Examples]:
    """Examples to learn from, and those held out. Raises CheckpointError for too little text or too few pictures."""
    if kind == "image":
        return _split_pictures(settings, processor, work, progress)
    assert settings.text is not None
    every = tokenise(
        processor,
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


def _split_pictures(
    settings: ConversionSettings, processor: Any, work: Path, progress: Progress
) -> tuple[Examples, Examples]:
    assert settings.images is not None
    paths, patches = picture_paths(settings.images), settings.max_length
    learned = max(settings.batch, -(-settings.rows // patches))
    needed = next(n for n in count(learned) if n - _pictures_aside(n) >= learned)
    if len(paths) < needed:
        raise CheckpointError(
            f"images {settings.images} holds {len(paths)} pictures, at least {needed} are needed: {settings.batch} "
            f"(batch) and {settings.rows} patches (rows), {patches} a picture, and {_pictures_aside(needed)} kept aside"
        )
    drawn = settings.steps * settings.batch  # no more of them than can be learned from are stored
    most = max(needed, drawn + _pictures_aside(2 * drawn))
    chosen = sorted(np.random.default_rng(0).permutation(len(paths))[:most])
    every = store_pictures(processor, [paths[k] for k in chosen], work, patches=patches, progress=progress)
    aside = _pictures_aside(len(every))
    return every.slice(0, len(every) - aside), every.slice(len(every) - aside, len(every))


def _pictures_aside(pictures: int) -> int:
    return max(1, int(HELD_OUT_PICTURES * pictures))


def _plan(context: DistillContext, found: Survey, limit: TimeLimit, say: Say) -> Plan:
    """Measure the options of every block, within a share of what the limit leaves."""
    settings = context.settings
    shares = sorted({*shares_of(settings), *settings.curve}, reverse=True)
    trials = Trials(context.teacher, context.kind, context.captured, context.held_out, settings)
    count, last_s = trial_count(trials, found, shares), limit.spent_s + TRIALS * limit.left_s
    estimate = min(count * trials.estimated_s(found), last_s - limit.spent_s)
    say(f"trying {count} candidates takes about {duration(estimate)}; {duration(limit.spent_s)} are spent")

    def out_of_time() -> bool:
        # A layer of a student has at least as many rows and steps as a candidate.
        layers = settings.students * len(trials.dense)
        limit.check(layers * trials.trained_s, f"the layers of {settings.students} models alone")
        return limit.spent_s > last_s

    options, tried = probe(trials, found, shares, context.progress, out_of_time)
    return Plan(found.profile, tried, options)


def _read_plan(path: Path) -> Plan:
    content = read_json(path)
    with reading(path):
        return Plan.of(content)


def _read_timetable(path: Path) -> Timetable:
    content = read_json(path)
    with reading(path):
        return restored(Timetable, content)


def _points(context: DistillContext, plan: Plan, work: Path) -> list[Point]:
    """The main budget and those of the curve. Raises ValueError for one that nothing keeps."""
    settings = context.settings
    points = [Point(settings, work / "main", [], settings.baselines)]
    for share in settings.curve:
        budget = replace(settings, active=share, speedup=None, max_loss=None)
        baselines = tuple(name for name in settings.baselines if name != "none")
        points.append(Point(budget, work / f"curve-{share:g}", [], baselines))
    for point in points:
        chosen = choose(point.budget, plan.options, plan.profile)
        taken = [block[k] for block, k in zip(plan.options, chosen, strict=True)]
        point.chosen = [option.description for option in taken]
        point.pruned = tuple(k for k, option in enumerate(taken) if option.kind == "pruned")
        if not any(point.chosen):
            raise ValueError(f"every layer stays dense: nothing of active {point.budget.share:.1%} pays here")
    return points


def joint_steps_taken(points: Sequence[Point]) -> int:
    """By all students of an interrupted run."""
    return sum(steps_taken(path.parent) for point in points for path in point.folder.glob(f"*/{DISTILLED}"))


def _timetable(
    context: DistillContext, points: Sequence[Point], plan: Plan, scores_s: float, limit: TimeLimit
) -> Timetable:
    """Joint steps of every student, counted when the first one's layers are built: again, by its own limit, in a run
    that continues another, but not after joint steps, since all students take equally many."""
    dense = dense_layers(context.teacher)
    students: list[Descriptions] = []
    for point in points:
        students += [point.chosen, *(baseline(name, dense, point.chosen) for name in point.baselines)]
    start = time.perf_counter()
    folder = points[0].folder / MAIN

    def progress(stage: str, done: float, total: float | None = None, note: str = "") -> None:
        context.progress(stage, done, total, note)
        layer_s = (time.perf_counter() - start) / done
        limit.check((len(students) * (total or done) - done) * layer_s, f"the layers of {len(students)} models alone")

    replace(context, progress=progress).build("chosen", points[0].chosen, folder, pruned=points[0].pruned)
    return timetable(context, students, build_s=built_s(folder), scores_s=scores_s, profile=plan.profile, limit=limit)


def _write(settings: ConversionSettings, student: Any, processor: Any, record: dict[str, Any]) -> None:
    try:
        student.eval().save_pretrained(settings.out)
        processor.save_pretrained(settings.out)
    except (OSError, SafetensorError) as error:  # the second of a full disk, too
        raise FileError(f"cannot write {settings.out}: {error}; run the same command again to resume") from error
    if not Path(settings.model).is_file():  # a GGUF file has nothing beside it
        carry(settings.model, settings.out)
    conversion_report.write(settings.out, record)
