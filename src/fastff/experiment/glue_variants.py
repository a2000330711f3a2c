"""Fine-tune pretrained variants on GLUE, many processes at once, and say how much of the dense scores each keeps.

A task counts where every variant has all its seeds. Retention is a variant's mean score over that of the dense variant
of its group; the recovered gap is made of the same means, as that of losses in `fastff.train.compare`. Splits that are
not whole are listed below the table: such scores compare with each other, not with published ones.
"""

from __future__ import annotations

import os
import queue
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from fastff.errors import FileError, TrainingError
from fastff.experiment.study_settings import GlueVariantsSettings
from fastff.io import read_json, write_json, write_text
from fastff.named_values import named_value
from fastff.report.axis import Axis
from fastff.report.chart import Panel, Series
from fastff.report.chart import chart as draw
from fastff.report.markdown import markdown_table
from fastff.train.compare import ARITHMETIC, set_gaps
from fastff.train.glue import claim, missing, read_record, record_path, score
from fastff.train.glue_settings import RENAMED_OPTIONS, GlueSettings
from fastff.train.interrupt import end_with_parent
from fastff.train.placement import environments
from fastff.train.pretrain import MODEL, RESULT
from fastff.train.tasks import TASKS

ORDER = ("STS-B", "CoLA", "MRPC", "SST-2", "RTE", "WNLI", "QNLI", "MNLI", "QQP")  # the time may end in the last
SCORES = "glue.json"
_WHOLE = ("epochs", "steps", "batch", "limit", "max_train_rows")
_REAL = ("lr", "layer_lr_scale", "dropout")
_KINDS: dict[str, Any] = {**dict.fromkeys(_WHOLE, int), **dict.fromkeys(_REAL, float), "precision": str, "cpu": bool}


def glue_settings(asked: GlueVariantsSettings, variant: str) -> GlueSettings:
    """What `fastff glue` would be asked for a variant. Raises TrainingError for an option that it does not have."""
    given: dict[str, Any] = {}
    for option in [*asked.option, *variant.split("@")[1:]]:
        try:
            name, value = named_value(option, [*_KINDS, *RENAMED_OPTIONS], flags=["cpu"])
        except ValueError as error:
            raise TrainingError(f"option {error}") from error
        name = RENAMED_OPTIONS.get(name, name)
        try:
            given[name] = True if name == "cpu" else _KINDS[name](value)
        except ValueError as error:
            raise TrainingError(f"option {name} {value!r} is not a number") from error
    every = asked.tasks or tuple(TASKS)
    unknown = [task for task in every if task not in ORDER]
    if unknown:
        raise TrainingError(f"tasks {', '.join(unknown)}: expected some of {', '.join(ORDER)}")
    tasks = tuple(sorted(every, key=ORDER.index))
    out = (asked.work or asked.runs / "glue") / variant
    model = str(asked.pretrained(variant) / MODEL)
    return GlueSettings(model=model, out=out, data=asked.data, tasks=tasks, seeds=asked.seeds, **given)


def run(asked: GlueVariantsSettings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Fine-tune what is missing and write the comparison. Returns what glue.json holds."""
    variants = [variant for variant in asked.variants if (asked.pretrained(variant) / MODEL).is_dir()]
    say(f"variants: {', '.join(variants) or 'none is finished'}")
    if not variants:
        raise TrainingError(f"{asked.runs} holds no finished model of {', '.join(asked.variants)}")
    every = [glue_settings(asked, variant) for variant in variants]
    say(_fine_tune(asked, every))
    found = _summary(asked, every)
    write_json(asked.out / SCORES, found)
    say(_write(found, asked.out))
    return found


def redraw(out: Path, say: Callable[[str], None] = print) -> None:
    """Make the chart of `out`/glue.json again, without running anything, and say its table."""
    found = read_json(out / SCORES, needs={"tasks": list, "notes": dict})
    if "variants" not in found and "arms" not in found:
        raise FileError(f"{out / SCORES} lists no variants")
    say(_write(found, out))


def _write(found: dict[str, Any], out: Path) -> str:
    if found["tasks"]:
        write_text(out / "glue.svg", chart(found))
    return table(found)


def work_on(waiting: Any, place: dict[str, str], threads: int) -> None:
    """Take one fine-tuning after the other, in a process of its own; an error is printed and ends none but its own."""
    end_with_parent()
    os.environ.update(place)
    torch.set_num_threads(threads)
    while True:
        try:
            settings, task, seed = waiting.get(timeout=1)
        except queue.Empty:
            return
        try:
            score(settings, task, seed)
        except Exception:
            print(f"failed: {settings.out.name} {task} {seed}:\n{traceback.format_exc()[-600:]}", flush=True)


def _fine_tune(asked: GlueVariantsSettings, every: list[GlueSettings]) -> str:
    """Run what is missing, until it is done or the time is over."""
    began, limit = time.monotonic(), float("inf") if asked.seconds is None else asked.seconds
    for settings in every:
        claim(settings)
    jobs = [(settings, *job) for settings in every for job in missing(settings)]
    jobs.sort(key=lambda job: ORDER.index(job[1]))  # all variants of a task, then the next
    context = mp.get_context("spawn")
    waiting: Any = context.Queue()
    waiting.cancel_join_thread()  # what nobody took when the time is over is not waited for
    for job in jobs:
        waiting.put(job)
    places = environments()
    threads = max(1, (os.cpu_count() or 1) // asked.at_once)
    workers = [
        context.Process(target=work_on, args=(waiting, places[n % len(places)], threads), daemon=True)
        for n in range(min(asked.at_once, len(jobs)))
    ]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers) and time.monotonic() - began < limit:
        time.sleep(0.2)
    for worker in workers:
        worker.kill()
    left = sum(len(missing(settings)) for settings in every)
    seconds = time.monotonic() - began
    return f"{len(jobs) - left} fine-tunings in {seconds:.0f} s, {left} left; run the same command again to resume"


def numbers(scores: Sequence[float | None]) -> list[float]:
    """The scores; 0 for a correlation of constant predictions, which does not exist: such a model says nothing."""
    return [0.0 if score is None else score for score in scores]


Runs = dict[str, list[dict[str, Any]]]  # by task, one a seed


def _summary(asked: GlueVariantsSettings, every: list[GlueSettings]) -> dict[str, Any]:
    """Scores of every variant, their means over the tasks that all variants have, retention and recovered gap; and the
    training losses of the last tenth of the updates."""
    found: dict[str, Runs] = {
        settings.out.name: {
            task: [
                read_record(settings, task, seed)
                for seed in range(settings.seeds)
                if record_path(settings, task, seed).is_file()
            ]
            for task in settings.tasks
        }
        for settings in every
    }
    whole = [task for task in every[0].tasks if all(len(runs[task]) == asked.seeds for runs in found.values())]
    notes = {task: _note(runs[task][0]) for runs in found.values() for task in whole}
    scored = {
        "tasks": whole,
        "seeds": asked.seeds,
        "options": list(asked.option),
        "notes": {task: note for task, note in notes.items() if note},
        "variants": [_entry(asked, name, runs, whole) for name, runs in found.items()],
    }
    return only(scored, whole)


def _note(record: dict[str, Any]) -> str:
    parts = [f"train {record['train_note']}" if record["train_note"] else ""]
    parts += [f"{split} {dev['note']}" if dev["note"] else "" for split, dev in record["dev"].items()]
    return "; ".join(part for part in parts if part)


def _entry(asked: GlueVariantsSettings, name: str, runs: Runs, tasks: list[str]) -> dict[str, Any]:
    record = read_json(asked.pretrained(name) / RESULT, needs={"cost": dict, "valid_loss": float, "tokens": int})
    scores = {task: [run["score"] for run in runs[task]] for task in tasks}
    return {
        **record["cost"],
        "name": name,
        "group": "from-dense" if asked.pretrained(name).name.endswith("-on") else "scratch",
        "pretraining_loss": record["valid_loss"],
        "pretraining_tokens": record["tokens"],
        "scores": scores,
        "medians": {task: statistics.median(numbers(values)) for task, values in scores.items()},
        "train_losses": {task: [run["curve"][-1][1] for run in runs[task]] for task in tasks},
    }


def variants_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of glue.json; earlier versions called them arms."""
    entries: list[dict[str, Any]] = found["variants"] if "variants" in found else found["arms"]
    return entries


def only(found: dict[str, Any], tasks: list[str]) -> dict[str, Any]:
    """The same scores with means, retention and recovered gap of these tasks alone, None where they do not exist."""
    entries = [
        {
            **entry,
            "mean": statistics.fmean(entry["medians"][task] for task in tasks) if tasks else None,
            "retention": None,
            "recovered_gap": None,
        }
        for entry in variants_of(found)
    ]
    scored = [{**entry, "losses": {"mean": -entry["mean"]}} for entry in entries if entry["mean"] is not None]
    set_gaps(scored)
    gaps = {entry["name"]: entry["recovered_gap"] for entry in scored}
    for entry in entries:
        dense = [e["mean"] for e in scored if e["group"] == entry["group"] and e["name"].startswith("dense")]
        if dense and entry["mean"] is not None:
            entry |= {"retention": 100 * entry["mean"] / dense[0], "recovered_gap": gaps[entry["name"]]}
    notes = {task: note for task, note in found["notes"].items() if task in tasks}
    kept = {name: value for name, value in found.items() if name != "arms"}
    return {**kept, "tasks": tasks, "variants": entries, "notes": notes}


def table(found: dict[str, Any]) -> str:
    """A Markdown table, one variant a row; scores are medians over the seeds, in brackets the least and greatest."""
    head = ["variant", "layer", "active / stored neurons", "FLOP a token and layer", *found["tasks"]]
    rows = []
    for e in variants_of(found):
        cells = [e["name"], e["layer"], f"{e['active_neurons']} / {e['neurons']}", f"{e['flops']:,}"]
        runs = [numbers(e["scores"][task]) for task in found["tasks"]]
        for task, scores in zip(found["tasks"], runs, strict=True):
            cells.append(f"{e['medians'][task]:.1f} ({min(scores):.1f}-{max(scores):.1f})")
        means = [statistics.fmean(scores) for scores in zip(*runs, strict=True)]
        cells.append("" if e["mean"] is None else f"{e['mean']:.2f} ({min(means):.2f}-{max(means):.2f})")
        cells.append("" if e["retention"] is None else f"{e['retention']:.1f}")
        cells.append("" if e["recovered_gap"] is None else f"{e['recovered_gap']:.2f}")
        rows.append(cells)
    lines = [markdown_table([*head, "mean", "% of dense", "recovered gap"], rows), ""]
    lines += [f"- {task}: {note}" for task, note in found["notes"].items()]
    return "\n".join(lines) + "\n"


def labels(names: list[str]) -> list[str]:
    """The names of variants without the words at their end, before any options, that all of them have."""
    split = [name.partition("@") for name in names]
    words = [variant.split("-") for variant, _, _ in split]
    while len(words) > 1 and min(map(len, words)) > 1 and len({variant[-1] for variant in words}) == 1:
        words = [variant[:-1] for variant in words]
    return ["-".join(variant) + at + options for variant, (_, at, options) in zip(words, split, strict=True)]


def chart(found: dict[str, Any]) -> str:
    """Mean score against the arithmetic of a layer, as SVG text."""
    entries = variants_of(found)
    names = [e["name"] for e in entries]
    short = dict(zip(names, labels(names), strict=True))
    series = []
    for color, (group, mark) in enumerate((("scratch", "circle"), ("from-dense", "square"))):
        here = [e for e in entries if e["flops"] and e["group"] == group]
        points = [(e["flops"], e["mean"]) for e in here]
        if points:
            series.append(Series(group, points, color, mark, labels=[short[e["name"]] for e in here]))
    levels = [(e["mean"], "no feedforward") for e in entries if not e["flops"]]
    panel = Panel(series, ARITHMETIC, Axis("mean GLUE score (dev)"), levels=levels)
    return draw([panel], title="Mean GLUE score against the arithmetic of a layer")
