"""Damage to files, the same in every run: what the fuzzers of loaders share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

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
    rng = np.random.default_rng(seed)

    def place() -> int:
        return int(rng.integers(min(len(whole), 2048) if rng.random() < 0.5 else len(whole)))

    for _ in range(count):
        data = bytearray(whole)
        for _ in range(int(rng.integers(1, 4))):
            a, b = sorted((place(), place()))
            b = min(b, a + int(rng.choice([1, 8, 64, 4096])))
            match int(rng.integers(6)):
                case 0:
                    del data[int(rng.integers(len(data) + 1)) :]
                case 1 if data:
                    data[a % len(data)] ^= 1 << int(rng.integers(8))
                case 2:
                    del data[a:b]
                case 3:
                    data[a:a] = data[a:b]
                case 4:
                    data[a:b] = rng.bytes(b - a)
                case _:
                    piece = _WORTH_TRYING[int(rng.integers(len(_WORTH_TRYING)))]
                    data[a : a + len(piece)] = piece
        yield bytes(data)


def error_of(call: Callable[[], Any]) -> Exception | None:
    """What a call raises, None if it returns."""
    try:
        call()
    except Exception as error:
        return error
    return None
