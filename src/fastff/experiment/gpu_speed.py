"""Tokens a second of pretraining on one GPU and on several of one host, with DDP and with FSDP2.

Every feedforward is trained, on several GPUs under torchrun, with equally many rows a GPU each time; the speed is that
of the second half of the steps. Runs that find GPUs free go at once, the largest first, each on GPUs of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastff.errors import BackendUnavailable
from fastff.experiment.study_settings import PLAIN, SpeedSettings
from fastff.train.interrupt import Stop, end_all
from fastff.train.placement import environments
from fastff.train.pretrain import RESULT


@dataclass(frozen=True)
class Case:
    """A feedforward on so many GPUs, in a form of SpeedSettings."""

    feedforward: str
    gpus: int
    fsdp: bool
    form: str

    @property
    def name(self) -> str:
        form = "" if self.form == PLAIN else f"-{self.form}"
        return f"{self.feedforward}-{self.gpus}" + ("-fsdp" if self.fsdp else "") + form

    def command(self, asked: SpeedSettings) -> list[str]:
        rows = str(self.gpus * asked.rows)
        words = [sys.executable]
        if self.gpus > 1:
            words += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.gpus)]
        words += ["-m", "fastff.cli", "pretrain", "--out", str(asked.runs / self.name), "--data", str(asked.data)]
        words += ["--text", "train", "--valid", "valid", "--valid-windows", "256", "--objective", "causal"]
        words += ["--preset", asked.preset, "--feedforward", self.feedforward, "--steps", str(asked.steps)]
        words += ["--batch", rows, "--micro-batch", str(asked.rows), "--ramp", "0", "--log-every", "10"]
        words += ["--precision", "bf16", "--save-every", "1000000"]
        words += ["--fsdp"] if self.fsdp else []
        words += [word for part, word in (("compiled", "--compile"), ("graph", "--graph")) if part in self.form]
        return [*words, *asked.option]


def cases(asked: SpeedSettings) -> list[Case]:
    """The largest first; those that `out` lacks."""
    every = [
        Case(feedforward, gpus, fsdp, form)
        for gpus in sorted(asked.gpus, reverse=True)
        for fsdp in ((False, True) if gpus > 1 else (False,))
        for feedforward in asked.feedforward
        for form in asked.form
        if gpus == 1 or "graph" not in form
    ]
    return [case for case in every if not (asked.out / f"{case.name}.json").is_file()]


def run(asked: SpeedSettings, say: Callable[[str], None] = print) -> list[str]:
    """Measure what `out` lacks, as much at once as there are GPUs for. Returns the names of the cases that failed: they
    end none of the others; what runs is ended if this process is. Raises BackendUnavailable without a GPU."""
    for folder in (asked.runs, asked.out):
        folder.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        raise BackendUnavailable("no GPU is visible, expected one or more")
    free = [place["CUDA_VISIBLE_DEVICES"] for place in environments()]
    waiting = cases(asked)
    for too_large in [case for case in waiting if case.gpus > len(free)]:
        say(f"{too_large.name}: not run, {len(free)} GPUs are visible")
        waiting.remove(too_large)
    running: dict[Case, tuple[list[str], subprocess.Popen[bytes]]] = {}
    failed: list[str] = []
    try:
        with Stop().watching():
            while waiting or running:
                fits = next((case for case in waiting if case.gpus <= len(free)), None)
                if fits is not None:
                    waiting.remove(fits)
                    mine, free = free[: fits.gpus], free[fits.gpus :]
                    running[fits] = mine, _start(fits, asked, mine)
                    continue
                for case in [case for case, (_, process) in running.items() if process.poll() is not None]:
                    mine, process = running.pop(case)
                    free += mine
                    failed += _ended(case, asked, process.returncode, say)
                time.sleep(0.2)
    finally:
        end_all(process for _, process in running.values())
    return failed


def _start(case: Case, asked: SpeedSettings, gpus: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    with (asked.runs / f"{case.name}.log").open("wb") as log:
        return subprocess.Popen(case.command(asked), stdout=log, stderr=log, env=environment)


def _ended(case: Case, asked: SpeedSettings, code: int, say: Callable[[str], None]) -> list[str]:
    if code:
        say(f"{case.name} failed, see {asked.runs / case.name}.log")
        return [case.name]
    shutil.copy(asked.runs / case.name / RESULT, asked.out / f"{case.name}.json")
    say(f"{case.name} is measured")
    return []
