"""Configuration of UltraFastBERT models, and the reading of the published one (`model_type` "crammedBERT")."""

# Transformers' own methods are not typed.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import os
from typing import Any, Self

from transformers import PreTrainedConfig

from fastff.errors import CheckpointError, ShapeError
from fastff.models.feedforward import build_feedforward, complete
from fastff.models.published.fields import MODEL_TYPE, is_published, translated

MOST_LAYERS, MOST = 2**16, 2**24  # of layers, and of any other size: a damaged number must not take all memory
POOLERS = ("masked_avg", "avg", "zero_index")
FEEDFORWARD_INITS = ("published", "fan_in")


class UltraFastBertConfig(PreTrainedConfig):
    """Everything about an UltraFastBERT model but its weights; an ordinary Transformers configuration.

    vocab_size, hidden_size, num_hidden_layers, num_attention_heads, max_position_embeddings  sizes; the defaults are
                        the published 16 layers of width 768 for sequences of 128 tokens
    feedforward         a description (`fastff.models.feedforward`), the same for all layers, or a list of one per layer
    feedforward_init    "published": conditional layers start from N(0, initializer_range), biases zero, as dense layers
                        do; "fan_in": as `FFF.reset_parameters` says, louder, which learnt worse wherever measured
    initializer_range   standard deviation of all other weights at the start
    hidden_dropout_prob, attention_probs_dropout_prob, embedding_dropout, classifier_dropout  probabilities in [0, 1)
    attention_bias      biases in the attention's projections; qkv_bias overrides it for query, key and value
    decoder_bias        a bias in the masked-language-model decoder
    tie_word_embeddings the decoder's weight is the word embedding
    sparse_prediction   in training mode with labels, compute the logits of the labelled positions only
    pooler              what a sequence classifier reads: "masked_avg", the mean over the unpadded positions; "avg",
                        over all positions, padding included, as published; "zero_index", the first position
    head_dim            width of the pooler's output
    is_decoder          attention looks to the left only, as UltraFastBertForCausalLM needs

    Raises ShapeError (a ValueError) for a size and ValueError for another value out of range.
    """

    model_type = "ultrafastbert"

    vocab_size: int = 32768
    hidden_size: int = 768
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    max_position_embeddings: int = 128
    feedforward: dict[str, Any] | list[dict[str, Any]] | None = None
    feedforward_init: str = "published"
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    embedding_dropout: float = 0.1
    classifier_dropout: float = 0.1
    attention_bias: bool = False
    qkv_bias: bool | None = None
    decoder_bias: bool = False
    tie_word_embeddings: bool = True
    sparse_prediction: bool = False
    pooler: str = "masked_avg"
    head_dim: int = 1024
    is_decoder: bool = False
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.feedforward is None:
            self.feedforward = {"kind": "fff", "depth": 11}
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raise if a value is out of range; write the defaults of `feedforward` out. A model calls it when built."""
        self._check_sizes()
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "embedding_dropout", "classifier_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} {getattr(self, name)} is not in [0, 1)")
        for name in ("initializer_range", "layer_norm_eps"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} {getattr(self, name)} is not a positive finite number")
        for name, allowed in (("pooler", POOLERS), ("feedforward_init", FEEDFORWARD_INITS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        self._check_feedforward()

    def _check_sizes(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings", "head_dim")
        for name, least in (*((size, 1) for size in (*sizes, "num_labels")), ("num_hidden_layers", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ShapeError(f"{name} {value!r} is not an integer of at least {least}")
            most = MOST_LAYERS if name == "num_hidden_layers" else MOST
            if value > most:
                raise ShapeError(f"{name} {value} is more than {most}")
        if self.hidden_size % self.num_attention_heads:
            raise ShapeError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_size % 2:
            raise ShapeError(f"hidden_size {self.hidden_size} is not even, which the sinusoidal positions need")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ShapeError(f"pad_token_id {self.pad_token_id} is not in [0, vocab_size {self.vocab_size})")

    def _check_feedforward(self) -> None:
        if isinstance(self.feedforward, list):
            if len(self.feedforward) != self.num_hidden_layers:
                raise ShapeError(
                    f"feedforward has {len(self.feedforward)} entries, expected num_hidden_layers "
                    f"{self.num_hidden_layers}"
                )
            self.feedforward = [complete(description) for description in self.feedforward]
        else:
            self.feedforward = complete(self.feedforward or {})
        for description in self.feedforward if isinstance(self.feedforward, list) else [self.feedforward]:
            build_feedforward(description, self.hidden_size, device="meta")

    def feedforward_of(self, layer: int) -> dict[str, Any]:
        """The description of one layer's feedforward, defaults written out."""
        description = self.feedforward[layer] if isinstance(self.feedforward, list) else self.feedforward
        return dict(description or {})

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in Transformers; a published configuration comes back translated. Raises CheckpointError."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return _own(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """As in Transformers; a published configuration is translated. Raises CheckpointError."""
        try:
            return super().from_dict(_own(config_dict), **kwargs)
        except CheckpointError:
            raise
        except Exception as error:  # values of any type are compared, and all failures mean the same here
            raise CheckpointError(f"configuration that no model fits: {error}") from error


class CrammedBertConfig(UltraFastBertConfig):
    """What `AutoConfig` finds for the published `model_type`; reading it gives an UltraFastBertConfig."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return UltraFastBertConfig.from_dict(config_dict, **kwargs)


def _own(content: dict[str, Any]) -> dict[str, Any]:
    """A configuration file's content, translated if it is a published one. Raises CheckpointError."""
    if not is_published(content):
        return content
    try:
        arguments = translated(content)
        UltraFastBertConfig(**arguments)
    except CheckpointError:
        raise
    except Exception as error:  # values of any type are compared, and all failures mean the same here
        raise CheckpointError(f"published configuration that no model fits: {error}") from error
    return arguments
