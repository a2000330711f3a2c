"""Writing so that a crash or a full disk leaves the old content or the new, never a part."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from fastff.errors import TrainingError


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a new file beside `path`, bring it to the disk, and rename it. Raises OSError; `path` is then untouched."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        # Tidying up after a failed write may fail for the reason that is being reported.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Bring a file's content, or a directory's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file. Raises TrainingError if it cannot be written; the old one is then untouched."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        replace_file(path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {error.strerror or error}; the old file is unchanged") from error


def read_json(path: Path) -> Any:
    """Content of a JSON file. Raises TrainingError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"cannot read {path}: {error}") from error
