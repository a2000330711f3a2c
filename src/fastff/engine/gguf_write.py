"""GGUF files written: for comparisons with engines that read nothing else, and for tests."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from fastff.engine.gguf import TYPES, Bytes, Floats, Gguf
from fastff.io import replacing

ALIGNMENT = 32
_NUMBERS = {kind.name: number for number, kind in TYPES.items()}


def _scaled(blocks: Floats, scale: Floats) -> Floats:
    """blocks / scale, zero where the scale is."""
    return np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale != 0)


def _half_bytes(values: Floats) -> Bytes:
    return values.astype(np.float16).view(np.uint8)


def _q8_0(blocks: Floats) -> Bytes:
    scale = np.abs(blocks).max(1, keepdims=True) / 127
    numbers = np.rint(_scaled(blocks, scale)).astype(np.int8)
    return np.concatenate([_half_bytes(scale), numbers.view(np.uint8)], axis=1)


def _packed_nibbles(numbers: Floats) -> Bytes:
    whole = numbers.astype(np.uint8)
    return np.bitwise_or(whole[:, :16], np.left_shift(whole[:, 16:], 4), dtype=np.uint8)


def _q4_0(blocks: Floats) -> Bytes:
    at = np.abs(blocks).argmax(1)[:, None]
    scale = (np.take_along_axis(blocks, at, 1) / -8).astype(np.float32)  # the largest becomes 0
    numbers = np.clip(np.floor(_scaled(blocks, scale) + 8.5), 0, 15)
    return np.concatenate([_half_bytes(scale), _packed_nibbles(numbers)], axis=1)


def _q4_1(blocks: Floats) -> Bytes:
    least = blocks.min(1, keepdims=True)
    scale = (blocks.max(1, keepdims=True) - least) / 15
    numbers = np.clip(np.floor(_scaled(blocks - least, scale) + 0.5), 0, 15)
    return np.concatenate([_half_bytes(scale), _half_bytes(least), _packed_nibbles(numbers)], axis=1)


_ROUNDED: dict[str, Callable[[Floats], Bytes]] = {
    "F32": lambda values: values.view(np.uint8),
    "F16": _half_bytes,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
}


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[Tensor, str]]) -> None:
    """Write a GGUF file of tensors, each with the name of its type in `fastff.engine.gguf.TYPES`.

    metadata: text, bool, int, float, or lists of one of them. Raises FileError if the file cannot be written.
    """
    with replacing(path) as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        for name, value in metadata.items():
            file.write(_text(name) + _typed(value))
        contents, offset = [], 0
        for name, (tensor, kind) in tensors.items():
            content = _content(tensor, kind)
            dimensions = tuple(tensor.shape)[::-1]
            form = f"<I{len(dimensions)}QIQ"
            file.write(_text(name) + struct.pack(form, len(dimensions), *dimensions, _NUMBERS[kind], offset))
            contents.append(content)
            offset += -(-len(content) // ALIGNMENT) * ALIGNMENT
        for content in contents:
            _fill_up(file)
            file.write(content)
        _fill_up(file)


def requantise(source: Path, out: Path, kind: str) -> None:
    """Write a GGUF model again with its matrices in another type; vectors stay F32, as llama.cpp wants them.

    The embedding of Q4_0 and Q4_1 models stays Q8_0, which is what llama.cpp's own tool leaves a tied head in, and rows
    that are not whole blocks become F16.
    """
    gguf = Gguf(source)

    def kind_of(name: str, tensor: Tensor) -> str:
        if tensor.dim() == 1:
            return "F32"
        if tensor.shape[-1] % TYPES[_NUMBERS[kind]].numbers:
            return "F16"
        return "Q8_0" if name == "token_embd.weight" and kind.startswith("Q4") else kind

    tensors = {name: (tensor, kind_of(name, tensor)) for name, tensor in gguf.items()}
    write_gguf(out, gguf.metadata, tensors)


def _content(tensor: Tensor, kind: str) -> bytes:
    values = tensor.detach().to(torch.float32).contiguous().numpy()
    return _ROUNDED[kind](values.reshape(-1, TYPES[_NUMBERS[kind]].numbers)).tobytes()


def _fill_up(file: IO[bytes]) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


_FORMS = {4: "<I", 5: "<i", 6: "<f", 7: "<?"}  # of numbers, by their kind in the file


def _typed(value: Any) -> bytes:
    if isinstance(value, list):
        kind = _kind(value[0], signed=True) if value else 5  # llama.cpp wants lists of numbers signed, single ones not
        return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(_plain(item, kind) for item in value)
    kind = _kind(value)
    return struct.pack("<I", kind) + _plain(value, kind)


def _kind(value: Any, *, signed: bool = False) -> int:
    whole = 5 if signed or (isinstance(value, int) and value < 0) else 4
    return {str: 8, bool: 7, int: whole, float: 6}[type(value)]


def _plain(value: Any, kind: int) -> bytes:
    return _text(value) if kind == 8 else struct.pack(_FORMS[kind], value)
