"""Heads of UltraFastBERT models: language modelling in both ways, classes of a sequence or of tokens, spans.

Every forward takes what UltraFastBertModel.forward takes, `labels` (or positions) and `loss_options`, which are what
Transformers' loss functions take, such as num_items_in_batch. The loss is None without labels.
"""

# Transformers' own methods and decorators are not typed.
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import (
    CausalLMOutput,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from fastff.models.encoder.configuration import UltraFastBertConfig
from fastff.models.encoder.modeling import UltraFastBertModel, UltraFastBertPreTrainedModel


class Pooler(nn.Module):
    """One vector (batch, head_dim) for a sequence; `config.pooler` says of which positions."""

    def __init__(self, config: UltraFastBertConfig) -> None:
        super().__init__()
        self.kind = config.pooler
        self.dense = nn.Linear(config.hidden_size, config.head_dim)
        self.dropout = nn.Dropout(config.classifier_dropout)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """hidden (batch, seq_len, hidden_size), attention_mask (batch, seq_len) or None."""
        if self.kind == "zero_index":
            pooled = hidden[:, 0]
        elif self.kind == "avg" or attention_mask is None:
            pooled = hidden.mean(1)
        else:
            kept = attention_mask.to(hidden.dtype).unsqueeze(-1)
            pooled = (hidden * kept).sum(1) / kept.sum(1).clamp(min=1)
        vector: Tensor = self.dropout(self.dense(pooled).tanh())
        return vector


class _WithHead(UltraFastBertPreTrainedModel):
    """The encoder under `encoder`, and what a subclass computes of its hidden states."""

    _output: Any

    def __init__(self, config: UltraFastBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels or 0
        self.encoder = UltraFastBertModel(config)

    def logits(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The head's scores of hidden states (batch, seq_len, hidden_size)."""
        raise NotImplementedError

    def _loss(self, logits: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    def _labelled(self, hidden: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The positions that the head reads, and their labels."""
        return hidden, labels

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **loss_options: Any,
    ) -> Any:
        """Logits and, with labels, the loss; their shapes are the class's."""
        encoded = self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        hidden, labels = self._labelled(encoded.last_hidden_state, labels)
        logits = self.logits(hidden, attention_mask)
        loss = None if labels is None else self._loss(logits, labels, loss_options)
        return self._output(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )


class _WithDecoder(_WithHead):
    """The encoder with a decoder tied to the word embedding, without head transform.

    labels  (batch, seq_len) int64, -100 where nothing counts. A masked-word model predicts each at its place; a causal
            one shifts by one here, so that labels are usually input_ids themselves. The loss is the mean cross-entropy
            in nats.

    logits are (batch, seq_len, vocab_size); of a masked-word model with config.sparse_prediction, in training mode and
    with labels, they are (labelled positions, vocab_size), in the order of the flattened labels.
    """

    _tied_weights_keys = {"decoder.weight": "encoder.embeddings.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: UltraFastBertConfig) -> None:
        super().__init__(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=config.decoder_bias)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.decoder = new_embeddings

    def logits(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        scores: Tensor = self.decoder(hidden)
        return scores

    def _loss(self, logits: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
        loss: Tensor = self.loss_function(logits, labels, self.config.vocab_size, **options)
        return loss


class UltraFastBertForMaskedLM(_WithDecoder):
    """The encoder with a decoder that fills in masked words. Raises ValueError for `config.is_decoder`."""

    _output = MaskedLMOutput

    def __init__(self, config: UltraFastBertConfig) -> None:
        if config.is_decoder:
            raise ValueError("is_decoder True is for UltraFastBertForCausalLM; a masked-word model needs False")
        super().__init__(config)

    def _labelled(self, hidden: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if labels is None or not (self.training and self.config.sparse_prediction):
            return hidden, labels
        chosen = labels != -100
        return hidden[chosen], labels[chosen]


class UltraFastBertForCausalLM(_WithDecoder):
    """The stack as a left-to-right language model. Raises ValueError unless `config.is_decoder`.

    It keeps no cache of keys and values and does not generate: it is here to train and to score.
    """

    _output = CausalLMOutput

    def __init__(self, config: UltraFastBertConfig) -> None:
        if not config.is_decoder:
            raise ValueError("is_decoder False is for a masked-word model; UltraFastBertForCausalLM needs True")
        super().__init__(config)


class UltraFastBertForSequenceClassification(_WithHead):
    """The encoder with a pooler and a linear classifier (or, with one label, a regressor): logits (batch, num_labels).

    labels  (batch,) float for one label: mean squared error; (batch,) int64 classes: cross-entropy;
            (batch, num_labels) float: binary cross-entropy. config.problem_type, when set, decides.
    """

    _output = SequenceClassifierOutput

    def __init__(self, config: UltraFastBertConfig) -> None:
        super().__init__(config)
        self.pooler = Pooler(config)
        self.classifier = nn.Linear(config.head_dim, self.num_labels)
        self.post_init()

    def logits(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        scores: Tensor = self.classifier(self.pooler(hidden, attention_mask))
        return scores

    def _loss(self, logits: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
        loss: Tensor = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **options)
        return loss


class UltraFastBertForTokenClassification(_WithHead):
    """The encoder with a linear classifier of every token: logits (batch, seq_len, num_labels).

    labels  (batch, seq_len) int64 classes, -100 where nothing counts: cross-entropy.
    """

    _output = TokenClassifierOutput

    def __init__(self, config: UltraFastBertConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    def logits(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        scores: Tensor = self.classifier(self.dropout(hidden))
        return scores

    def _loss(self, logits: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
        loss: Tensor = self.loss_function(logits, labels, self.config, **options)
        return loss


class UltraFastBertForQuestionAnswering(UltraFastBertPreTrainedModel):
    """The encoder with a linear layer that scores every token as the first and as the last of the answer."""

    def __init__(self, config: UltraFastBertConfig) -> None:
        super().__init__(config)
        self.encoder = UltraFastBertModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **options: Any,
    ) -> QuestionAnsweringModelOutput:
        """start_logits and end_logits (batch, seq_len) and, with positions (batch,) int64, the mean of both
        cross-entropies. options: output_hidden_states and output_attentions, and those of the loss."""
        kept = {name: options.pop(name, None) for name in ("output_hidden_states", "output_attentions")}
        encoded = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, return_dict=True, **kept
        )
        start, end = (part.contiguous() for part in self.qa_outputs(encoded.last_hidden_state).unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start, end, start_positions, end_positions, **options)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start,
            end_logits=end,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
