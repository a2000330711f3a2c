"""Transformers models whose feedforward layers are conditional, registered with the Auto classes by this import.

`import fastff` alone does not import this module: it needs the extra `models`.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from fastff.models.converted import ConvertedConfig, make_converted, register
from fastff.models.encoder.checkpoint import convert_published
from fastff.models.encoder.configuration import CrammedBertConfig, UltraFastBertConfig
from fastff.models.encoder.heads import (
    UltraFastBertForCausalLM,
    UltraFastBertForMaskedLM,
    UltraFastBertForQuestionAnswering,
    UltraFastBertForSequenceClassification,
    UltraFastBertForTokenClassification,
)
from fastff.models.encoder.modeling import UltraFastBertModel
from fastff.models.feedforward import ConvertedFeedforward, DenseFeedforward, build_feedforward, quantize

__all__ = [
    "ConvertedConfig",
    "ConvertedFeedforward",
    "DenseFeedforward",
    "UltraFastBertConfig",
    "UltraFastBertForCausalLM",
    "UltraFastBertForMaskedLM",
    "UltraFastBertForQuestionAnswering",
    "UltraFastBertForSequenceClassification",
    "UltraFastBertForTokenClassification",
    "UltraFastBertModel",
    "build_feedforward",
    "convert_published",
    "make_converted",
    "quantize",
]

AutoConfig.register(UltraFastBertConfig.model_type, UltraFastBertConfig)
AutoConfig.register(CrammedBertConfig.model_type, CrammedBertConfig)
AutoModel.register(UltraFastBertConfig, UltraFastBertModel)
AutoModelForCausalLM.register(UltraFastBertConfig, UltraFastBertForCausalLM)
AutoModelForMaskedLM.register(UltraFastBertConfig, UltraFastBertForMaskedLM)
AutoModelForQuestionAnswering.register(UltraFastBertConfig, UltraFastBertForQuestionAnswering)
AutoModelForSequenceClassification.register(UltraFastBertConfig, UltraFastBertForSequenceClassification)
AutoModelForTokenClassification.register(UltraFastBertConfig, UltraFastBertForTokenClassification)
register()
