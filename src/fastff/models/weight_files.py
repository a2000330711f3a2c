"""What a model directory holds, checked before a library builds a model from it: damage is told by the file's name."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils.hub import cached_file

from fastff.errors import CheckpointError

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

Source = str | os.PathLike[str]


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments of from_pretrained, those that say where files are found."""
    return {name: options[name] for name in HUB_OPTIONS if name in options}


def locate(source: Source, name: str, hub: Mapping[str, Any]) -> str | None:
    """Path of a file of a directory or of the hub; None if there is none."""
    found: str | None = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)
    return found


def read_object(path: Source) -> dict[str, Any]:
    """Content of a JSON file that holds an object. Raises CheckpointError naming the file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def stored_dtypes(source: Source, hub: Mapping[str, Any]) -> dict[str, str]:
    """safetensors' name of the dtype of every tensor, by the headers alone; empty where there are no such files.

    Raises CheckpointError naming the file that is damaged, or that an index names and that is not there.
    """
    whole, index = locate(source, _WEIGHTS, hub), locate(source, _INDEX, hub)
    if whole is not None or index is None:
        return {} if whole is None else _dtypes_of(whole)
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{index} has weight_map {shards!r}, expected the file of every tensor")
    found: dict[str, str] = {}
    for name in sorted(set(shards.values())):
        path = locate(source, name, hub) if name == Path(name).name else None
        if path is None:
            raise CheckpointError(f"{index} names {name!r}, which is not there")
        found |= _dtypes_of(path)
    return found


def _dtypes_of(path: str) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def check_dtypes(source: Source, model: nn.Module, stored: Mapping[str, str]) -> None:
    """Raise CheckpointError for a tensor whose bytes were taken for numbers of another kind than the model's."""
    for name, tensor in model.state_dict().items():
        if name in stored and tensor.is_floating_point() != (stored[name] in _FLOATS):
            raise CheckpointError(f"{source} holds {name} as {stored[name]}, expected {tensor.dtype}")


@contextmanager
def naming(source: Source, build: Callable[[], object]) -> Iterator[None]:
    """Within the context, what a library raises for damaged files becomes a CheckpointError that names `source`.

    build: makes the model without weights from its configuration alone. Where that fails too, the configuration is to
    blame; where it does not, and no weights were being read, what the caller gave, and the error stays what it is.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{source} holds weights that cannot be loaded: {error}") from error
    except Exception as error:
        try:
            with torch.device("meta"):
                build()
        except Exception as cause:  # the libraries raise many kinds, all of which mean the same here
            raise CheckpointError(f"{source}/config.json describes no model that can be built: {cause}") from error
        raise
