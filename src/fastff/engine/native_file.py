"""The native engine's model file: a checksummed JSON header and aligned tensors (`csrc/model/weights_file.h`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from fastff.errors import CheckpointError
from fastff.io import replacing
from fastff.ops.native_linear import FORMS, MatrixForm, PackedMatrix, packed_bytes

MAGIC = b"fastffM1"
ALIGNMENT = 64
_PREAMBLE = 24  # bytes: magic, size of the header, its checksum


@dataclass(frozen=True)
class StoredTensor:
    """A tensor to be written. make: gives it in fp32, of `shape`, when its turn comes.

    kind    "f32" or "bf16", row by row; a form of `fastff.ops.native_linear`, a packed matrix
    gated   of such a matrix: `make` gives (2 * out_features, in_features), all gates and then all values
    blocks  `make` gives GGUF's blocks of the matrix's form, uint8, in place of fp32
    """

    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    kind: Literal["f32", "bf16"] | MatrixForm = "f32"
    gated: bool = False
    blocks: bool = False

    @property
    def made_shape(self) -> tuple[int, ...]:
        return (2 * self.shape[0], *self.shape[1:]) if self.gated else self.shape

    @property
    def bytes(self) -> int:
        if self.kind in FORMS:
            return packed_bytes(*self.shape, gated=self.gated, form=self.kind)
        return torch.Size(self.shape).numel() * (4 if self.kind == "f32" else 2)

    def content(self, name: str) -> Tensor:
        """Its bytes. Raises CheckpointError for values that are not finite or of another shape."""
        if self.blocks:
            return self._packed_blocks(name)
        values = self.make().detach().float()
        if tuple(values.shape) != self.made_shape:
            raise CheckpointError(f"{name} is {tuple(values.shape)}, expected {self.made_shape}")
        if not bool(values.isfinite().all()):
            raise CheckpointError(f"{name} holds NaN or infinite values")
        if self.kind in FORMS:
            return PackedMatrix(values, gated=self.gated, form=self.kind).data
        dtype = torch.float32 if self.kind == "f32" else torch.bfloat16
        return values.to(dtype).contiguous().view(-1).view(torch.uint8)

    def _packed_blocks(self, name: str) -> Tensor:
        blocks, (rows, inputs) = self.make(), self.made_shape
        if self.kind not in FORMS or tuple(blocks.shape[:2]) != (rows, inputs // 32) or inputs % 32:
            raise CheckpointError(f"{name} has blocks {tuple(blocks.shape)}, expected those of {self.made_shape}")
        return PackedMatrix.of_blocks(blocks, gated=self.gated, form=self.kind).data


def fnv1a(data: bytes) -> int:
    """The header's checksum."""
    checksum = 14695981039346656037
    for byte in data:
        checksum = (checksum ^ byte) * 1099511628211 % (1 << 64)
    return checksum


def write_model(path: Path, model: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    """Write a model file, its tensors in the order given. The file appears only when it is whole.

    Raises CheckpointError for a tensor that is not what it should be, FileError if the file cannot be written.
    """
    header = _header(model, tensors)
    with replacing(path) as file:
        file.write(MAGIC + len(header).to_bytes(8, "little") + fnv1a(header).to_bytes(8, "little") + header)
        for name, tensor in tensors.items():
            _fill_up(file)
            content = tensor.content(name)
            if content.numel() != tensor.bytes:
                raise CheckpointError(f"{name} takes {content.numel()} bytes, expected {tensor.bytes}")
            file.write(content.numpy().data)
        _fill_up(file)


def _header(model: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> bytes:
    """Offsets depend on the header's length: written with room for the largest, then filled up with spaces."""
    room = len(_with_offsets(model, tensors, 1 << 50)) + ALIGNMENT
    start = -(-(_PREAMBLE + room) // ALIGNMENT) * ALIGNMENT
    return _with_offsets(model, tensors, start).ljust(start - _PREAMBLE)


def _with_offsets(model: Mapping[str, Any], tensors: Mapping[str, StoredTensor], start: int) -> bytes:
    entries, offset = {}, start
    for name, tensor in tensors.items():
        entries[name] = {"type": tensor.kind, "shape": tensor.shape, "offset": offset, "gated": tensor.gated}
        offset += -(-tensor.bytes // ALIGNMENT) * ALIGNMENT
    return json.dumps({"model": model, "tensors": entries}, separators=(",", ":")).encode()


def _fill_up(file: IO[bytes]) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))
