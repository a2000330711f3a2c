"""Documents from what a user calls "the text": files, directories, tables, or a data set of the Hugging Face hub."""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastff.errors import FileError, TrainingError
from fastff.io import digest

HUB = "datasets:"  # prefix of a source that is a data set of the hub
_OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}
_SUFFIXES = (".txt", ".txt.xz", ".txt.gz", ".parquet")
_ROWS = 1024


def documents(sources: Sequence[str], *, column: str = "text") -> Iterator[str]:
    """The documents of all sources, in order, read as a stream.

    A source is a text file (.txt, also packed with .xz or .gz, UTF-8; documents end at an empty line), a parquet file
    with the column `column`, a directory of such files (read in the order of their paths), or
    `datasets:NAME[:CONFIG[:SPLIT]]`, streamed from the hub with the package datasets. Raises TrainingError for a source
    that is not there, is not UTF-8 or does not have the column.
    """
    for source in sources:
        if source.startswith(HUB):
            yield from _from_hub(source.removeprefix(HUB), column)
        else:
            for path in files(Path(source)):
                yield from _from_parquet(path, column) if path.suffix == ".parquet" else _from_text(path)


def files(source: Path) -> list[Path]:
    """The files of a source: itself, or those of known kinds in a directory. Raises TrainingError if there is none."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise TrainingError(f"{source} is neither a file nor a directory; a data set of the hub begins with {HUB!r}")
    found = sorted(path for path in source.rglob("*") if path.name.endswith(_SUFFIXES) and path.is_file())
    if not found:
        raise TrainingError(f"{source} holds no file of {', '.join(_SUFFIXES)}")
    return found


def lines(path: Path) -> Iterator[str]:
    """The lines of a text file (UTF-8, also packed: .xz, .gz) without the spaces around them. Raises FileError."""
    number = 0
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as stream:
            for line in stream:
                number += 1
                yield line.strip()
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not UTF-8 after line {number}: {error.reason}") from error
    except (lzma.LZMAError, zlib.error, OSError, EOFError) as error:
        raise FileError(f"{path} cannot be read: {error}") from error


def state_of(sources: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What tells whether the files of some sources have changed: size, time of change and digest of each, by path.
    Sources that are not files here (data sets of the hub, tokens that were unpacked) have none."""
    paths = [path for source in sources if Path(source).exists() for path in files(Path(source))]
    return {str(path): {**_glance(path), "sha256": digest(path)} for path in paths}


def changed(sources: Sequence[str], state: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The first file of the sources that is not what `state_of` saw, None if there is none. Files that are gone do not
    count: tokens outlive their text. A file with a new date is read to be sure."""
    for path in (path for source in sources if Path(source).exists() for path in files(Path(source))):
        before = state.get(str(path))
        if before is None:
            return str(path)
        if _glance(path) != {name: before.get(name) for name in _GLANCE} and (
            path.stat().st_size != before.get("size") or digest(path) != before.get("sha256")
        ):
            return str(path)
    return None


_GLANCE = ("size", "modified_ns")


def _glance(path: Path) -> dict[str, int]:
    found = path.stat()
    return dict(zip(_GLANCE, (found.st_size, found.st_mtime_ns), strict=True))


def _from_text(path: Path) -> Iterator[str]:
    block: list[str] = []
    for line in lines(path):
        if line:
            block.append(line)
        elif block:
            yield "\n".join(block)
            block = []
    if block:
        yield "\n".join(block)


def _from_parquet(path: Path, column: str) -> Iterator[str]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if column not in names:
                raise TrainingError(f"{path} has no column {column!r}, only {', '.join(names)}")
            kind = str(table.schema_arrow.field(column).type)
            if kind not in ("string", "large_string", "string_view"):
                raise TrainingError(f"{path}: column {column!r} holds {kind}, expected text")
            for batch in table.iter_batches(_ROWS, columns=[column]):
                yield from (text for text in batch.column(0).to_pylist() if text)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path} cannot be read: {error}") from error


def _from_hub(name: str, column: str) -> Iterator[str]:
    from datasets import load_dataset

    path, *rest = name.split(":")
    config, split = (rest + ["", ""])[:2]
    try:
        rows = load_dataset(path, config or None, split=split or "train", streaming=True)
        for row in rows:
            if column not in row:
                raise TrainingError(f"data set {name} has no column {column!r}, only {', '.join(row)}")
            if row[column]:
                yield row[column]
    except (OSError, ValueError) as error:
        raise TrainingError(f"data set {name} cannot be read: {error}") from error
