"""What a run leaves on disk: `results.json`, the report, and the state that lets a second run go on."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from fastff.errors import FastffError, FileError
from fastff.io import read_json, read_torch, reading, restored, write_bytes, write_torch

SCHEMA = 1
REMEDY = "`--restart` begins again"


class RunError(FastffError):
    """The run cannot go on; the message says why and what to do."""


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file so that a reader, a crash or a full disk finds the old content or the new, never a part.

    Raises RunError when it cannot be written; the old file is then untouched.
    """
    try:
        write_bytes(path, content)
    except FileError as error:
        raise RunError(str(error)) from error


class Store:
    """The folder of one run.

    results   what `results.json` holds; `save()` writes it
    Raises RunError for a folder that cannot be written, results that cannot be read or that belong to another run.
    """

    def __init__(self, out: Path, identity: dict[str, Any], *, restart: bool = False) -> None:
        self.out = out
        self.state = out / "state"
        self._counted = time.perf_counter()
        self.results: dict[str, Any] = {}
        path = out / "results.json"
        if restart:
            self._forget()
        elif path.is_file():
            self.results = self._read(path)
            self._check(identity)
        if not self.results:
            self.results = {"schema": SCHEMA, "settings": identity}
        self.save()

    def save(self) -> None:
        text = json.dumps(self.results, indent=1, ensure_ascii=False, allow_nan=False)
        write_atomic(self.out / "results.json", text.encode() + b"\n")

    def finish(self, stage: str, content: Any) -> None:
        """Record a finished stage, and the seconds used so far, which a killed run would not live to tell."""
        self.results["seconds_used"] = self.seconds_used()
        self._counted = time.perf_counter()
        self.results[stage] = content
        self.save()

    def seconds_used(self) -> float:
        """Of this run and those that it continues, until now."""
        before: float = self.results.get("seconds_used", 0.0)
        return before + time.perf_counter() - self._counted

    def save_state(self, name: str, state: dict[str, Any]) -> None:
        try:
            write_torch(self.state / f"{name}.pt", state)
        except FileError as error:
            raise RunError(str(error)) from error

    def load_state(self, name: str) -> dict[str, Any] | None:
        """A saved state, None if there is none. Raises RunError if it cannot be read."""
        path = self.state / f"{name}.pt"
        if not path.is_file():
            return None
        try:
            state: dict[str, Any] = read_torch(path, needs={}, remedy=REMEDY)
        except FileError as error:
            raise RunError(str(error)) from error
        return state

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            content: dict[str, Any] = read_json(path, needs={}, remedy=REMEDY)
            if content.get("schema") != SCHEMA:
                raise RunError(f"{path} is not of this version; {REMEDY}")
            with reading(path, REMEDY):
                restored(dict, content.get("settings"), "settings")
                restored(float, content.get("seconds_used", 0.0), "seconds_used")
        except FileError as error:
            raise RunError(str(error)) from error
        return content

    def _check(self, identity: dict[str, Any]) -> None:
        before = self.results["settings"]
        if before != identity:
            raise RunError(
                f"{self.out} holds a run with {_words(before)}, this one asks for {_words(identity)}: "
                "`--restart` begins again, `--out` names another folder"
            )

    def _forget(self) -> None:
        """Remove what a run wrote, and nothing else."""
        try:
            if self.state.is_dir():
                shutil.rmtree(self.state)
            for name in ("results.json", "index.html"):
                (self.out / name).unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"cannot remove the earlier run in {self.out}: {error.strerror or error}") from error


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
