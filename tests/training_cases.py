"""Small text and small runs that the tests of `fastff.train` share."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli_runner import Result, invoke
from fastff.demo.data import documents
from fastff.train.pretrain_settings import PretrainSettings

# For the preset tiny on windows of 16 tokens: a step takes a few hundredths of a second.
FEEDFORWARD = '{"kind": "fff", "depth": 3, "trees": 2, "gate": "boundary", "bias": true}'


def write_text(folder: Path, *, paragraphs: int = 120) -> Path:
    """A text file with the beginning of a bundled novel, one document a paragraph."""
    path = folder / "text.txt"
    path.write_text("\n\n".join(next(iter(documents("learn.txt.xz").values()))[:paragraphs]), encoding="utf-8")
    return path


def small(out: Path, text: Path, **changes: Any) -> PretrainSettings:
    """A run of eight steps of four rows with a vocabulary of 300."""
    sizes: dict[str, Any] = {
        "steps": 8,
        "batch": 4,
        "micro_batch": 2,
        "seq_len": 16,
        "vocab_size": 300,
        "valid_windows": 8,
        "log_every": 1,
        "save_every": 3,
        "feedforward": FEEDFORWARD,
        "data": text.parent / "data",
        "cpu": True,
    }
    return PretrainSettings(out=out, text=(str(text),), **{**sizes, **changes})


class Process:
    """A `fastff` command, run in this process in place of `subprocess.Popen`: importing Transformers in another takes
    longer than what is run."""

    def __init__(self, words: list[str], stdout: Any = None, **_: Any) -> None:
        done = invoke(words[3:])
        self.returncode = done.exit_code
        if stdout is not None:
            stdout.write(done.output.encode())

    def poll(self) -> int:
        return self.returncode


def fastff(*words: object, process: type[Any] = Process) -> Result:
    """What `fastff WORDS` does in this process: its exit_code and output; what it starts of Python's is a `process`."""
    start = subprocess.Popen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            subprocess, "Popen", lambda words, **o: (process if words[0] == sys.executable else start)(words, **o)
        )
        return invoke(words)
