"""Small text and small runs that the tests of `fastff.train` share."""

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli_runner import invoke
from fastff.demo.data import documents
from fastff.train.pretrain import Settings

RUNS = Path(__file__).parents[1] / "runs"
# For the preset tiny on windows of 16 tokens: a step takes a few hundredths of a second.
FEEDFORWARD = '{"kind": "fff", "depth": 3, "trees": 2, "gate": "boundary", "bias": true}'


def write_text(folder: Path, *, paragraphs: int = 120) -> Path:
    """A text file with the beginning of a bundled novel, one document a paragraph."""
    path = folder / "text.txt"
    path.write_text("\n\n".join(next(iter(documents("learn.txt.xz").values()))[:paragraphs]), encoding="utf-8")
    return path


def small(out: Path, text: Path, **changes: Any) -> Settings:
    """A run of eight steps of four rows with a vocabulary of 300."""
    sizes: dict[str, Any] = {
        "steps": 8,
        "batch": 4,
        "micro_batch": 2,
        "length": 16,
        "vocab_size": 300,
        "valid_windows": 8,
        "log_every": 1,
        "save_every": 3,
        "feedforward": FEEDFORWARD,
        "data": text.parent / "data",
        "cpu": True,
    }
    return Settings(out=out, text=(str(text),), **{**sizes, **changes})


class Process:
    """A `fastff` command, or a script of runs/, run in this process in place of `subprocess.Popen`: importing
    Transformers in another takes longer than what is run."""

    def __init__(self, words: list[str], stdout: Any = None, **_: Any) -> None:
        self.returncode = 0
        if words[1] != "-m":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", words[1:])
                runpy.run_path(words[1], run_name="__main__")
            return
        done = invoke(words[3:])
        self.returncode = done.exit_code
        if stdout is not None:
            stdout.write(done.output.encode())

    def poll(self) -> int:
        return self.returncode


def run_script(name: str, *words: object, process: type[Any] = Process) -> None:
    """Run a script of runs/ in this process, and what it starts of Python's as `process`."""
    start = subprocess.Popen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            subprocess, "Popen", lambda words, **o: (process if words[0] == sys.executable else start)(words, **o)
        )
        Process([sys.executable, str(RUNS / name), *map(str, words)])
