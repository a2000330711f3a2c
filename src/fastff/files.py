"""One layer alone in a file: safetensors, with the layer's configuration in the metadata.

The tensors have the parameters' names, shapes and dtype. The metadata are strings: `format` is "fastff",
`version` is "1", and every field of TreeConfig and the training surrogate stand under their own names, as in
`{"depth": "11", "gate": "none", "bias": "false"}`. examples/c reads the same file without Python.
"""

from __future__ import annotations

import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from fastff.errors import CheckpointError, ShapeError
from fastff.layers import FFF
from fastff.tree import TreeConfig

_FORMAT, _VERSION = "fastff", "1"
_DTYPES = {"F64", "F32", "F16", "BF16"}
_TYPES = {field.name: str(field.type) for field in fields(TreeConfig)} | {
    "surrogate": "str | None",
    "region_leak": "float",
}


def save(layer: FFF, path: str | os.PathLike[str]) -> None:
    """Write a layer's weights and configuration into one safetensors file, replacing it whole or not at all.

    Raises TypeError if layer is not an FFF, ImportError without the package safetensors."""
    from safetensors.torch import save_file

    if not isinstance(layer, FFF):
        raise TypeError(f"layer is {type(layer).__name__}, expected FFF: save a model with its own save_pretrained")
    values = {**asdict(layer.config), "surrogate": layer.surrogate, "region_leak": layer.region_leak}
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
            shapes = _shapes(path, arguments)
            stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: tuple(part.get_shape()) for name, part in stored.items()}
            if found != shapes:
                raise CheckpointError(f"{path} holds tensors {found}, expected {shapes}")
            dtypes = {part.get_dtype() for part in stored.values()}
            if len(dtypes) > 1 or not dtypes <= _DTYPES:
                raise CheckpointError(f"{path} holds {', '.join(sorted(dtypes))}, expected one of {sorted(_DTYPES)}")
            return _build(file, arguments, list(shapes), device, backend)
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


def _shapes(path: object, arguments: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of each tensor by name, from the configuration."""
    try:
        config = TreeConfig(**{field.name: arguments[field.name] for field in fields(TreeConfig)})
    except ShapeError as error:
        raise CheckpointError(f"{path} describes an impossible layer: {error}") from error
    named = {name: getattr(config, f"shape_of_{name}") for name in ("w_in", "b_in", "w_out", "b_out")}
    return {name: shape for name, shape in named.items() if shape is not None}


def _build(
    file: Any, arguments: dict[str, Any], names: list[str], device: torch.device | str | None, backend: str | None
) -> FFF:
    first = file.get_tensor(names[0])
    layer = FFF(**arguments, backend=backend, device="meta", dtype=first.dtype).to_empty(device=device or first.device)
    layer.reset_usage()
    with torch.no_grad():
        for name in names:
            getattr(layer, name).copy_(file.get_tensor(name))
    return layer
