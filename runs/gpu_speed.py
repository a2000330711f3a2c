"""Tokens a second of pretraining on one GPU and on several of one host, with DDP and with FSDP2.

python runs/gpu_speed.py --data DATA --runs DIR --out experiments/gpus [--gpus 1,2,4] [options]

DATA holds tokens named train and valid, as `runs/pack_tokens.py unpack` leaves them. `torchrun -m fastff.cli pretrain`
trains every feedforward for `--steps`, with `--rows` rows a GPU each time; the speed is that of the second half of the
steps. Runs that find GPUs free go at once, the largest first, each on GPUs of its own. OUT gets what a run left, as
FEEDFORWARD-GPUS.json, `-sharded` with FSDP2. What is in OUT is not run again; a run that fails ends none of the others.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fastff.train.placement import environments
from fastff.train.pretrain import RESULT


@dataclass(frozen=True)
class Speed:
    """A feedforward on so many GPUs."""

    feedforward: str
    gpus: int
    sharded: bool

    @property
    def name(self) -> str:
        return f"{self.feedforward}-{self.gpus}" + ("-sharded" if self.sharded else "")

    def command(self, asked: argparse.Namespace) -> list[str]:
        rows = str(self.gpus * asked.rows)
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.gpus)]
        words += ["-m", "fastff.cli", "pretrain", "--out", str(asked.runs / self.name), "--data", str(asked.data)]
        words += ["--text", "train", "--valid", "valid", "--valid-windows", "256", "--objective", "causal"]
        words += ["--preset", asked.preset, "--feedforward", self.feedforward, "--steps", str(asked.steps)]
        words += ["--batch", rows, "--micro-batch", str(asked.rows), "--ramp", "0", "--log-every", "10"]
        words += ["--precision", "bf16", "--save-every", "1000000"]
        return [*words, *(["--fsdp"] if self.sharded else []), *asked.option]


def measure(waiting: list[Speed], asked: argparse.Namespace) -> list[str]:
    """Run all of them, as many at once as there are GPUs for; returns the names of those that failed."""
    if not torch.cuda.is_available():
        raise SystemExit("no GPU is visible, expected one or more")
    free = [place["CUDA_VISIBLE_DEVICES"] for place in environments()]
    for too_large in [one for one in waiting if one.gpus > len(free)]:
        print(f"{too_large.name}: not run, {len(free)} GPUs are visible", flush=True)
        waiting.remove(too_large)
    running: dict[Speed, tuple[list[str], subprocess.Popen[bytes]]] = {}
    failed = []
    while waiting or running:
        fits = next((one for one in waiting if one.gpus <= len(free)), None)
        if fits is not None:
            waiting.remove(fits)
            mine, free = free[: fits.gpus], free[fits.gpus :]
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(mine)}
            with (asked.runs / f"{fits.name}.log").open("wb") as log:
                running[fits] = mine, subprocess.Popen(fits.command(asked), stdout=log, stderr=log, env=environment)
            continue
        for one, (mine, process) in list(running.items()):
            if process.poll() is None:
                continue
            del running[one]
            free += mine
            if process.returncode:
                failed.append(one.name)
                print(f"{one.name} failed, see {asked.runs / one.name}.log", flush=True)
            else:
                shutil.copy(asked.runs / one.name / RESULT, asked.out / f"{one.name}.json")
                print(f"{one.name} is measured", flush=True)
        time.sleep(0.2)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--gpus", default="1,2,4")
    parser.add_argument("--feedforward", default="dense-swiglu,36x5-swiglu4-gate", help="names of `fastff variants`")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--rows", type=int, default=256, help="of a GPU and step")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--option", action="append", default=[], help="passed on to `fastff pretrain`, a word each")
    asked = parser.parse_args()
    for folder in (asked.runs, asked.out):
        folder.mkdir(parents=True, exist_ok=True)
    numbers = sorted(map(int, asked.gpus.split(",")), reverse=True)
    every = [
        Speed(feedforward, gpus, sharded)
        for gpus in numbers
        for sharded in ((False, True) if gpus > 1 else (False,))
        for feedforward in asked.feedforward.split(",")
    ]
    failed = measure([one for one in every if not (asked.out / f"{one.name}.json").is_file()], asked)
    raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
