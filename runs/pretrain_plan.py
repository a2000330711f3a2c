"""Pretrain the arms of a plan, each with options of its own, within so many seconds; table, chart and every record.

python runs/pretrain_plan.py PLAN.json --data DATA --runs DIR --out experiments/NAME --steps N [options]
python runs/pretrain_plan.py PLAN.json --text FILES --valid FILE --data DATA ...

PLAN.json is a list of arms: {"name", "feedforward" (a name or a description)}, and optionally "group" (arms are
compared within one), "options" (of `fastff pretrain`), "layer" (of its --layer), "steps" (a factor on --steps), "from"
(the name of a finished arm whose model it starts from) and "convert" (true: whose feedforwards `runs/warm_start.py`
first turns into this arm's). DATA holds tokens named train and valid, as `runs/pack_tokens.py` unpacks them, or gets
those of `--text` and `--valid`. Arms start in the order of the plan, with `--seeds` all of a seed before those of the
next, `--at-once` on each GPU; one that fails with --option compile= is tried again without. After
`--seconds` no run goes on: each ends in time with a checkpoint, and the same command continues it; finished runs are
compared, unfinished ones listed with their loss. `--keep` leaves the records of other arms and seeds in OUT beside
those made now, so that a study may grow on several machines. `--anew` runs nothing and makes table and charts of
OUT/records.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastff.io import read_json, write_json
from fastff.train.compare import chart, compare, left_out, table
from fastff.train.placement import environments
from fastff.train.pretrain import MODEL, RESULT, Settings, read_text

WARM_START = Path(__file__).resolve().with_name("warm_start.py")
START = "start"  # folder of the converted weights, in that of the run
SAVING_SECONDS = 25.0  # to start a process, score held-out text and write a checkpoint


@dataclass
class Arm:
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
        return {**read_json(path), "arm": self.name, "group": self.group} if path.is_file() else None

    @property
    def finished(self) -> bool:
        record = self.record()
        return record is not None and record["finished"]

    @property
    def ready(self) -> bool:
        """Whether the run that this one starts from is finished."""
        return self.source is None or (self.source / MODEL).is_dir()

    def commands(self, asked: argparse.Namespace, left: float) -> list[list[str]]:
        """What is to be run, one after the other."""
        feedforward = self.feedforward if isinstance(self.feedforward, str) else json.dumps(self.feedforward)
        words = [sys.executable, "-m", "fastff.cli", "pretrain", "--out", str(self.folder), "--data", str(asked.data)]
        words += [word for text in asked.text for word in ("--text", text)]
        words += [word for text in asked.valid for word in ("--valid", text)]
        words += ["--feedforward", feedforward, "--seed", str(self.seed)]
        words += ["--steps", str(max(1, round(asked.steps * self.steps)))]
        words += [word for option in self.layer for word in ("--layer-option", option)]
        shared = dict(option.partition("=")[::2] for option in asked.option)
        own = {"max-run-seconds": f"{left - SAVING_SECONDS:.0f}"}  # a command takes an option once
        for name, value in {**own, **shared, **self.options}.items():
            if value is None:  # the plan takes back what all others have
                continue
            words += [f"--{name}", *([] if value in ("", True) else [str(value)])]
        if self.source is None:
            return [words]
        model, start = self.source / MODEL, self.folder / START
        if not self.convert:
            return [[*words, "--init-from", str(model)]]
        convert = [sys.executable, str(WARM_START), str(model), str(asked.data), str(start)]
        convert += ["--feedforward", feedforward]
        made = (start / "model.safetensors").is_file()
        return [*([] if made else [convert]), [*words, "--init-from", str(start)]]


class Running:
    """The commands of an arm, on one GPU (or none)."""

    def __init__(self, arm: Arm, gpu: int, environment: dict[str, str], commands: list[list[str]]) -> None:
        self.arm, self.gpu, self.environment, self.commands = arm, gpu, environment, commands
        self.code = 0
        arm.folder.mkdir(parents=True, exist_ok=True)
        self._next()

    def _next(self) -> None:
        with (self.arm.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(self.commands.pop(0), stdout=log, stderr=log, env=self.environment)

    def log(self) -> str:
        """What the commands have said."""
        return (self.arm.folder / "log.txt").read_text(encoding="utf-8", errors="replace")

    def over(self) -> bool:
        """Whether all commands are done, or one failed."""
        if self.process.poll() is None:
            return False
        self.code = self.process.returncode
        if self.code == 0 and self.commands:
            self._next()
            return False
        return True


def read_plan(asked: argparse.Namespace) -> list[Arm]:
    """The arms of the plan, once for each seed. Raises KeyError for an arm that starts from one that is not there."""
    wanted = []
    for seed in asked.seeds:
        found: dict[str, Arm] = {}
        for entry in json.loads(asked.plan.read_text(encoding="utf-8")):
            source = entry.pop("from", None)
            folder = entry["name"] + (f"-seed-{seed}" if seed else "")
            arm = Arm(**entry, folder=(asked.runs or asked.out) / folder, seed=seed)
            arm.source = None if source is None else found[source].folder
            found[arm.name] = arm
        wanted += [found[name] for name in (asked.only.split(",") if asked.only else found)]
    return wanted


def run(arms: list[Arm], asked: argparse.Namespace, kept: list[dict[str, Any]]) -> list[str]:
    """Run what is not finished until the time is over; returns the arms that failed."""
    began = time.monotonic()
    places = environments()
    waiting = [arm for arm in arms if not arm.finished]
    running: list[Running] = []
    failed: list[str] = []
    plain: list[Path] = []  # folders of arms that are tried again without the compiler
    while waiting or running:
        left = asked.seconds - (time.monotonic() - began)
        if left < max(asked.least, SAVING_SECONDS + 1):
            waiting = []
        load = [sum(r.gpu == gpu for r in running) for gpu in range(len(places))]
        ready = next((arm for arm in waiting if arm.ready), None)
        if ready is not None and min(load) < asked.at_once:
            waiting.remove(ready)
            gpu = load.index(min(load))
            running.append(Running(ready, gpu, places[gpu], ready.commands(asked, left)))
            continue
        if ready is None and not running:
            break  # what is left starts from runs that are not finished
        for one in [one for one in running if one.over()]:
            running.remove(one)
            if one.code and one.arm.folder not in plain and "compile" in (o.partition("=")[0] for o in asked.option):
                plain.append(one.arm.folder)
                print(f"{one.arm.name}: {one.log()[-600:]}", flush=True)
                shutil.rmtree(one.arm.folder)
                one.arm.options["compile"] = None
                waiting.insert(0, one.arm)
            elif one.code:
                failed.append(one.arm.folder.name)
            elif one.arm.finished:
                for path in one.arm.folder.glob("checkpoint-*"):
                    shutil.rmtree(path)
                write(records_of(arms, kept), asked.out)
            print(f"{time.monotonic() - began:5.0f} s: {one.arm.folder.name} ended with {one.code}", flush=True)
        time.sleep(0.2)
    for folder in plain:
        print(f"{folder.name} failed with the compiler and was tried again without it")
    return failed


def tokenise(asked: argparse.Namespace) -> None:
    """Read the text once, before the arms that share it start. Raises TrainingError."""
    given = dict(option.partition("=")[::2] for option in asked.option)
    known = {"preset": str, "length": int, "vocab-size": int, "max-tokens": int, "column": str, "tokenizer": str}
    options = {name.replace("-", "_"): kind(given[name]) for name, kind in known.items() if name in given}
    read_text(Settings(out=asked.data, text=tuple(asked.text), valid=tuple(asked.valid), data=asked.data, **options))


def records_of(arms: list[Arm], kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the runs of these arms left, finished or not, after those kept of other arms and seeds."""
    made = [record for arm in arms if (record := arm.record()) is not None]
    mine = {(record["arm"], record["settings"]["seed"]) for record in made}
    return [record for record in kept if (record["arm"], record["settings"]["seed"]) not in mine] + made


def write(records: list[dict[str, Any]], out: Path) -> None:
    """The files of the comparison, from what is finished by now."""
    done = [record for record in records if record["finished"]]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "records.json", records)
    if not done:
        return
    entries = compare(done)
    text = []
    for group in dict.fromkeys(record["group"] for record in done):
        mine = [entry for entry in entries if entry["group"] == group]
        text.append(f"## {group}\n\n{table(mine)}\n")
        (out / f"loss-{group}.svg").write_text(chart(mine), encoding="utf-8")
    (out / "table.md").write_text("\n".join(text), encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--data", type=Path, help="folder of the tokens")
    parser.add_argument("--text", action="append", help="text of `fastff pretrain`; without, DATA has the tokens")
    parser.add_argument("--valid", action="append", default=[])
    parser.add_argument("--runs", type=Path, help="folder of the runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the comparison")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=1, help="so many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="end after so long")
    parser.add_argument("--least", type=float, default=0.0, help="begin no run with fewer seconds left")
    parser.add_argument("--at-once", type=int, default=1, help="runs on each GPU")
    parser.add_argument("--only", help="these arms, in this order")
    parser.add_argument("--option", action="append", default=[], help="NAME=VALUE passed on to `fastff pretrain`")
    parser.add_argument("--keep", action="store_true", help="leave other records of OUT beside those made now")
    parser.add_argument("--anew", action="store_true", help="run nothing, write table and charts of OUT/records.json")
    asked = parser.parse_args()
    asked.seeds = range(asked.first_seed, asked.first_seed + asked.seeds)
    if not asked.anew and None in (asked.data, asked.runs, asked.steps):
        parser.error("--data, --runs and --steps are needed")
    return asked


def main() -> None:
    asked = arguments()
    if asked.text:
        tokenise(asked)
    else:
        asked.text, asked.valid = ["train"], ["valid"]
    arms = read_plan(asked)
    there = asked.out / "records.json"
    kept = read_json(there) if asked.anew or (asked.keep and there.is_file()) else []
    failed = [] if asked.anew else run(arms, asked, kept)
    records = kept if asked.anew else records_of(arms, kept)
    write(records, asked.out)
    if (asked.out / "table.md").is_file():
        print((asked.out / "table.md").read_text(encoding="utf-8"))
    names = list(dict.fromkeys(arm.name for arm in arms))
    print("\n".join(left_out(names, records, None if asked.anew else asked.seeds)))
    for name in failed:
        log = (asked.runs / name / "log.txt").read_text(encoding="utf-8", errors="replace")
        print(f"failed: {name}: {log[-600:]}")


if __name__ == "__main__":
    main()
