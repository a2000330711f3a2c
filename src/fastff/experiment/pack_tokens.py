"""Pack text that was tokenised for pretraining, to take it to a machine that has neither the text nor the time.

The data is the folder of `fastff pretrain --data`, with tokenizer, tokens and held-out tokens. Unpacked, the text is
called `train` and the held-out text `valid`: `fastff pretrain --data DATA --text train --valid valid` opens them. A
token takes about a byte.
"""

from __future__ import annotations

import io
import lzma
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fastff.errors import FileError
from fastff.io import digest, reading, remove_stale, replacing, write_json
from fastff.text.tokenizer import Vocabulary, fingerprint, load_tokenizer
from fastff.text.tokens import IDS, META, Tokens

PARTS = ("train", "valid")
_PIECE = 4 * 2**20  # tokens compressed alone, so that a file of them unpacks on several cores
# Tokens of two bytes: the matches that are found begin at even places.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lp": 1, "pb": 1, "lc": 0}]


def pack(data: Path, target: Path, *, most: int | None = None, say: Callable[[str], None] = print) -> None:
    """Write the tar file, of the first `most` tokens of the text, in compressed pieces. Raises FileError."""
    vocabulary = Vocabulary.of(load_tokenizer(data / "tokenizer"))
    with replacing(target) as file, tarfile.open(fileobj=file, mode="w") as archive:
        archive.add(data / "tokenizer", "tokenizer")
        for part in PARTS:
            tokens = Tokens(data / part, vocabulary, 2, closed=False)
            ids = tokens.ids[: most if part == "train" else None]
            with ThreadPoolExecutor() as pool:
                pieces = pool.map(
                    lambda piece: lzma.compress(piece.tobytes(), filters=_FILTERS),
                    [ids[first : first + _PIECE] for first in range(0, len(ids), _PIECE)],
                )
                for number, packed in enumerate(pieces):
                    entry = tarfile.TarInfo(f"{part}/{number:04d}.{tokens.meta['dtype']}.xz")
                    entry.size = len(packed)
                    archive.addfile(entry, io.BytesIO(packed))
    say(f"{target}: {target.stat().st_size} bytes")


def unpack(source: Path, data: Path, *, say: Callable[[str], None] = print) -> None:
    """Make `data` of the tar file. Raises FileError for one that is damaged.

    The tokenizer's fingerprint is taken anew: it hangs on the version of `tokenizers`.
    """
    for part in PARTS:  # pieces of an unpacking that was interrupted, perhaps of another file
        for path in (data / part).glob("*.xz"):
            path.unlink()
    with reading(source, "copy it again"), tarfile.open(source) as archive:
        # Python 3.11 has the filter since 3.11.4 only; later versions warn without it.
        safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(data, **safe)
    tokenizer = fingerprint(load_tokenizer(data / "tokenizer"))
    for part in PARTS:
        with reading(source, "copy it again"):
            count = _join(data / part, part, tokenizer)
        say(f"{data / part}: {count} tokens")


def _join(folder: Path, part: str, tokenizer: str) -> int:
    """Make the tokens and their description of the pieces in a folder; returns how many there are."""
    packed = sorted(folder.glob("*.xz"))
    dtypes = {path.name.split(".")[1] for path in packed}
    if len(dtypes) != 1 or not dtypes <= {"uint16", "uint32"}:
        raise FileError(f"{folder} holds pieces of {', '.join(sorted(dtypes)) or 'nothing'}, expected of one dtype")
    [dtype] = dtypes
    remove_stale(folder)
    with ThreadPoolExecutor() as pool, replacing(folder / IDS) as out:
        for piece in pool.map(lambda path: lzma.decompress(path.read_bytes()), packed):
            out.write(piece)
    count = (folder / IDS).stat().st_size // np.dtype(dtype).itemsize
    meta = {"sources": [part], "column": "text", "most": None, "dtype": dtype, "tokenizer": tokenizer}
    write_json(folder / META, {**meta, "tokens": count, "sha256": digest(folder / IDS)})
    for path in packed:
        path.unlink()
    return count
