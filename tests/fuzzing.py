"""Damage to files, the same in every run: what the fuzzers of loaders share."""

from __future__ import annotations

import json
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

_HOSTILE = (None, -1, 0, 1, 2**31, 2**53, 2**70, 1.5, 1e300, "", "x", "bf16", True, False, [], [1], {}, {"a": 1})


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


def altered(content: Any, count: int, *, seed: int) -> Iterator[Any]:
    """`count` copies of what JSON holds, with one to three values removed, or replaced by others: hostile ones, ones
    near by, or ones from another place."""
    rng, whole = random.Random(seed), json.dumps(content)
    for _ in range(count):
        copy = json.loads(whole)
        for _ in range(rng.randint(1, 3)):
            places = list(_places(copy))
            if not places:
                break
            container, key = rng.choice(places)
            other, there = rng.choice(places)
            value, change = container[key], rng.randrange(4)
            if change == 0:
                del container[key]
            elif change == 1 and type(value) in (int, float):
                container[key] = rng.choice((value + 1, value - 1, 2 * value, value // 2))
            elif change == 2:
                container[key] = json.loads(json.dumps(other[there]))
            else:
                container[key] = rng.choice(_HOSTILE)
        yield copy


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in nested dicts and lists: the container and the key."""
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield content, key
            yield from _places(value)


def damage(path: Path, count: int, *, seed: int) -> Iterator[int]:
    """Put each of `mutations` into a file in turn; the file is whole again afterwards."""
    whole = path.read_bytes()
    for number, damaged in enumerate(mutations(whole, count, seed=seed)):
        put(path, damaged)
        yield number
    put(path, whole)


def put(path: Path, content: bytes) -> None:
    """Write a file anew: writing over one waits for the disk, on a file system that guards what it held."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def error_of(call: Callable[[], Any]) -> Exception | None:
    """What a call raises, None if it returns."""
    try:
        call()
    except Exception as error:
        return error
    return None
