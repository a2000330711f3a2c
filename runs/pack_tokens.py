"""Pack text that was tokenised for pretraining, to take it to a machine that has neither the text nor the time.

python runs/pack_tokens.py pack DATA FILE.tar [--most TOKENS]
python runs/pack_tokens.py unpack FILE.tar DATA

DATA is the folder of `fastff pretrain --data`, with tokenizer, tokens and held-out tokens. Unpacked, the text is called
`train` and the held-out text `valid`: `fastff pretrain --data DATA --text train --valid valid` opens them. A token
takes about a byte.
"""

from __future__ import annotations

import argparse
import io
import lzma
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fastff.io import read_json, write_json
from fastff.text.tokenizer import fingerprint, load_tokenizer

PARTS = ("train", "valid")
_PIECE = 4 * 2**20  # tokens compressed alone, so that a file of them unpacks on several cores
# Tokens of two bytes: the matches that are found begin at even places.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lp": 1, "pb": 1, "lc": 0}]


def pack(data: Path, target: Path, most: int | None) -> None:
    """Write the tar file, its tokens compressed in pieces."""
    with tarfile.open(target, "w") as archive:
        archive.add(data / "tokenizer", "tokenizer")
        for part in PARTS:
            meta = read_json(data / part / "tokens.json")
            ids = np.fromfile(data / part / "tokens.bin", dtype=meta["dtype"])[: most if part == "train" else None]
            with ThreadPoolExecutor() as pool:
                pieces = pool.map(
                    lambda piece: lzma.compress(piece.tobytes(), filters=_FILTERS),
                    [ids[first : first + _PIECE] for first in range(0, len(ids), _PIECE)],
                )
                for number, packed in enumerate(pieces):
                    entry = tarfile.TarInfo(f"{part}/{number:04d}.{meta['dtype']}.xz")
                    entry.size = len(packed)
                    archive.addfile(entry, io.BytesIO(packed))
    print(f"{target}: {target.stat().st_size} bytes")


def unpack(source: Path, data: Path) -> None:
    """Make DATA of the tar file. The tokenizer's fingerprint is taken anew: it hangs on the version of `tokenizers`."""
    with tarfile.open(source) as archive:
        # Python 3.11 has the filter since 3.11.4 only; later versions warn without it.
        safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(data, **safe)
    tokenizer = fingerprint(load_tokenizer(data / "tokenizer"))
    for part in PARTS:
        packed = sorted((data / part).glob("*.xz"))
        dtype = packed[0].name.split(".")[1]
        with ThreadPoolExecutor() as pool, (data / part / "tokens.bin").open("wb") as out:
            for piece in pool.map(lambda path: lzma.decompress(path.read_bytes()), packed):
                out.write(piece)
        count = (data / part / "tokens.bin").stat().st_size // np.dtype(dtype).itemsize
        meta = {"sources": [part], "column": "text", "most": None, "dtype": dtype, "tokenizer": tokenizer}
        write_json(data / part / "tokens.json", {**meta, "tokens": count})
        for path in packed:
            path.unlink()
        print(f"{data / part}: {count} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--most", type=int, help="pack no more tokens")
    asked = parser.parse_args()
    if asked.what == "pack":
        pack(asked.source, asked.target, asked.most)
    else:
        unpack(asked.source, asked.target)


if __name__ == "__main__":
    main()
