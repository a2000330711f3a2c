"""Models of foreign architectures in which some feedforward layers are replaced.

A directory written here holds `config.json` with model_type "fastff-converted": the original configuration and, per
block, the description of its new feedforward (`fastff.models.feedforward`) or null where the dense layer stayed. After
`import fastff.models` the Auto classes load it: the result is the original Transformers class with other layers inside,
so generation, heads and pooling work as before.
"""

# Transformers' own methods are not typed.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from fastff.errors import CheckpointError
from fastff.layers import FFF
from fastff.models.families import family_of
from fastff.models.feedforward import ConvertedFeedforward, complete, split_shared

# Of the arguments of from_pretrained these are the model's own, whatever its configuration.
LOADING = ("dtype", "torch_dtype", "attn_implementation", "name_or_path", "return_unused_kwargs")


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
        family_of(self.base.get("model_type", ""))
        for description in self.feedforwards or ():
            if description is not None:
                complete(split_shared(description)[0])

    def base_config(self) -> PreTrainedConfig:
        """The original configuration as an object, with the descriptions in `fastff_feedforwards`."""
        if self.base is None or self.feedforwards is None:
            raise CheckpointError("a converted model's configuration needs 'base' and 'feedforwards'")
        config = AutoConfig.for_model(**self.base)
        config.fastff_feedforwards = self.feedforwards
        if self._attn_implementation is not None:
            config._attn_implementation = self._attn_implementation
        return config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """As in Transformers; what the original configuration has, such as num_labels, is set there."""
        made: Callable[..., Self] = super().from_dict
        base = config_dict.get("base")
        if base is None:
            return made(config_dict, **kwargs)
        family_of(base.get("model_type", ""))
        original = AutoConfig.for_model(**base)
        given = {name: kwargs[name] for name in kwargs if name not in LOADING and hasattr(original, name)}
        if not given:
            return made(config_dict, **kwargs)
        for name, value in given.items():
            setattr(original, name, value)
        empty = cls()
        rest = {name: value for name, value in kwargs.items() if name not in given or hasattr(empty, name)}
        return made({**config_dict, "base": original.to_dict()}, **rest)


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
        elif isinstance(module, ConvertedFeedforward):
            nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """As in Transformers, whatever the original class makes of its own checkpoints."""
        load: Any = PreTrainedModel.from_pretrained
        return load.__func__(cls, *arguments, **options)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        super().save_pretrained(save_directory, **options)  # type: ignore[misc]
        converted_config(self.config, original_class(self)).save_pretrained(save_directory)


def original_class(model: object) -> str:
    """Name of the class, without the layers swapped, that a (converted or not) model is."""
    return next(c.__name__ for c in type(model).__mro__ if c.__module__ != __name__)


def converted_config(config: PreTrainedConfig, architecture: str) -> ConvertedConfig:
    """The configuration to save, from that of a live converted model."""
    base = config.to_dict()
    feedforwards = base.pop("fastff_feedforwards")
    base["architectures"] = [architecture]
    return ConvertedConfig(base=base, feedforwards=feedforwards, architectures=[architecture])


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
    converted: Any = _class_for(type(model))(config)
    converted.load_state_dict(model.state_dict(), strict=False)  # the dense layers' own tensors are left over
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
        """As in Transformers. Raises CheckpointError if a replaced layer's tensor is missing."""
        config = options.pop("config", None) or ConvertedConfig.from_pretrained(path)
        base = config.base_config()
        wants_info = options.pop("output_loading_info", False)
        model, info = cls._class_of(base).from_pretrained(
            path, *arguments, config=base, output_loading_info=True, **options
        )
        layers = {name for name, module in model.named_modules() if isinstance(module, ConvertedFeedforward)}
        missing = sorted(key for key in info["missing_keys"] if any(key.startswith(f"{name}.") for name in layers))
        if missing:
            raise CheckpointError(f"missing tensor {', '.join(missing)} in {path}")
        return (model, info) if wants_info else model


class ConvertedModel(_AutoConverted):
    auto = AutoModel


class ConvertedForMaskedLM(_AutoConverted):
    auto = AutoModelForMaskedLM


class ConvertedForCausalLM(_AutoConverted):
    auto = AutoModelForCausalLM


class ConvertedForSequenceClassification(_AutoConverted):
    auto = AutoModelForSequenceClassification


def register() -> None:
    """Make the Auto classes know converted models."""
    AutoConfig.register(ConvertedConfig.model_type, ConvertedConfig)
    for found in (ConvertedModel, ConvertedForMaskedLM, ConvertedForCausalLM, ConvertedForSequenceClassification):
        found.auto.register(ConvertedConfig, found)
