"""Pretrain several feedforwards alike and compare them: loss, cost, recovered gap; table, chart and JSON.

python runs/pretrain_arms.py TEXT [TEXT ...] --runs DIR --out results/training/NAME [options]

One process an arm and seed, `--at-once` of them, shared out over the GPUs if there are any. With `--option
piece-seconds=540` every process ends in time with a checkpoint; the same command goes on until all are finished, and
compares what is finished.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastff.training.compare import chart, compare, table
from fastff.training.files import read_json, write_json
from fastff.training.presets import feedforward_of, preset_of
from fastff.training.pretrain import RESULT, Settings, read_text

ARMS = ("dense-swiglu", "none", "1x11", "narrow:1x11", "16x7-gate", "narrow:16x7-gate")


@dataclass
class Job:
    """One arm and seed, in a folder of its own."""

    arm: str
    seed: int
    folder: Path
    words: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any] | None:
        """What the run left, None while it is not finished."""
        path = self.folder / RESULT
        record: dict[str, Any] | None = read_json(path) if path.is_file() else None
        return record if record and record["finished"] else None

    def start(self, gpu: int | None) -> subprocess.Popen[bytes]:
        self.folder.mkdir(parents=True, exist_ok=True)
        visible = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(self.words, stdout=log, stderr=log, env={**os.environ, **visible})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs and their tokens")
    parser.add_argument("--out", type=Path, required=True, help="folder of the comparison")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--valid", action="append", default=[])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--option", action="append", default=[], help="NAME=VALUE passed on to `fastff pretrain`")
    return parser.parse_args()


def jobs(asked: argparse.Namespace) -> list[Job]:
    """Every arm and seed, seeds of one after all arms of another. Raises TrainingError for an unknown arm."""
    found = []
    for seed in range(asked.seeds):
        for arm in asked.arms.split(","):
            feedforward_of(arm, preset_of(asked.preset).hidden)
            folder = asked.runs / f"{arm.replace(':', '-of-')}-seed-{seed}"
            words = [sys.executable, "-m", "fastff.cli", "pretrain", "--out", str(folder), "--feedforward", arm]
            words += ["--seed", str(seed), "--preset", asked.preset, "--steps", str(asked.steps)]
            words += ["--data", str(asked.runs / "data")]
            words += [word for text in asked.text for word in ("--text", text)]
            words += [word for text in asked.valid for word in ("--valid", text)]
            words += [
                w for name, _, value in (o.partition("=") for o in asked.option) for w in (f"--{name}", value) if w
            ]
            found.append(Job(arm, seed, folder, words))
    return found


def run(todo: list[Job], at_once: int) -> None:
    """Start the jobs that are not finished, so many at a time. Raises SystemExit if one failed."""
    waiting = [job for job in todo if job.record() is None]
    gpus = torch.cuda.device_count()
    running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
    failed = []
    while waiting or running:
        for slot in range(at_once):
            if slot not in running and waiting:
                job = waiting.pop(0)
                running[slot] = job, job.start(slot % gpus if gpus else None)
        for slot, (job, process) in list(running.items()):
            if process.poll() is not None:
                del running[slot]
                if process.returncode:
                    failed.append(str(job.folder / "log.txt"))
        time.sleep(0.2)
    if failed:
        raise SystemExit(f"failed, see {', '.join(failed)}")


def tokenise(asked: argparse.Namespace) -> None:
    """Read the text once, before the arms that share it start."""
    given = dict(option.partition("=")[::2] for option in asked.option)
    known = {"length": int, "vocab-size": int, "max-tokens": int, "column": str, "tokenizer": str}
    options = {name.replace("-", "_"): kind(given[name]) for name, kind in known.items() if name in given}
    data = asked.runs / "data"
    read_text(
        Settings(out=data, text=tuple(asked.text), valid=tuple(asked.valid), preset=asked.preset, data=data, **options)
    )


def main() -> None:
    asked = arguments()
    todo = jobs(asked)
    tokenise(asked)
    run(todo, asked.at_once)
    records = [record for job in todo if (record := job.record()) is not None]
    left = len(todo) - len(records)
    print(f"{len(records)} of {len(todo)} runs are finished" + (": the same command goes on" if left else ""))
    if not records:
        return
    entries = compare(records)
    shared = {k: v for k, v in records[0]["settings"].items() if k not in ("feedforward", "seed", "text", "valid")}
    asked.out.mkdir(parents=True, exist_ok=True)
    write_json(asked.out / "comparison.json", {"settings": shared, "machine": records[0]["machine"], "arms": entries})
    curves = {job.folder.name: record["curve"] for job in todo if (record := job.record()) is not None}
    (asked.out / "curves.json").write_text(json.dumps(curves) + "\n", encoding="utf-8")
    (asked.out / "loss.svg").write_text(chart(entries), encoding="utf-8")
    (asked.out / "table.md").write_text(table(entries) + "\n", encoding="utf-8")
    print(table(entries))


if __name__ == "__main__":
    main()
