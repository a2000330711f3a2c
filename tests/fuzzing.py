"""Damage to files, the same in every run: what the fuzzers of loaders share."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_WORTH_TRYING = (
    b"",
    b"{}",
    b"[]",
    b"null",
    b"-1",
    b"1e999",
    b"\x00" * 8,
    b"\xff" * 8,
    b"9" * 20,
    b'"',
    b"NaN",
    b"true",
)


def mutations(whole: bytes, count: int, *, seed: int) -> Iterator[bytes]:
    """`count` damaged copies of a file: cut short, bits flipped, pieces removed, doubled, exchanged or overwritten.

    Half of the damage falls into the first 2 kB, where formats keep their headers."""
    rng = random.Random(seed)  # a tenth of the time of numpy's, of single numbers
    size, head = len(whole), min(len(whole), 2048)
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(1 + int(3 * rng.random())):
            a, b = sorted(int((head if rng.random() < 0.5 else size) * rng.random()) for _ in range(2))
            b = min(b, a + rng.choice((1, 8, 64, 4096)))
            match int(6 * rng.random()):
                case 0:
                    del data[int((len(data) + 1) * rng.random()) :]
                case 1 if data:
                    data[a % len(data)] ^= 1 << rng.getrandbits(3)
                case 2:
                    del data[a:b]
                case 3:
                    data[a:a] = data[a:b]
                case 4:
                    data[a:b] = rng.randbytes(b - a)
                case _:
                    piece = rng.choice(_WORTH_TRYING)
                    data[a : a + len(piece)] = piece
        yield bytes(data)


def damage(path: Path, count: int, *, seed: int) -> Iterator[int]:
    """Put each of `mutations` into a file in turn; the file is whole again afterwards."""
    whole = path.read_bytes()
    for number, damaged in enumerate(mutations(whole, count, seed=seed)):
        path.write_bytes(damaged)
        yield number
    path.write_bytes(whole)


def error_of(call: Callable[[], Any]) -> Exception | None:
    """What a call raises, None if it returns."""
    try:
        call()
    except Exception as error:
        return error
    return None
