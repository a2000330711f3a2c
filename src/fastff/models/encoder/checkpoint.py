"""Strict reading of model directories: our own layout and the published one.

A published directory holds `config.json` with `model_type` "crammedBERT", or the flat `model_config.json`, beside
`model.safetensors` or `pytorch_model.bin`; `fastff.models.published` checks and renames its tensors.
Auto classes need a `config.json`; the model classes and `convert_published` read the flat layout too.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from fastff.errors import CheckpointError
from fastff.models.encoder.configuration import UltraFastBertConfig
from fastff.models.published.fields import MODEL_TYPE, OWN_CLASSES, is_published, translated
from fastff.models.published.tensors import class_of, state_of, vocab_size
from fastff.models.weight_files import (
    Source,
    check_dtypes,
    hub_options,
    locate,
    naming,
    read_object,
    stored_dtypes,
)

_HEADS = frozenset(
    f"{name}.{part}" for name in ("decoder", "pooler.dense", "classifier", "qa_outputs") for part in ("weight", "bias")
)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
)


def load(
    model_class: type[PreTrainedModel],
    transformers_load: Callable[..., Any],
    source: Source,
    *model_args: Any,
    config: Any = None,
    output_loading_info: bool = False,
    ignore_mismatched_sizes: bool = False,
    **kwargs: Any,
) -> Any:
    """Load a `model_class` through `transformers_load`, the `from_pretrained` it inherits, from either layout.

    Returns the model, or with output_loading_info the model and what Transformers reports. Raises CheckpointError.
    """
    hub = hub_options(kwargs)
    options: dict[str, Any] = {**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}
    config_file, content = _read_config(source, hub)
    saved_by: str | None
    if content is not None and is_published(content):
        saved_by, read_config, state = _read_published(source, content, hub)
        if saved_by != model_class.__name__:
            state = {name: tensor for name, tensor in state.items() if name not in _HEADS}
        if config is None:
            config = config_file
            options["vocab_size"] = read_config.vocab_size
        model, info = transformers_load(None, *model_args, config=config, state_dict=state, **options)
        model.name_or_path = model.config.name_or_path = str(source)
    else:
        saved_by, stored = _check_own(source, content, config), stored_dtypes(source, hub)
        with naming(source, lambda: model_class(config or UltraFastBertConfig.from_dict(content or {}))):
            model, info = transformers_load(source, *model_args, config=config, **options)
        check_dtypes(source, model, stored)
    _check_loaded(source, model, info, saved_by, ignore_mismatched_sizes)
    return (model, info) if output_loading_info else model


def convert_published(source: Source, target: Source) -> Path:
    """Write a published checkpoint, with its tokenizer files if it has any, as a directory in our own layout.

    source: a directory or a Hub name; target: a directory, made if needed. Returns the path of target.
    Raises CheckpointError, before anything is written, if source is not a published checkpoint or not a sound one.
    """
    _, content = _read_config(source, {})
    if content is None or not is_published(content):
        raise CheckpointError(f"{source} is not in the published layout, model_type {MODEL_TYPE!r}")
    class_name, config, state = _read_published(source, content, {})
    state.pop("decoder.weight", None)  # tied to the embedding
    config.architectures = [class_name]
    path = Path(target)
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(path)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    for name in _TOKENIZER_FILES:
        found = locate(source, name, {})
        if found is not None:
            shutil.copyfile(found, path / name)
    return path


def _read_config(source: Source, hub: dict[str, Any]) -> tuple[str | None, dict[str, Any] | None]:
    """Path and content of the configuration file, None if there is none."""
    path = locate(source, "config.json", hub) or locate(source, "model_config.json", hub)
    if path is None:
        return None, None
    return path, read_object(path)


def _check_own(source: Source, content: dict[str, Any] | None, config: Any) -> str | None:
    """The class that wrote a checkpoint in our own layout, None if it does not say."""
    if content is None:
        if config is None:
            raise CheckpointError(f"{source} holds neither config.json nor model_config.json")
        return None
    found, known = content.get("model_type"), UltraFastBertConfig.model_type
    if found != known:
        raise CheckpointError(f"{source} has model_type {found!r}, expected {known!r} or {MODEL_TYPE!r}")
    names = content.get("architectures") or [None]
    return str(names[0]) if isinstance(names, list) else None


def _read_published(
    source: Source, content: dict[str, Any], hub: dict[str, Any]
) -> tuple[str, UltraFastBertConfig, dict[str, Tensor]]:
    """The class of ours that a published checkpoint is for, its configuration and its tensors under our names."""
    state = _read_weights(source, hub)
    config = UltraFastBertConfig.from_dict(content)
    config.vocab_size = translated(content).get("vocab_size") or vocab_size(state)
    kind = class_of(state, content)
    with no_init_weights():  # the layers made on the way are overwritten: neither time nor random numbers for them
        own = state_of(state, config, kind)
    return OWN_CLASSES[kind], config, own


def _read_weights(source: Source, hub: dict[str, Any]) -> dict[str, Tensor]:
    path = locate(source, "model.safetensors", hub)
    read: Callable[[str], Any] = load_file
    if path is None:
        path, read = locate(source, "pytorch_model.bin", hub), _load_pickle
    if path is None:
        raise CheckpointError(f"{source} holds neither model.safetensors nor pytorch_model.bin")
    try:
        state = read(path)
    except Exception as error:  # a damaged pickle makes its reader fail in any way
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path} does not hold a dict of tensors")
    return state


def _load_pickle(path: str) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _check_loaded(
    source: Source, model: PreTrainedModel, info: dict[str, Any], saved_by: str | None, allow_mismatched: bool
) -> None:
    missing, unexpected, mismatched = info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"]
    own = set(model.state_dict())
    own_modules = {name.partition(".")[0] for name in own}
    foreign_heads = {name for name in _HEADS if name.partition(".")[0] not in own_modules}
    head = (own & _HEADS) - set(model.all_tied_weights_keys)
    mismatched = {entry[0]: entry[1:] for entry in mismatched}
    if saved_by != type(model).__name__:  # another class's head of the same name
        missing = missing | (mismatched.keys() & head)
        mismatched = {name: both for name, both in mismatched.items() if name not in head}
    starts_anew = head <= missing and saved_by != type(model).__name__
    problems = [
        *_named("missing", missing - head if starts_anew else missing),
        *_named("unexpected", unexpected - foreign_heads),
    ]
    if not allow_mismatched:
        shapes = {name: [tuple(shape) for shape in both] for name, both in mismatched.items()}
        problems += (f"{name} has shape {found}, expected {expected}" for name, (found, expected) in shapes.items())
    if problems:
        raise CheckpointError(f"{source} does not fit {type(model).__name__}: {'; '.join(problems)}")


def _named(what: str, names: Iterable[str]) -> list[str]:
    listed = sorted(names)
    return [f"{what} {', '.join(listed)}"] if listed else []
