"""The UltraFastBERT encoder: pre-norm, scaled sinusoidal positions, any layer of `fastff.models.feedforward`.

Shapes  input_ids (batch, seq_len) int64, hidden states (batch, seq_len, hidden_size).
Source  Belcak & Wattenhofer 2023, arXiv:2311.10770; Geiping & Goldstein 2022, arXiv:2212.14034 (the cramming recipe).
"""

# Transformers' own methods and decorators are not typed.
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple

from fastff.conditional import ConditionalFeedforward
from fastff.errors import ShapeError
from fastff.layers import FFF
from fastff.models.encoder import checkpoint
from fastff.models.encoder.configuration import UltraFastBertConfig
from fastff.models.feedforward import ConvertedFeedforward, build_feedforward
from fastff.routers import Router


def sinusoids(length: int, width: int) -> Tensor:
    """Positions (length, width): even columns sine, odd columns cosine, of position / 10000**(column / width).

    In float32 as in the published models, whose weights were trained against these roundings.
    """
    position = torch.arange(length, dtype=torch.float32).unsqueeze(1)
    angle = position * torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(10000.0) / width))
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out. query, key, value (batch, heads, seq_len, head width); attention_mask is added to scores.

    Returns the output (batch, seq_len, heads, head width) and the weights (batch, heads, seq_len, seq_len).
    """
    scores = query @ key.transpose(-2, -1) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class Embeddings(nn.Module):
    """Word embedding plus scaled positions, normalised."""

    word_embeddings: nn.Module
    position_table: Tensor

    def __init__(self, config: UltraFastBertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_scale = nn.Parameter(torch.empty(1))
        table = sinusoids(config.max_position_embeddings, config.hidden_size)
        self.register_buffer("position_table", table, persistent=False)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.embedding_dropout)

    def forward(self, words: Tensor) -> Tensor:
        """words (batch, seq_len, hidden_size) to the same shape. Raises ShapeError for too many positions."""
        length, longest = words.shape[1], self.position_table.shape[0]
        if length > longest:
            raise ShapeError(f"length {length} is more than max_position_embeddings {longest}")
        positions = (self.position_scale * self.position_table[:length]).to(words.dtype)
        embedded: Tensor = self.dropout(self.norm(words + positions))
        return embedded


class Attention(nn.Module):
    """Multi-head self-attention, over both directions unless `config.is_decoder`.

    `qkv.weight` holds all q rows, all k rows, all v rows.
    """

    def __init__(self, config: UltraFastBertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.is_causal = config.is_decoder
        self.heads = config.num_attention_heads
        self.scaling = (width // self.heads) ** -0.5
        self.dropout = config.attention_probs_dropout_prob
        qkv_bias = config.attention_bias if config.qkv_bias is None else config.qkv_bias
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.output = nn.Linear(width, width, bias=config.attention_bias)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """hidden (batch, seq_len, hidden_size); mask as the attention implementation wants it, or None.

        Returns the output, shaped like hidden, and the attention weights if the implementation has them.
        """
        qkv = self.qkv(hidden).unflatten(-1, (3, self.heads, -1))
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        context, weights = attend(self, query, key, value, mask, dropout=dropout, scaling=self.scaling)
        return self.output(context.flatten(2)), weights


class Layer(GradientCheckpointingLayer):
    """One block: attention, then feedforward, each normalised before and added to what came in."""

    def __init__(self, config: UltraFastBertConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.feedforward = build_feedforward(config.feedforward_of(index), config.hidden_size)
        if self.feedforward is not None:
            self.feedforward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """hidden (batch, seq_len, hidden_size) to the same shape, and the attention weights if there are any."""
        attended, weights = self.attention(self.attention_norm(hidden), mask)
        hidden = hidden + self.dropout(attended)
        if self.feedforward is not None:
            hidden = hidden + self.dropout(self.feedforward(self.feedforward_norm(hidden)))
        return hidden, weights


class UltraFastBertPreTrainedModel(PreTrainedModel):
    """What the models share: initialisation and strict loading."""

    config: UltraFastBertConfig
    config_class = UltraFastBertConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Embeddings", "Layer"]  # noqa: RUF012

    def __init__(self, config: UltraFastBertConfig, *inputs: Any, **kwargs: Any) -> None:
        config.check()
        super().__init__(config, *inputs, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FFF):
            if self.config.feedforward_init == "fan_in":
                module.reset_parameters()
            else:
                self._init_published(module)
            module.reset_usage()
        elif isinstance(module, ConditionalFeedforward):
            module.reset_leaves()
        elif isinstance(module, Router):
            module.reset_parameters()
        elif isinstance(module, ConvertedFeedforward):
            initialization.zeros_(module.bias)
        elif isinstance(module, Embeddings):
            initialization.constant_(module.position_scale, self.config.hidden_size**-0.5)
            initialization.copy_(module.position_table, sinusoids(*module.position_table.shape))
        else:
            super()._init_weights(module)

    def _init_published(self, layer: FFF) -> None:
        for weight in (layer.w_in, layer.w_out):
            initialization.normal_(weight, std=self.config.initializer_range)
        for bias in (layer.b_in, layer.b_out):
            if bias is not None:
                initialization.zeros_(bias)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *model_args: Any, **kwargs: Any
    ) -> Self:
        """As in Transformers, and also from the published layout of pbelcak/UltraFastBERT-1x11-long; but strict.

        A head that the checkpoint does not have at all starts anew, and the head of another task is dropped. Any other
        missing, extra or misshapen tensor (unless ignore_mismatched_sizes=True), a file that cannot be read and an
        unknown layout raise CheckpointError.
        """
        load: Callable[..., Self] = super().from_pretrained
        if pretrained_model_name_or_path is None:
            return load(None, *model_args, **kwargs)
        model: Self = checkpoint.load(cls, load, pretrained_model_name_or_path, *model_args, **kwargs)
        return model


class UltraFastBertModel(UltraFastBertPreTrainedModel):
    """The encoder. Raises ShapeError or ValueError from its configuration."""

    def __init__(self, config: UltraFastBertConfig) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput:
        """Hidden states (batch, seq_len, hidden_size) of input_ids (batch, seq_len) int64.

        attention_mask   (batch, seq_len), 0 where a position is padding; None is the fast path without a mask
        token_type_ids   accepted, because tokenizers give them, and not used: the model has no segments
        inputs_embeds    (batch, seq_len, hidden_size), in place of input_ids
        output_hidden_states  also return the embedding, each layer's output and, last, the normalised output
        output_attentions     also return each layer's weights (batch, heads, seq_len, seq_len); needs
                              attn_implementation="eager"

        Raises ShapeError for a mask of another shape or too many positions, ValueError for inputs that contradict.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        words = self.embeddings.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is not None and attention_mask.shape != words.shape[:2]:
            raise ShapeError(f"attention_mask {tuple(attention_mask.shape)} is not {tuple(words.shape[:2])}")
        keep_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keep_weights = self.config.output_attentions if output_attentions is None else output_attentions
        if keep_weights and self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions needs attn_implementation 'eager', got {self.config._attn_implementation!r}"
            )

        hidden = self.embeddings(words)
        mask = self._mask(hidden, attention_mask)
        states, attentions = [hidden], []
        for layer in self.layers:
            hidden, weights = layer(hidden, mask)
            states.append(hidden)
            attentions.append(weights)
        hidden = self.final_norm(hidden)
        return BaseModelOutput(
            last_hidden_state=hidden,
            hidden_states=(*states[: len(self.layers)], hidden) if keep_states else None,
            attentions=tuple(attentions) if keep_weights else None,
        )

    def _mask(self, hidden: Tensor, attention_mask: Tensor | None) -> Any:
        """What the attention implementation wants to know beside the model's direction; None where that is all.

        Transformers leaves a mask out by itself where nothing is padded, but in some releases (5.17) never while a
        model is compiled; flash attention takes none.
        """
        if attention_mask is None and self.config._attn_implementation == "sdpa":
            return None
        if self.config.is_decoder:
            return create_causal_mask(self.config, hidden, attention_mask, None)
        return create_bidirectional_mask(self.config, hidden, attention_mask)
