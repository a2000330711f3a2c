"""Model directories whose matrices are stored in 8 bits, one scale a row: a quarter of the bytes, for models that are
given away. They load as any other, into the floating-point model that computes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastff.errors import CheckpointError
from fastff.io import replacing

INT8_FILE = "model.int8.safetensors"
_SCALE = ".scale"
LEVELS = 127


def write_int8(model: Any, folder: Path) -> None:
    """Write FOLDER/model.int8.safetensors and the configuration: matrices (and what has more dimensions) as int8, rows
    along the last dimension; the rest as it is. Raises FileError."""
    stored: dict[str, Tensor] = {}
    shared: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in shared and tensor.numel() and tensor.is_floating_point():
            continue  # tied weights are stored once
        shared[tensor.data_ptr()] = name
        if tensor.is_floating_point() and tensor.dim() > 1:
            stored[name], stored[name + _SCALE] = quantised(tensor.detach().float().cpu())
        else:
            stored[name] = tensor.detach().cpu().clone()
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / INT8_FILE) as file:
        save_file(stored, file.name, metadata={"format": "pt"})
    write_configuration = getattr(model, "_write_configuration", None)
    model.config.save_pretrained(folder)
    if write_configuration is not None:
        write_configuration(folder)


def quantised(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """int8 of the tensor's shape, and float32 scales (..., 1): tensor is about int8 times scale."""
    scale = tensor.abs().amax(-1, keepdim=True).clamp(min=1e-12) / LEVELS
    return (tensor / scale).round().to(torch.int8), scale


def remove_int8(folder: str | os.PathLike[str]) -> None:
    """Remove such a file, which would be loaded before any other weights."""
    (Path(folder) / INT8_FILE).unlink(missing_ok=True)


def has_int8(source: str | os.PathLike[str]) -> bool:
    """Whether a local directory holds such a file."""
    return (Path(source) / INT8_FILE).is_file()


def read_int8(folder: Path) -> dict[str, Tensor]:
    """Tensors of a directory in float32 by name. Raises CheckpointError for a damaged file."""
    path = folder / INT8_FILE
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    found: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith(_SCALE):
            continue
        if tensor.dtype == torch.int8:
            scale = stored.get(name + _SCALE)
            if scale is None or scale.shape != (*tensor.shape[:-1], 1):
                raise CheckpointError(f"{path} holds no scale of each row of {name}")
            tensor = tensor.float() * scale
        found[name] = tensor
    return found
