"""Models of foreign architectures in which some feedforward layers are replaced.

A directory written here holds `config.json` with model_type "fastff-converted": the original configuration and, per
block, the description of its new feedforward (`fastff.models.feedforward`) or null where the dense layer stayed. After
`import fastff.models` the Auto classes load it: the result is the original Transformers class with other layers inside,
so generation, heads and pooling work as before. For those who did not import it, `fastff_models.py` does, if they pass
`trust_remote_code=True`, which Transformers' error then asks for.
"""

# Transformers' own methods are not typed.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from fastff.conditional import ConditionalFeedforward
from fastff.errors import CheckpointError
from fastff.layers import FFF
from fastff.models.families import family_of
from fastff.models.feedforward import ConvertedFeedforward
from fastff.models.int8_files import has_int8, read_int8, remove_int8
from fastff.models.weight_files import check_dtypes, hub_options, naming, stored_dtypes
from fastff.routers import Router

# Of the arguments of from_pretrained these are the model's own, whatever its configuration.
LOADING = ("dtype", "torch_dtype", "attn_implementation", "name_or_path", "return_unused_kwargs")
# What tools ask the configuration of any transformer; the original one answers.
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
_NOT_INT8 = {"device_map", "quantization_config", "state_dict"}  # arguments that 8-bit files do not load with
_LOADER = "fastff_models"
_LOADER_SOURCE = """# The classes of this model, for trust_remote_code=True; `import fastff.models` does the same.
from fastff.models.converted import *
"""


class ConvertedConfig(PreTrainedConfig):
    """The original configuration (`base`, a dict with its model_type) and `feedforwards`, one entry per block."""

    model_type = "fastff-converted"
    has_no_defaults_at_init = True

    base: dict[str, Any] | None = None
    feedforwards: list[dict[str, Any] | None] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.base is None:
            return  # Transformers makes an empty configuration to find what differs from the defaults
        if not isinstance(self.feedforwards, list | tuple | None):
            raise CheckpointError(f"'feedforwards' {self.feedforwards!r} is not a list")
        width = _original(self.base).hidden_size
        for description in self.feedforwards or ():
            if description is not None:
                ConvertedFeedforward(description, width, device="meta")

    def __getattr__(self, name: str) -> Any:
        if name not in _SIZES or self.__dict__.get("base") is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.base_config(), name)

    def base_config(self) -> PreTrainedConfig:
        """The original configuration as an object, with the descriptions in `fastff_feedforwards`.

        Raises CheckpointError for one that does not describe a model with as many blocks."""
        if self.base is None or self.feedforwards is None:
            raise CheckpointError("a converted model's configuration needs 'base' and 'feedforwards'")
        config: PreTrainedConfig = _original(self.base)
        blocks = getattr(config, "num_hidden_layers", None)
        if blocks != len(self.feedforwards):
            raise CheckpointError(f"{len(self.feedforwards)} feedforward descriptions for {blocks} blocks")
        config.fastff_feedforwards = self.feedforwards
        if self._attn_implementation is not None:
            config._attn_implementation = self._attn_implementation
        return config

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: a saved directory names its loader anyway, and this class's own source is not to be copied."""

    @classmethod
    def _made(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        make: Callable[..., Self] = super().from_dict
        try:
            return make(config_dict, **kwargs)
        except CheckpointError:
            raise
        except Exception as error:  # values of any type are compared, and all failures mean the same here
            raise CheckpointError(f"configuration that no converted model fits: {error}") from error

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """As in Transformers; what the original configuration has, such as num_labels, is set there."""
        made = cls._made
        base = config_dict.get("base")
        if base is None:
            return made(config_dict, **kwargs)
        original = _original(base)
        given = {name: kwargs[name] for name in kwargs if name not in LOADING and hasattr(original, name)}
        if not given:
            return made(config_dict, **kwargs)
        for name, value in given.items():
            setattr(original, name, value)
        empty = cls()
        rest = {name: value for name, value in kwargs.items() if name not in given or hasattr(empty, name)}
        return made({**config_dict, "base": original.to_dict()}, **rest)


def _original(base: Any) -> Any:
    """The configuration of a foreign architecture. Raises CheckpointError."""
    if not isinstance(base, dict):
        raise CheckpointError(f"'base' {base!r} is not a dict")
    family_of(base.get("model_type", ""))
    try:
        return AutoConfig.for_model(**base)
    except Exception as error:  # each architecture checks in its own way, and all mean the same here
        raise CheckpointError(f"'base' of a converted model's configuration describes no model: {error}") from error


class _Converted:
    """Mixed into the original class: builds it, swaps the layers, and saves the configuration above."""

    config: Any

    def __init__(self, config: PreTrainedConfig, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)  # type: ignore[call-arg]
        swap(self, config.fastff_feedforwards)  # type: ignore[arg-type]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FFF):
            module.reset_parameters()
            module.reset_usage()
        elif isinstance(module, ConditionalFeedforward):
            module.reset_leaves()
        elif isinstance(module, Router):
            module.reset_parameters()
        elif isinstance(module, ConvertedFeedforward):
            nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """As in Transformers, whatever the original class makes of its own checkpoints."""
        load: Any = PreTrainedModel.from_pretrained
        return load.__func__(cls, *arguments, **options)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **options: Any
    ) -> None:
        super().save_pretrained(save_directory, is_main_process=is_main_process, **options)  # type: ignore[misc]
        if is_main_process:
            remove_int8(save_directory)
            self._write_configuration(save_directory)

    def _upload_modified_files(self, working_dir: str | os.PathLike[str], *arguments: Any, **options: Any) -> Any:
        # Called within save_pretrained(push_to_hub=True): the hub, too, gets the configuration of a converted model.
        self._write_configuration(working_dir)
        return super()._upload_modified_files(working_dir, *arguments, **options)  # type: ignore[misc]

    def _write_configuration(self, folder: str | os.PathLike[str]) -> None:
        if Path(folder, "config.json").exists():  # PEFT's format saves adapters alone
            converted_config(self.config, original_class(self)).save_pretrained(folder)
            Path(folder, f"{_LOADER}.py").write_text(_LOADER_SOURCE)

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made in each process from the original one, which can be imported.
        return _empty, (_original_type(self),), self.__dict__


def _empty(original: type) -> Any:
    converted: Any = _class_for(original)
    return converted.__new__(converted)


def _original_type(model: object) -> type:
    return next(c for c in type(model).__mro__ if c.__module__ != __name__)


def original_class(model: object) -> str:
    """Name of the class, without the layers swapped, that a (converted or not) model is."""
    return _original_type(model).__name__


def converted_config(config: PreTrainedConfig, architecture: str) -> ConvertedConfig:
    """The configuration to save, from that of a live converted model."""
    base = config.to_dict()
    feedforwards = base.pop("fastff_feedforwards")
    base["architectures"] = [architecture]
    made = ConvertedConfig(base=base, feedforwards=feedforwards, architectures=[architecture])
    classes: dict[str, type] = {"AutoConfig": ConvertedConfig, **AUTO_CLASSES}
    made.auto_map = {name: f"{_LOADER}.{found.__name__}" for name, found in classes.items()}
    return made


def swap(model: nn.Module, descriptions: Sequence[Mapping[str, Any] | None]) -> None:
    """Put fresh layers into a model, in place. Raises CheckpointError if there is not one description a block."""
    config: Any = model.config
    family = family_of(config.model_type)
    blocks = family.blocks_of(model)
    if len(blocks) != len(descriptions):
        raise CheckpointError(f"{len(descriptions)} feedforward descriptions for {len(blocks)} blocks")
    for block, description in zip(blocks, descriptions, strict=True):
        if description is not None:
            family.put(block, ConvertedFeedforward(description, config.hidden_size))


def make_converted(model: PreTrainedModel, descriptions: Sequence[Mapping[str, Any] | None]) -> PreTrainedModel:
    """A converted copy of a live model, with fresh layers where a description is not None and its weights elsewhere."""
    config = copy.deepcopy(model.config)
    config.fastff_feedforwards = [None if d is None else dict(d) for d in descriptions]
    weights = model.state_dict()
    if any(tensor.is_meta for tensor in weights.values()):
        raise CheckpointError("weights of the model are on meta, not in memory: load it without offloading")
    converted: Any = _class_for(type(model))(config)
    converted.load_state_dict(weights, strict=False)  # the dense layers' own tensors are left over
    if getattr(model, "generation_config", None) is not None:
        converted.generation_config = copy.deepcopy(model.generation_config)
    moved: PreTrainedModel = converted.to(device=model.device, dtype=model.dtype).train(model.training)
    return moved


_classes: dict[type, type] = {}


def _class_for(original: type) -> type:
    if issubclass(original, _Converted):
        return original
    if original not in _classes:
        _classes[original] = type(f"Converted{original.__name__}", (_Converted, original), {})
    return _classes[original]


class _AutoConverted:
    """What the Auto classes find for a ConvertedConfig; makes an object of the original class with swapped layers."""

    config_class = ConvertedConfig
    auto: ClassVar[Any]

    @classmethod
    def _class_of(cls, config: PreTrainedConfig) -> Any:
        try:
            return _class_for(cls.auto._model_mapping[type(config)])
        except KeyError as error:
            raise CheckpointError(f"{config.model_type} has no {cls.auto.__name__}") from error

    @classmethod
    def _from_config(cls, config: ConvertedConfig, **options: Any) -> Any:
        base = config.base_config()
        return cls._class_of(base)._from_config(base, **options)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *arguments: Any, **options: Any) -> Any:
        """As in Transformers, but strict: a head that the directory does not have at all starts anew. Any other missing
        or (unless ignore_mismatched_sizes=True) misshapen tensor and a damaged file raise CheckpointError."""
        config = options.pop("config", None) or ConvertedConfig.from_pretrained(path)
        base = config.base_config()
        wants_info = options.pop("output_loading_info", False)
        made = cls._class_of(base)
        if has_int8(path):
            return _from_int8(made, Path(path), base, options, wants_info)
        stored = stored_dtypes(path, hub_options(options))
        with naming(path, lambda: made._from_config(copy.deepcopy(base))):
            model, info = made.from_pretrained(path, *arguments, config=base, output_loading_info=True, **options)
        saved_by = (config.architectures or [None])[0]
        missing = _wrongly_missing(model, info["missing_keys"], original_class(model) == saved_by)
        if missing:
            raise CheckpointError(f"missing tensor {', '.join(missing)} in {path}")
        check_dtypes(path, model, stored)
        return (model, info) if wants_info else model

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing, as in ConvertedConfig."""


def _from_int8(made: Any, folder: Path, base: Any, options: dict[str, Any], wants_info: bool) -> Any:
    """A model from 8-bit weights. Of from_pretrained's arguments the dtype is heard; some are refused."""
    refused = sorted(_NOT_INT8 & {name for name, value in options.items() if value is not None})
    if refused:
        raise CheckpointError(f"{folder} holds 8-bit weights, which load without {', '.join(refused)}")
    model = made._from_config(copy.deepcopy(base))
    wrong, unexpected = load_tensors(model, read_int8(folder), folder)
    if wrong:
        raise CheckpointError(f"missing tensor {', '.join(wrong)} in {folder}")
    dtype = options.get("dtype") or options.get("torch_dtype")
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    model = model.eval() if dtype in (None, "auto") else model.to(dtype).eval()
    return (model, {"missing_keys": set(), "unexpected_keys": set(unexpected)}) if wants_info else model


def load_tensors(model: Any, tensors: Mapping[str, Tensor], source: Path) -> tuple[list[str], list[str]]:
    """Put tensors into a model of Transformers. Returns the names that it lacks still, those tied to others apart, and
    those that it has no place for. Raises CheckpointError for shapes that are not its own; source: named in it."""
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{source} holds tensors of another shape: {error}") from error
    model.tie_weights()
    return sorted(set(missing) - set(model.all_tied_weights_keys)), list(unexpected)


def _wrongly_missing(model: Any, missing: Collection[str], same_class: bool) -> list[str]:
    """Tensors that should have been in a directory: all, but a head or a pooler of which it has nothing, when another
    class wrote it."""
    prefix = f"{model.base_model_prefix}."
    parts: dict[str, list[str]] = {}
    for name in model.state_dict():
        inside = name.removeprefix(prefix)
        head = not name.startswith(prefix) and model is not model.base_model
        parts.setdefault("head" if head else "pooler" if inside.startswith("pooler.") else "body", []).append(name)
    anew: set[str] = set()
    for part in ("head", "pooler"):
        names = set(parts.get(part, ())) - set(model.all_tied_weights_keys)
        if names <= set(missing) and not same_class:
            anew |= names
    return sorted(set(missing) - anew)


class ConvertedModel(_AutoConverted):
    auto = AutoModel


class ConvertedForMaskedLM(_AutoConverted):
    auto = AutoModelForMaskedLM


class ConvertedForCausalLM(_AutoConverted):
    auto = AutoModelForCausalLM


class ConvertedForSequenceClassification(_AutoConverted):
    auto = AutoModelForSequenceClassification


class ConvertedForTokenClassification(_AutoConverted):
    auto = AutoModelForTokenClassification


class ConvertedForQuestionAnswering(_AutoConverted):
    auto = AutoModelForQuestionAnswering


class ConvertedForMultipleChoice(_AutoConverted):
    auto = AutoModelForMultipleChoice


class ConvertedForImageClassification(_AutoConverted):
    auto = AutoModelForImageClassification


AUTO_CLASSES: dict[str, type[_AutoConverted]] = {c.auto.__name__: c for c in _AutoConverted.__subclasses__()}


def register() -> None:
    """Make the Auto classes know converted models."""
    AutoConfig.register(ConvertedConfig.model_type, ConvertedConfig)
    for found in AUTO_CLASSES.values():
        found.auto.register(ConvertedConfig, found)
