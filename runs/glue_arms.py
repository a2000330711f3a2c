"""Fine-tune pretrained arms on GLUE, many processes at once, and say how much of the dense model's scores each keeps.

python runs/glue_arms.py --runs DIR --arms NAME,NAME --data TABLES --out experiments/NAME [options]

DIR holds what `runs/pretrain_plan.py` left. NAME@OPTION=VALUE@... is an arm with options of its own. `--at-once`
processes take one arm, task and seed after the other; after `--seconds` they are stopped, and the same command goes on
with what is missing. `--anew` runs nothing and makes table and chart of OUT/glue.json. A task counts where every arm
has all its seeds. Retention is an arm's mean score over that of the dense arm of its group; the recovered gap is made
of the same means, as that of losses in `fastff.train.compare`. Splits that are not whole are listed below the table:
such scores compare with each other, not with published ones.
"""

from __future__ import annotations

import argparse
import os
import queue
import statistics
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from fastff.errors import TrainingError
from fastff.io import read_json, write_json
from fastff.report.axis import Axis
from fastff.report.chart import Panel, Series
from fastff.report.chart import chart as draw
from fastff.train.checkpoint import claim_run
from fastff.train.compare import ARITHMETIC, set_gaps
from fastff.train.glue import GlueSettings, missing, record_path, score
from fastff.train.placement import environments
from fastff.train.pretrain import MODEL, RESULT
from fastff.train.tasks import TASKS

ORDER = ("STS-B", "CoLA", "MRPC", "SST-2", "RTE", "WNLI", "QNLI", "MNLI", "QQP")  # the time may end in the last


def pretrained(asked: argparse.Namespace, arm: str) -> Path:
    """What was left of an arm's pretraining."""
    runs: Path = asked.runs
    return runs / arm.partition("@")[0]


def settings_of(asked: argparse.Namespace, arm: str, work: Path) -> GlueSettings:
    """What `fastff glue` would be asked for this arm. Raises TrainingError for an option that it does not have."""
    whole, real = ("epochs", "steps", "batch", "limit", "max_train_rows"), ("rate", "layer_rate", "dropout")
    kinds: dict[str, Any] = {**dict.fromkeys(whole, int), **dict.fromkeys(real, float)}
    given: dict[str, Any] = {}
    for option in [*asked.option, *arm.split("@")[1:]]:
        name, _, value = option.partition("=")
        name = name.replace("-", "_")
        if name not in (*kinds, "precision", "cpu"):
            raise TrainingError(f"option {option!r} is not of {', '.join((*kinds, 'precision', 'cpu'))}")
        given[name] = True if name == "cpu" else kinds.get(name, str)(value)
    tasks = tuple(sorted(asked.tasks.split(","), key=ORDER.index))
    model = str(pretrained(asked, arm) / MODEL)
    return GlueSettings(model=model, out=work / arm, data=asked.data, tasks=tasks, seeds=asked.seeds, **given)


def work_on(waiting: Any, place: dict[str, str], threads: int) -> None:
    """Take one fine-tuning after the other, in a process of its own; an error is printed and ends none but its own."""
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


def fine_tune(asked: argparse.Namespace, every: list[GlueSettings]) -> None:
    """Run what is missing, until it is done or the time is over."""
    began = time.monotonic()
    for settings in every:
        claim_run(settings.out, settings.identity)
    jobs = [(settings, *job) for settings in every for job in missing(settings)]
    jobs.sort(key=lambda job: ORDER.index(job[1]))  # all arms of a task, then the next
    if not jobs:
        return
    context = mp.get_context("spawn")
    waiting: Any = context.Queue()
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
    while any(worker.is_alive() for worker in workers) and time.monotonic() - began < asked.seconds:
        time.sleep(0.2)
    for worker in workers:
        worker.kill()
    left = sum(len(missing(settings)) for settings in every)
    print(f"{len(jobs) - left} fine-tunings in {time.monotonic() - began:.0f} s, {left} left; the same command goes on")


def records_of(settings: GlueSettings, task: str) -> list[dict[str, Any]]:
    """What is finished of one arm and task."""
    paths = [record_path(settings, task, seed) for seed in range(settings.seeds)]
    return [read_json(path) for path in paths if path.is_file()]


def numbers(scores: list[float | None]) -> list[float]:
    """The scores; 0 for a correlation of constant predictions, which does not exist: such a model says nothing."""
    return [0.0 if score is None else score for score in scores]


def summary(asked: argparse.Namespace, every: list[GlueSettings]) -> dict[str, Any]:
    """Scores of every arm, their means over the tasks that all arms have, retention and recovered gap; and the training
    losses of the last tenth of the updates."""
    arms = [settings.out.name for settings in every]
    found: dict[str, dict[str, list[dict[str, Any]]]] = {
        settings.out.name: {task: records_of(settings, task) for task in settings.tasks} for settings in every
    }
    whole = [t for t in asked.tasks.split(",") if all(len(found[arm][t]) == asked.seeds for arm in arms)]
    notes = {}
    entries: list[dict[str, Any]] = []
    for arm in arms:
        scores = {task: [run["score"] for run in found[arm][task]] for task in whole}
        medians = {task: statistics.median(numbers(runs)) for task, runs in scores.items()}
        for task in whole:
            run = found[arm][task][0]
            parts = [f"train {run['train_note']}" if run["train_note"] else ""]
            parts += [f"{split} {dev['note']}" if dev["note"] else "" for split, dev in run["dev"].items()]
            notes[task] = "; ".join(part for part in parts if part)
        record = read_json(pretrained(asked, arm) / RESULT)
        group = "from-dense" if pretrained(asked, arm).name.endswith("-on") else "scratch"
        entries.append(
            {
                **record["cost"],
                "name": arm,
                "group": group,
                "pretraining_loss": record["valid_loss"],
                "pretraining_tokens": record["tokens"],
                "scores": scores,
                "medians": medians,
                "train_losses": {task: [run["curve"][-1][1] for run in found[arm][task]] for task in whole},
            }
        )
    scored = {
        "tasks": whole,
        "seeds": asked.seeds,
        "options": asked.option,
        "notes": {task: note for task, note in notes.items() if note},
        "arms": entries,
    }
    return only(scored, whole)


def only(found: dict[str, Any], tasks: list[str]) -> dict[str, Any]:
    """The same scores with means, retention and recovered gap of these tasks alone, None where they do not exist."""
    entries = [
        {
            **entry,
            "mean": statistics.fmean(entry["medians"][task] for task in tasks) if tasks else None,
            "retention": None,
            "recovered_gap": None,
        }
        for entry in found["arms"]
    ]
    scored = [{**entry, "losses": {"mean": -entry["mean"]}} for entry in entries if entry["mean"] is not None]
    set_gaps(scored)
    gaps = {entry["name"]: entry["recovered_gap"] for entry in scored}
    for entry in entries:
        dense = [e["mean"] for e in scored if e["group"] == entry["group"] and e["name"].startswith("dense")]
        if dense and entry["mean"] is not None:
            entry |= {"retention": 100 * entry["mean"] / dense[0], "recovered_gap": gaps[entry["name"]]}
    return {**found, "tasks": tasks, "arms": entries, "notes": {t: n for t, n in found["notes"].items() if t in tasks}}


def table(found: dict[str, Any]) -> str:
    """A Markdown table, one arm a row; scores are medians over the seeds, in brackets the least and the greatest."""
    head = "| arm | layer | active / stored neurons | FLOP a token and layer | " + " | ".join(found["tasks"])
    lines = [head + " | mean | % of dense | recovered gap |", "|" + "---|" * (len(found["tasks"]) + 7)]
    for e in found["arms"]:
        cells = [e["name"], e["layer"], f"{e['active_neurons']} / {e['neurons']}", f"{e['flops']:,}"]
        runs = [numbers(e["scores"][task]) for task in found["tasks"]]
        for task, scores in zip(found["tasks"], runs, strict=True):
            cells.append(f"{e['medians'][task]:.1f} ({min(scores):.1f}-{max(scores):.1f})")
        means = [statistics.fmean(scores) for scores in zip(*runs, strict=True)]
        cells.append("" if e["mean"] is None else f"{e['mean']:.2f} ({min(means):.2f}-{max(means):.2f})")
        cells.append("" if e["retention"] is None else f"{e['retention']:.1f}")
        cells.append("" if e["recovered_gap"] is None else f"{e['recovered_gap']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {task}: {note}" for task, note in found["notes"].items())]
    return "\n".join(lines) + "\n"


def labels(names: list[str]) -> list[str]:
    """The names of arms without the words at their end, before any options, that all of them have."""
    split = [name.partition("@") for name in names]
    words = [arm.split("-") for arm, _, _ in split]
    while len(words) > 1 and min(map(len, words)) > 1 and len({arm[-1] for arm in words}) == 1:
        words = [arm[:-1] for arm in words]
    return ["-".join(arm) + at + options for arm, (_, at, options) in zip(words, split, strict=True)]


def chart(found: dict[str, Any]) -> str:
    """Mean score against the arithmetic of a layer, as SVG text."""
    names = [e["name"] for e in found["arms"]]
    short = dict(zip(names, labels(names), strict=True))
    series = []
    for color, (group, mark) in enumerate((("scratch", "circle"), ("from-dense", "square"))):
        here = [e for e in found["arms"] if e["flops"] and e["group"] == group]
        points = [(e["flops"], e["mean"]) for e in here]
        if points:
            series.append(Series(group, points, color, mark, labels=[short[e["name"]] for e in here]))
    levels = [(e["mean"], "no feedforward") for e in found["arms"] if not e["flops"]]
    panel = Panel(series, ARITHMETIC, Axis("mean GLUE score (dev)"), levels=levels)
    return draw([panel], title="Mean GLUE score against the arithmetic of a layer")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--arms", help="those without a finished model are left out")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="folder of scores and predictions; default RUNS/glue")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--option", action="append", default=[], help="NAME=VALUE as of `fastff glue`")
    parser.add_argument("--anew", action="store_true", help="run nothing, write table and chart of OUT/glue.json")
    asked = parser.parse_args()
    if not asked.anew and None in (asked.runs, asked.arms, asked.data):
        parser.error("--runs, --arms and --data are needed")
    return asked


def measured(asked: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune what is missing; what all of it says, also in OUT/glue.json."""
    arms = [arm for arm in asked.arms.split(",") if (pretrained(asked, arm) / MODEL).is_dir()]
    print("arms:", ", ".join(arms) or "none is finished")
    work = asked.work or asked.runs / "glue"
    every = [settings_of(asked, arm, work) for arm in arms]
    fine_tune(asked, every)
    found = summary(asked, every)
    asked.out.mkdir(parents=True, exist_ok=True)
    write_json(asked.out / "glue.json", found)
    return found


def main() -> None:
    asked = arguments()
    found = read_json(asked.out / "glue.json") if asked.anew else measured(asked)
    (asked.out / "table.md").write_text(table(found), encoding="utf-8")
    if found["tasks"]:
        (asked.out / "glue.svg").write_text(chart(found), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
