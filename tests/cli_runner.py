"""Run a command line of `fastff` in this process."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from unittest import mock

from fastff.cli import run
from fastff.cli.console import console


@dataclass(frozen=True)
class Result:
    """What a command said, errors included, and its exit code."""

    exit_code: int
    output: str


def invoke(words: Sequence[object], env: Mapping[str, str] = {}, width: int = 200) -> Result:
    """The result of `fastff WORDS`. Exceptions that the command does not turn into a message go through."""
    said = io.StringIO()
    with mock.patch.dict(os.environ, env), mock.patch.multiple(console, _file=said, _width=width):
        try:
            code = run([str(word) for word in words])
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
    return Result(code, said.getvalue())
