"""Pretrain the variants of a plan, each with options of its own, within a time; compare them in a table and charts.

A plan is a JSON list of variants: {"name", "feedforward" (a name or a description)}, and optionally "group" (variants
are compared within one), "options" (of `fastff pretrain`), "layer" (its --layer-option), "steps" (a factor on the
steps), "from" (the name of a finished variant whose model it starts from) and "convert" (true: whose feedforwards
`fastff experiment warm-start` first turns into this variant's).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastff.errors import FileError, TrainingError
from fastff.experiment.study_settings import PlanSettings
from fastff.io import read_json, write_json, write_text
from fastff.train.compare import chart, compare, left_out, table, variant_of
from fastff.train.interrupt import Stop, end_all
from fastff.train.placement import environments
from fastff.train.pretrain import MODEL, RESULT, read_text
from fastff.train.pretrain_settings import PretrainSettings

INIT = "init"  # folder of the converted weights, in that of the run
SAVING_SECONDS = 25.0  # to start a process, score held-out text and write a checkpoint
Say = Callable[[str], None]


@dataclass
class Variant:
    """One entry of the plan, in a folder of its own."""

    name: str
    feedforward: Any
    folder: Path
    group: str = "scratch"
    options: dict[str, Any] = field(default_factory=dict)
    layer: list[str] = field(default_factory=list)
    steps: float = 1.0
    source: Path | None = None
    convert: bool = False
    seed: int = 0

    def record(self) -> dict[str, Any] | None:
        """What the run left, also if it is not finished."""
        path = self.folder / RESULT
        if not path.is_file():
            return None
        return {**read_json(path, needs={"finished": bool}), "variant": self.name, "group": self.group}

    @property
    def finished(self) -> bool:
        record = self.record()
        return record is not None and record["finished"]

    @property
    def ready(self) -> bool:
        """Whether the run that this one starts from is finished."""
        return self.source is None or (self.source / MODEL).is_dir()

    def commands(self, asked: PlanSettings, left: float) -> list[list[str]]:
        """What is to be run, one after the other."""
        fastff = [sys.executable, "-m", "fastff.cli"]
        feedforward = self.feedforward if isinstance(self.feedforward, str) else json.dumps(self.feedforward)
        words = [*fastff, "pretrain", "--out", str(self.folder), "--data", str(asked.data)]
        words += [word for text in asked.text for word in ("--text", text)]
        words += [word for text in asked.valid for word in ("--valid", text)]
        words += ["--feedforward", feedforward, "--seed", str(self.seed)]
        words += ["--steps", str(max(1, round(asked.steps * self.steps)))]
        words += [word for option in self.layer for word in ("--layer-option", option)]
        own = {} if left == float("inf") else {"max-run-seconds": f"{left - SAVING_SECONDS:.0f}"}
        for name, value in {**own, **asked.pairs, **self.options}.items():  # a command takes an option once
            if value is not None:  # None: the plan takes back what all others have
                words += [f"--{name}", *([] if value is True or value == "" else [str(value)])]
        if self.source is None:
            return [words]
        model, init = self.source / MODEL, self.folder / INIT
        if not self.convert:
            return [[*words, "--init-from", str(model)]]
        convert = [*fastff, "experiment", "warm-start", str(model), str(asked.data), str(init)]
        convert += ["--feedforward", feedforward]
        made = (init / "model.safetensors").is_file()
        return [*([] if made else [convert]), [*words, "--init-from", str(init)]]


class Running:
    """The commands of a variant, on one GPU (or none)."""

    def __init__(self, variant: Variant, gpu: int, environment: dict[str, str], commands: list[list[str]]) -> None:
        self.variant, self.gpu, self.environment, self.commands = variant, gpu, environment, commands
        self.code = 0
        variant.folder.mkdir(parents=True, exist_ok=True)
        self._next()

    def _next(self) -> None:
        with (self.variant.folder / "log.txt").open("ab") as log:
            # In a session of its own the terminal's Ctrl-C does not reach it: it is asked to end once, by stop(), and a
            # second signal would end it without a checkpoint.
            self.process = subprocess.Popen(
                self.commands.pop(0), stdout=log, stderr=log, env=self.environment, start_new_session=True
            )

    def over(self) -> bool:
        """Whether all commands are done, or one failed."""
        if self.process.poll() is None:
            return False
        self.code = self.process.returncode
        if self.code == 0 and self.commands:
            self._next()
            return False
        return True


def read_plan(asked: PlanSettings) -> list[Variant]:
    """The variants of the plan, once for each seed. Raises FileError for a plan that is not one."""
    wanted = []
    for seed in asked.every_seed:
        found: dict[str, Variant] = {}
        for entry in _entries(asked.plan):
            source = entry.pop("from", None)
            folder = asked.runs / (entry["name"] + (f"-seed-{seed}" if seed else ""))
            if source is not None and source not in found:
                raise FileError(f"{asked.plan}: {entry['name']} starts from {source!r}, which is not before it")
            variant = Variant(
                **entry, folder=folder, seed=seed, source=None if source is None else found[source].folder
            )
            found[variant.name] = variant
        only = [name for words in asked.only for name in words.split(",")]
        missing = [name for name in only if name not in found]
        if missing:
            raise TrainingError(f"{asked.plan} has no variant {', '.join(missing)}, only {', '.join(found)}")
        wanted += [found[name] for name in only or found]
    return wanted


_KINDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "feedforward": (str, dict),
    "group": (str,),
    "options": (dict,),
    "layer": (list,),
    "steps": (int, float),
    "from": (str,),
    "convert": (bool,),
}


def _entries(path: Path) -> list[dict[str, Any]]:
    entries = read_json(path, remedy="put it right")
    if not isinstance(entries, list):
        raise FileError(f"{path} holds {type(entries).__name__}, expected a list of variants")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not {"name", "feedforward"} <= set(entry):
            raise FileError(f"{path}: entry {number} is no object with name and feedforward")
        for name, value in entry.items():
            if not isinstance(value, _KINDS.get(name, ())):
                raise FileError(f"{path}: entry {number} has {name} {value!r:.80}, expected of {', '.join(_KINDS)}")
    return entries


class Queue:
    """Variants that wait, run and have failed."""

    def __init__(self, variants: list[Variant], asked: PlanSettings, say: Say) -> None:
        self.asked, self.say = asked, say
        self.places = environments()
        self.waiting = [variant for variant in variants if not variant.finished]
        self.running: list[Running] = []
        self.failed: list[Variant] = []
        self.plain: list[Path] = []  # folders of variants that are tried again without the compiler

    def start_one(self, left: float) -> bool:
        """Start the first variant that can begin, if a GPU has room for it."""
        load = [sum(one.gpu == gpu for one in self.running) for gpu in range(len(self.places))]
        ready = next((variant for variant in self.waiting if variant.ready), None)
        if ready is None or min(load) >= self.asked.at_once:
            return False
        self.waiting.remove(ready)
        gpu = load.index(min(load))
        self.running.append(Running(ready, gpu, self.places[gpu], ready.commands(self.asked, left)))
        return True

    def ended(self) -> list[Variant]:
        """Those that finished since the last call; one that failed with the compiler waits again, without it."""
        done = []
        for one in [one for one in self.running if one.over()]:
            self.running.remove(one)
            variant = one.variant
            began = any(variant.folder.glob("checkpoint-*"))  # then the compiler was not what failed
            if one.code and not began and variant.folder not in self.plain and "compile" in self.asked.pairs:
                self.plain.append(variant.folder)
                self.say(f"{variant.name}: {log_end(variant)}")
                shutil.rmtree(variant.folder)
                variant.options["compile"] = None
                self.waiting.insert(0, variant)
            elif one.code:
                self.failed.append(variant)
            elif variant.finished:
                for path in variant.folder.glob("checkpoint-*"):
                    shutil.rmtree(path)
                done.append(variant)
            self.say(f"{variant.folder.name} ended with {one.code}")
        return done

    def stop(self) -> None:
        """Let all write a checkpoint and end: left alone they would write beside the next run of the same command."""
        end_all(one.process for one in self.running)


def log_end(variant: Variant) -> str:
    """The last words of a run."""
    return (variant.folder / "log.txt").read_text(encoding="utf-8", errors="replace")[-600:]


def _work(queue: Queue, asked: PlanSettings, finished: Callable[[], object]) -> None:
    """Run what waits until the time is over; what runs is stopped, with a checkpoint, if this process is."""
    end = time.monotonic() + (float("inf") if asked.seconds is None else asked.seconds)
    try:
        with Stop().watching():
            while queue.waiting or queue.running:
                left = end - time.monotonic()
                if left < max(asked.least, SAVING_SECONDS + 1):
                    queue.waiting.clear()
                if queue.start_one(left):
                    continue
                if not queue.running:
                    return  # what is left starts from runs that are not finished
                if queue.ended():
                    finished()
                time.sleep(0.2)
    finally:
        queue.stop()


def run(asked: PlanSettings, say: Say = print) -> list[dict[str, Any]]:
    """Run the plan and write the comparison; the same command again goes on with what is missing. Returns the records.

    Raises TrainingError for a plan or text that cannot be used.
    """
    if asked.text:
        _tokenise(asked)
    else:
        asked = replace(asked, text=("train",), valid=("valid",))
    variants = read_plan(asked)
    there = asked.out / "records.json"
    kept = read_json(there) if asked.keep and there.is_file() else []
    queue = Queue(variants, asked, say)
    _work(queue, asked, lambda: write(records_of(variants, kept), asked.out))
    for folder in queue.plain:
        say(f"{folder.name} failed with the compiler and was tried again without it")
    records = records_of(variants, kept)
    tables = write(records, asked.out)
    names = list(dict.fromkeys(variant.name for variant in variants))
    for line in [*tables, *left_out(names, records, asked.every_seed)]:
        say(line)
    for variant in queue.failed:
        say(f"failed: {variant.folder.name}: {log_end(variant)}")
    return records


def redraw(out: Path, plan: Path | None = None, say: Say = print) -> None:
    """Make the charts of `out`/records.json again, without running anything; say its tables, and what a plan has
    beside them."""
    records = read_json(out / "records.json")
    names = [entry["name"] for entry in _entries(plan)] if plan else []
    for line in [*write(records, out), *left_out(names, records, None)]:
        say(line)


def _tokenise(asked: PlanSettings) -> None:
    """Read the text once, before the variants that share it start. Raises TrainingError."""
    given = asked.pairs
    known = {"preset": str, "seq-len": int, "vocab-size": int, "max-tokens": int, "column": str, "tokenizer": str}
    options: dict[str, Any] = {name.replace("-", "_"): known[name](given[name]) for name in known if name in given}
    read_text(PretrainSettings(out=asked.data, text=asked.text, valid=asked.valid, data=asked.data, **options))


def records_of(variants: list[Variant], kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the runs of these variants left, finished or not, after those kept of other variants and seeds."""
    made = [record for variant in variants if (record := variant.record()) is not None]
    mine = {(variant_of(record), record["settings"]["seed"]) for record in made}
    return [record for record in kept if (variant_of(record), record["settings"]["seed"]) not in mine] + made


def write(records: list[dict[str, Any]], out: Path) -> list[str]:
    """The files of the comparison, from what is finished by now. Returns its tables, in Markdown."""
    done = [record for record in records if record["finished"]]
    write_json(out / "records.json", records)
    entries = compare(done) if done else []
    tables = []
    for group in dict.fromkeys(record["group"] for record in done):
        mine = [entry for entry in entries if entry["group"] == group]
        tables.append(f"## {group}\n\n{table(mine)}\n")
        write_text(out / f"loss-{group}.svg", chart(mine))
    return tables
