"""The whole conversion of a model directory, in steps that an interrupted run does not repeat."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastff.convert import report, resources
from fastff.convert.arms import Course, active_share, build, control, keep_loss, teach
from fastff.convert.budget import timetable
from fastff.convert.capture import Progress, capture
from fastff.convert.distil import Kind
from fastff.convert.evaluate import METRIC, measures_of, perplexity, table_name
from fastff.convert.load import load_dense
from fastff.convert.measure import WHOLE, feedforward_us, model_us, oracle_missed, place_name, place_of, routing
from fastff.convert.plan import Clock, Option, choose, largest, shares_of
from fastff.convert.probe import Bench, Survey, probe, survey
from fastff.convert.settings import BATCH, Settings
from fastff.convert.student import dense_layers
from fastff.errors import CheckpointError
from fastff.text.examples import Examples, tokenise

TIMETABLE = "timetable.json"
HELD_OUT = 0.02  # share of the text kept for perplexity and the held-out loss
ITS_TEXT = "text kept aside"
FREE = ("seconds",)  # settings that a continued run may change


def convert(
    settings: Settings, *, progress: Progress = lambda *_: None, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Convert a model and write OUT: weights, configuration, tokenizer, README.md and report/. Returns the report.

    say gets the estimate of the time left, once. An interrupted run goes on where it stopped when called again with
    the same settings; OUT/work holds its state and is removed at the end. Raises CheckpointError or ValueError for
    what cannot be converted, before the long work.
    """
    began = time.perf_counter()
    work = settings.out / "work"
    if settings.time_on == "cuda" and not torch.cuda.is_available():
        raise ValueError("time_on 'cuda': there is no GPU here")
    teacher, tokenizer, kind = load_dense(settings.model)
    positions = getattr(teacher.config, "max_position_embeddings", settings.max_length)
    longest = min(settings.max_length, positions, tokenizer.model_max_length)
    settings = replace(settings, batch=settings.batch or BATCH[kind], max_length=longest)
    continued = _claim(work, settings)
    try:
        course, found = _prepared(settings, teacher, tokenizer, kind, work, progress)
    except ValueError:
        if not continued:  # so that the command may be given again with what was wrong put right
            shutil.rmtree(work)
        raise
    start = time.perf_counter()
    dense = dict(course.dense)
    scores_s = time.perf_counter() - start
    plan = _planned(work, course, found)
    points = _layouts(course, plan, work)
    steps = _steps(course, points, plan["clock"], work, scores_s, began, say)
    for point in points:
        _teach(course, point, steps)
    record = _record(course, plan, points, dense) | {
        "timetable": json.loads((work / TIMETABLE).read_text()),
        "continued": continued,
        "seconds": time.perf_counter() - began,
    }
    _write(settings, points[0].models["tree"], tokenizer, record)
    del course, points  # their files are mapped
    shutil.rmtree(work)
    return record


def _claim(work: Path, settings: Settings) -> bool:
    """Whether the folder holds the state of an equal run. Raises CheckpointError if it is one with other settings."""
    fixed = {name: value for name, value in asdict(settings).items() if name not in FREE}
    mine = json.dumps(fixed, default=str, sort_keys=True)
    stamp = work / "settings.json"
    if stamp.exists() and stamp.read_text() != mine:
        raise CheckpointError(f"{work} belongs to an interrupted run with other settings: repeat those or remove it")
    continued = stamp.exists()
    work.mkdir(parents=True, exist_ok=True)
    stamp.write_text(mine)
    return continued


def _prepared(
    settings: Settings, teacher: Any, tokenizer: Any, kind: Kind, work: Path, progress: Progress
) -> tuple[Course, Survey | None]:
    """Text, tables, and the rows of every layer; and the survey, None where an interrupted run has made its plan."""
    sizes = {"max_length": settings.max_length, "max_tokens": settings.max_tokens}
    measures = measures_of(kind, tokenizer, settings.tables, work, **sizes)
    if settings.max_loss is not None and not measures and kind != "causal":
        raise ValueError(f"max_loss {settings.max_loss:.2%} needs an evaluation table")
    examples, held_out = split_examples(settings, tokenizer, kind, work)
    if kind == "causal" and not measures:
        measures = {ITS_TEXT: lambda model: perplexity(model, held_out)}
    torch.manual_seed(settings.seed)
    found = None if (work / "plan.json").exists() else survey(teacher, settings, progress)
    longest = int((examples.offsets[1:] - examples.offsets[:-1]).max())
    resources.check(settings, teacher, kind, largest(settings, dense_layers(teacher)), work, longest)
    captured = capture(teacher, examples, work, rows=settings.rows, batch=settings.batch, progress=progress)
    quality: Callable[[Any], float | None] = next(iter(measures.values()), lambda _: None)
    further = dict(list(measures.items())[1:])
    return Course(settings, kind, teacher, captured, examples, held_out, quality, further, progress), found


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


@dataclass
class Point:
    """One budget: what each block becomes under it, and its students once they are taught. "none" belongs to the main
    budget alone: it has no other."""

    budget: Settings
    folder: Path
    trees: list[dict[str, Any] | None]
    controls: tuple[str, ...]
    back: list[int] = field(default_factory=list)
    models: dict[str, Any] = field(default_factory=dict)
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)


def _layouts(course: Course, plan: dict[str, Any], work: Path) -> list[Point]:
    """The main budget and those of the curve. Raises ValueError for one that nothing keeps."""
    settings = course.settings
    points = [Point(settings, work / "main", [], settings.controls)]
    for share in settings.curve:
        budget = replace(settings, active=share, speedup=None, max_loss=None)
        controls = tuple(name for name in settings.controls if name != "none")
        points.append(Point(budget, work / f"curve-{share:g}", [], controls))
    for point in points:
        chosen = choose(point.budget, plan["options"], plan["clock"])
        point.trees = [block[k].description for block, k in zip(plan["options"], chosen, strict=True)]
        if not any(point.trees):
            raise ValueError(f"every layer stays dense: no tree of active {point.budget.share:.1%} pays here")
    return points


def _steps(
    course: Course,
    points: Sequence[Point],
    clock: Clock,
    work: Path,
    scores_s: float,
    began: float,
    say: Callable[[str], None],
) -> int:
    """Joint steps of every student, counted once for a run and its continuations, when the first tree is built."""
    path = work / TIMETABLE
    if not path.exists():
        dense = dense_layers(course.teacher)
        start = time.perf_counter()
        build(course, "tree", points[0].trees, points[0].folder / "tree")
        build_s = time.perf_counter() - start
        students = [d for p in points for d in (p.trees, *(control(name, dense, p.trees) for name in p.controls))]
        table = timetable(course, students, build_s=build_s, scores_s=scores_s, clock=clock, began=began)
        say(str(table))
        path.write_text(json.dumps(asdict(table)))
    return int(json.loads(path.read_text())["steps"])


def _teach(course: Course, point: Point, steps: int) -> None:
    """Teach the students of one budget: the trees, then the controls of what is left of them."""
    dense, folder = dense_layers(course.teacher), point.folder
    student, facts = teach(course, "tree", point.trees, folder / "tree", steps)
    if point.budget.max_loss is not None:
        student, facts, point.back = keep_loss(course, student, facts)
        point.trees = list(student.config.fastff_feedforwards)
    point.models["tree"], point.arms["tree"] = student, {**facts, "active": active_share(dense, point.trees)}
    for name in point.controls:
        descriptions = control(name, dense, point.trees)
        point.models[name], point.arms[name] = teach(course, name, descriptions, folder / name, steps)
        point.arms[name]["active"] = active_share(dense, descriptions)


def _record(course: Course, plan: dict[str, Any], points: Sequence[Point], dense: dict[str, Any]) -> dict[str, Any]:
    """Everything the report says, the latencies measured here with all models taking turns."""
    settings, teacher, tree = course.settings, course.teacher, points[0].models["tree"]
    record = {
        "settings": json.loads(json.dumps(asdict(settings), default=str)),
        "kind": course.kind,
        "metric": METRIC.get(course.kind),
        "tables": [table_name(path) for path in settings.tables] or [ITS_TEXT] * (course.kind == "causal"),
        "shapes": settings.shapes,
        "dense": dense,
        "arms": points[0].arms,
        "curve": [{"asked": point.budget.active, "arms": point.arms} for point in points[1:]],
        "layers": _layers(course, plan, points[0]),
        "tried": plan["tried"],
        "ceilings": plan["clock"].ceilings(),
        "routing": routing(tree, course.held_out),
        "device": place_name(teacher.device),
        "timed_on": place_name(place_of(teacher, settings.time_on)),
        "gpu_bytes": gpu_bytes(teacher.device),
    }
    _time(course, points, dense)
    return record


def _time(course: Course, points: Sequence[Point], dense: dict[str, Any]) -> None:
    """Add the times of the whole models and of their feedforwards, at every shape, to the figures of each."""
    settings = course.settings
    place = place_of(course.teacher, settings.time_on)
    models, figures = {"dense": course.teacher.to(place)}, {"dense": dense}
    for k, point in enumerate(points):
        models |= {f"{k} {name}": model.to(place) for name, model in point.models.items()}
        figures |= {f"{k} {name}": arm for name, arm in point.arms.items()}
    for shape in settings.shapes:
        whole = model_us(models, shape, WHOLE * settings.timing_s)
        layers = feedforward_us(models, course.captured, shape, settings.timing_s)
        for name, at in figures.items():
            at.setdefault("latency_ms", []).append(whole[name] / 1e3)
            at.setdefault("feedforward_ms", []).append(layers[name] / 1e3)


def gpu_bytes(device: torch.device) -> dict[str, int] | None:
    """The most GPU memory in use at once, and kept for later use too; None without a GPU."""
    if device.type != "cuda":
        return None
    return {"used": torch.cuda.max_memory_allocated(device), "kept": torch.cuda.max_memory_reserved(device)}


def _layers(course: Course, plan: dict[str, Any], point: Point) -> list[dict[str, Any]]:
    """Per block: what stands there and why, and every option that was measured."""
    out = []
    for k, (options, description) in enumerate(zip(plan["options"], point.trees, strict=True)):
        if description is not None:
            reason = "chosen"
        elif k in point.back:
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
                "missed": point.arms["tree"]["missed"][k],
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
