"""One layer alone in a file: safetensors, with the layer's configuration in the metadata.

The tensors have the parameters' names, shapes and dtype. The metadata are strings: `format` is "fastff",
`version` is "1", and every field of TreeConfig, the quantization and the training surrogate stand under their own
names, as in `{"depth": "11", "gate": "none", "bias": "false"}`. examples/c reads the same file without Python.
"""

from __future__ import annotations

import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from fastff.config import TreeConfig
from fastff.errors import CheckpointError
from fastff.layers import FFF

_FORMAT, _VERSION = "fastff", "1"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OPTIONS = {"quantization": "str | None", "surrogate": "str | None", "region_leak": "float"}  # beside TreeConfig
_TYPES = {field.name: str(field.type) for field in fields(TreeConfig)} | _OPTIONS


def save(layer: FFF, path: str | os.PathLike[str]) -> None:
    """Write a layer's weights and configuration into one safetensors file, replacing it whole or not at all.

    Raises TypeError if layer is not an FFF, ImportError without the package safetensors."""
    from safetensors.torch import save_file

    if not isinstance(layer, FFF):
        raise TypeError(f"layer is {type(layer).__name__}, expected FFF: save a model with its own save_pretrained")
    values = asdict(layer.config) | {name: getattr(layer, name) for name in _OPTIONS}
    metadata = {"format": _FORMAT, "version": _VERSION, **{name: _text(value) for name, value in values.items()}}
    tensors = {name: tensor.detach().contiguous() for name, tensor in layer.state_dict().items()}
    part = Path(f"{os.fspath(path)}.{os.getpid()}.part")
    try:
        save_file(tensors, part, metadata)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], *, device: torch.device | str | None = None, backend: str | None = None) -> FFF:
    """The layer that `save` wrote: same weights, dtype and configuration, in training mode like a new one.

    device: where its parameters go, default the CPU. backend: as for FFF.
    Raises CheckpointError if the file is not a layer's, or has a missing, extra or misshapen tensor, before it takes
    memory for weights; OSError if it cannot be read; ImportError without the package safetensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            arguments = _arguments(path, file.metadata() or {})
            stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            dtype = _dtype(path, {part.get_dtype() for part in stored.values()})
            layer = _blueprint(path, {**arguments, "backend": backend, "dtype": dtype})
            expected = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
            found = {name: tuple(part.get_shape()) for name, part in stored.items()}
            if found != expected:
                raise CheckpointError(f"{path} holds tensors {found}, expected {expected}")
            layer = layer.to_empty(device=device or "cpu")
            layer.reset_usage()
            with torch.no_grad():
                for name in expected:
                    getattr(layer, name).copy_(file.get_tensor(name))
            return layer
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


def _text(value: object) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _arguments(path: object, metadata: dict[str, str]) -> dict[str, Any]:
    """The arguments of FFF that the metadata hold."""
    seen = {name: metadata.get(name) for name in ("format", "version")}
    if seen != {"format": _FORMAT, "version": _VERSION}:
        raise CheckpointError(f"{path} has {seen} in its metadata, expected format {_FORMAT!r}, version {_VERSION!r}")
    missing = sorted(set(_TYPES) - set(metadata))
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)} in its metadata")
    return {name: _value(path, name, kind, metadata[name]) for name, kind in _TYPES.items()}


def _value(path: object, name: str, kind: str, text: str) -> int | float | bool | str | None:
    try:
        match kind:
            case "int":
                return int(text)
            case "float":
                return float(text)
            case "bool":
                return {"true": True, "false": False}[text]
    except (ValueError, KeyError):
        raise CheckpointError(f"{path} has {name} {text!r} in its metadata, expected {kind}") from None
    return None if text == "none" else text


def _dtype(path: object, stored: set[str]) -> torch.dtype:
    if len(stored) != 1 or not stored <= set(_DTYPES):
        raise CheckpointError(f"{path} holds {', '.join(sorted(stored))}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[stored.pop()]


def _blueprint(path: object, arguments: dict[str, Any]) -> FFF:
    """The layer without memory."""
    try:
        return FFF(**arguments, device="meta")
    except ValueError as error:
        raise CheckpointError(f"{path} describes an impossible layer: {error}") from error
