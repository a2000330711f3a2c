"""One layer alone in a file: safetensors, with the layer's configuration in the metadata.

The tensors have the parameters' names, shapes and dtype. The metadata are strings: `format` is "fastff",
`version` is "1", and every field of TreeConfig, the quantization and the training surrogate stand under their own
names, as in `{"depth": "11", "gate": "none", "bias": "false"}`. examples/c reads the same file without Python.
A ConditionalFeedforward adds `layer`, "conditional", and has the fields of ConditionalConfig, those of its router after
`router.`, balance_step and the quantization.
"""

from __future__ import annotations

import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from fastff.conditional import ConditionalConfig, ConditionalFeedforward, make_conditional
from fastff.config import TreeConfig
from fastff.errors import CheckpointError
from fastff.io import write_tensors
from fastff.layers import FFF
from fastff.routers import Router, RouterConfig

_FORMAT, _VERSION = "fastff", "1"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OPTIONS = {"quantization": "str | None", "surrogate": "str | None", "region_leak": "float"}  # beside TreeConfig
_TYPES = {field.name: str(field.type) for field in fields(TreeConfig)} | _OPTIONS
_LATER = {"paths": "none"}  # what the metadata may lack, because files were written before it; and are, where it is so
_CONDITIONAL_TYPES = (
    {field.name: str(field.type) for field in fields(ConditionalConfig) if field.name != "router"}
    | {f"router.{field.name}": str(field.type) for field in fields(RouterConfig)}
    | {"balance_step": "float", "quantization": "str | None"}
)
_BALANCE = "router.balance"  # float32 whatever the weights are

Layer = FFF | ConditionalFeedforward


def save(layer: Layer, path: str | os.PathLike[str]) -> None:
    """Write a layer's weights and configuration into one safetensors file, replacing it whole or not at all.

    Raises TypeError if layer is neither an FFF nor a ConditionalFeedforward with one of fastff's routers, FileError if
    the file cannot be written, ImportError without the package safetensors."""
    values = _described(layer)
    text = {name: _text(value) for name, value in values.items()}
    metadata = {"format": _FORMAT, "version": _VERSION, **{n: t for n, t in text.items() if _LATER.get(n) != t}}
    tensors = {name: tensor.detach().contiguous() for name, tensor in layer.state_dict().items()}
    write_tensors(Path(path), tensors, metadata)


def load(
    path: str | os.PathLike[str], *, device: torch.device | str | None = None, backend: str | None = None
) -> Layer:
    """The layer that `save` wrote: same weights, dtype and configuration, in training mode like a new one.

    device: where its parameters go, default the CPU. backend: as for FFF.
    Raises CheckpointError if the file is not a layer's, or has a missing, extra or misshapen tensor, before it takes
    memory for weights; OSError if it cannot be read; ImportError without the package safetensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            arguments = _arguments(path, metadata)
            stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            dtype = _dtype(path, {part.get_dtype() for name, part in stored.items() if name != _BALANCE})
            layer = _blueprint(path, {**arguments, "backend": backend, "dtype": dtype})
            expected = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
            found = {name: tuple(part.get_shape()) for name, part in stored.items()}
            if found != expected:
                raise CheckpointError(f"{path} holds tensors {found}, expected {expected}")
            layer = layer.to_empty(device=device or "cpu")
            layer.reset_usage()
            with torch.no_grad():
                for name, tensor in layer.state_dict().items():
                    tensor.copy_(file.get_tensor(name))
            return layer
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


def _described(layer: Layer) -> dict[str, object]:
    """The metadata of a layer beside format and version, before they are text."""
    if isinstance(layer, FFF):
        return asdict(layer.config) | {name: getattr(layer, name) for name in _OPTIONS}
    if not isinstance(layer, ConditionalFeedforward):
        expected = "FFF or ConditionalFeedforward: save a model with its own save_pretrained"
        raise TypeError(f"layer is {type(layer).__name__}, expected {expected}")
    if not isinstance(layer.router, Router):
        raise TypeError(
            f"the layer's router is {type(layer.router).__name__}, expected one of fastff's: save its state"
        )
    values: dict[str, object] = asdict(layer.config)
    del values["router"]
    router = {f"router.{name}": value for name, value in asdict(layer.router.config).items()}
    more = {"balance_step": layer.router.balance_step, "quantization": layer.quantization}
    return {"layer": "conditional", **values, **router, **more}


def _text(value: object) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _arguments(path: object, metadata: dict[str, str]) -> dict[str, Any]:
    """The arguments of the layer that the metadata hold."""
    seen = {name: metadata.get(name) for name in ("format", "version")}
    if seen != {"format": _FORMAT, "version": _VERSION}:
        raise CheckpointError(f"{path} has {seen} in its metadata, expected format {_FORMAT!r}, version {_VERSION!r}")
    kind = metadata.get("layer")
    if kind not in (None, "conditional"):
        raise CheckpointError(f"{path} has layer {kind!r} in its metadata, expected none or 'conditional'")
    types = _TYPES if kind is None else _CONDITIONAL_TYPES
    metadata = _LATER | metadata
    missing = sorted(set(types) - set(metadata))
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)} in its metadata")
    return {name: _value(path, name, kind, metadata[name]) for name, kind in types.items()}


def _value(path: object, name: str, kind: str, text: str) -> int | float | bool | str | None:
    try:
        if kind == "int | None" and text == "none":
            return None
        match kind.removesuffix(" | None"):
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


def _blueprint(path: object, arguments: dict[str, Any]) -> Layer:
    """The layer without memory."""
    try:
        if "router.kind" not in arguments:
            return FFF(**arguments, device="meta")
        router = {name: arguments.pop(f"router.{name}") for name in RouterConfig.__dataclass_fields__}
        own = {field.name: arguments.pop(field.name) for field in fields(ConditionalConfig) if field.name != "router"}
        config = ConditionalConfig(**own, router=RouterConfig(**router))
        quantization = arguments.pop("quantization")
        return make_conditional(config, **arguments, device="meta").quantize(quantization)
    except ValueError as error:
        raise CheckpointError(f"{path} describes an impossible layer: {error}") from error
