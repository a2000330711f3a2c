"""Small encoders with random weights, exported, and the same ones with the weights that the export rounds to."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ModernBertModel,
    MPNetConfig,
    MPNetForSequenceClassification,
    MPNetModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

import fastff.models as fastff_models
from fastff.engine import native_export
from fastff.engine.encode import EncoderEngine
from fastff.engine.smoothing import channel_maxima, smoothing
from fastff.models import UltraFastBertConfig, UltraFastBertForSequenceClassification, UltraFastBertModel
from fastff.models.kinds import kind_of

VOCABULARY = 80
TREES = {
    "kind": "fff",
    "depth": 3,
    "trees": 2,
    "leaf_width": 2,
    "node_output": False,
    "activation": "swiglu",
    "gate": "boundary",
    "bias": True,
}
FLAT = {"kind": "flat", "leaves": 6, "k": 2, "leaf_width": 8, "bias": True}
EXPERTS = {"kind": "flat", "leaves": 6, "k": 2, "leaf_width": 24}  # which matrix tiles take
WIDE_EXPERTS = {
    "kind": "fff",
    "depth": 2,
    "paths": 3,
    "gate": "normalised",
    "leaf_width": 80,
    "node_output": False,
    "activation": "swiglu",
}
# All leaves of a row are chosen: no route flips by what other layers round.
GELU_EXPERTS = {"kind": "flat", "leaves": 3, "k": 3, "leaf_width": 40, "activation": "gelu", "bias": True}
RELU_EXPERTS = {"kind": "flat", "leaves": 2, "k": 2, "leaf_width": 72, "activation": "relu", "bias": True}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 160,
    "max_position_embeddings": 100,
}


def bert(cls=BertModel, **changes):
    return cls(BertConfig(**{**_BERT, **changes}))


def roberta(cls=RobertaModel):
    return cls(RobertaConfig(**{**_BERT, "max_position_embeddings": 102}, pad_token_id=1))


def distilbert(cls=DistilBertModel):
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "max_position_embeddings": 100}
    return cls(DistilBertConfig(vocab_size=VOCABULARY, **sizes))


def mpnet(cls=MPNetModel):
    return cls(MPNetConfig(**{**_BERT, "max_position_embeddings": 102}))


def modernbert(cls=ModernBertModel, **changes):
    """Three layers: all tokens, a window, all; other angles in the window."""
    sizes = {**_BERT, "num_hidden_layers": 3, "global_attn_every_n_layers": 2, "local_attention": 20}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1}
    return cls(ModernBertConfig(**{**sizes, **ids, **changes}))


def ours(feedforward, cls=UltraFastBertModel, **changes):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 100}
    return cls(UltraFastBertConfig(vocab_size=VOCABULARY, head_dim=24, feedforward=feedforward, **sizes, **changes))


MODELS = {
    "bert": bert,
    "bert-of-wide-heads": lambda: bert(hidden_size=192, num_attention_heads=2),
    "roberta": roberta,
    "distilbert": distilbert,
    "mpnet": mpnet,
    "modernbert": modernbert,
    "ours-dense": lambda: ours({"kind": "dense", "intermediate_size": 40, "bias": True}),
    "ours-swiglu": lambda: ours(
        {"kind": "dense", "intermediate_size": 40, "activation": "swiglu"}, attention_bias=True
    ),
    "ours-none": lambda: ours({"kind": "none"}),
    "ours-1x4": lambda: ours({"kind": "fff", "depth": 4}),
    "ours-trees": lambda: ours(TREES),
    "ours-flat": lambda: ours(FLAT),
    "ours-experts": lambda: ours(EXPERTS),
    "ours-paths": lambda: ours({"kind": "paths", "depth": 3, "paths": 2, "leaf_width": 4}),
    "converted": lambda: fastff_models.make_converted(bert(), [{**TREES, "shared": 24}, None]),
    "converted-experts": lambda: fastff_models.make_converted(
        bert(hidden_size=128), [{**WIDE_EXPERTS, "shared": 24}, WIDE_EXPERTS]
    ),
    "converted-biased-experts": lambda: fastff_models.make_converted(
        bert(hidden_size=128), [{**GELU_EXPERTS, "shared": 24, "shared_activation": "gelu"}, RELU_EXPERTS]
    ),
    "converted-none": lambda: fastff_models.make_converted(bert(), [FLAT, {"kind": "none"}]),
}
HEADS = {
    "bert": lambda: bert(BertForSequenceClassification, num_labels=3),
    "roberta": lambda: roberta(RobertaForSequenceClassification),
    "distilbert": lambda: distilbert(DistilBertForSequenceClassification),
    "mpnet": lambda: mpnet(MPNetForSequenceClassification),
    "modernbert": lambda: modernbert(ModernBertForSequenceClassification, num_labels=3, classifier_pooling="mean"),
    "ours": lambda: ours({"kind": "none"}, UltraFastBertForSequenceClassification, num_labels=4),
    "masked": lambda: bert(BertForMaskedLM),
}


def random_model(make):
    """With every parameter random, biases and norms included, and matrices that the export does not round further."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
            elif "embedding" not in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and not any(part in name for part in _HEAD_PARTS):
                scale = module.weight.abs().amax(1, keepdim=True) / 127
                module.weight.copy_((module.weight / scale).round() * scale)
    return model


_HEAD_PARTS = ("classifier", "pooler", "cls.", "lm_head", "pre_classifier")


@functools.cache
def exported(name: str, heads: bool = False):
    """The model and its engine, with activations in 16 bits."""
    model = random_model((HEADS if heads else MODELS)[name])
    return model, engine_of(model, activation_bits=16)


def engine_of(model, tokenizer=None, *, source="", activation_bits=8):
    model.config.architectures = [type(model).__name__]
    folder = Path(tempfile.mkdtemp())
    native_export.export_encoder(
        model, tokenizer, source or str(folder), kind_of(model.config), folder / "out", activation_bits=activation_bits
    )
    return EncoderEngine(folder / "out", threads=1)


def with_outliers():
    """A random BERT in which two channels are fifty times as large as the others where layers read them, and count as
    much as the others."""
    model = random_model(bert)
    *_, last = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.LayerNorm) and module is not last:
                module.weight[[7, 50]] *= 50
                module.bias[[7, 50]] *= 50
            elif isinstance(module, torch.nn.Linear) and (".self." in name or "intermediate" in name):
                module.weight[:, [7, 50]] /= 50
    return model


def with_rounded_activations(model):
    """The model as the engine computes it with activations in 8 bits: what a linear layer reads and its weights rounded
    a row at a time, channels smoothed where a norm precedes it."""
    maxima = channel_maxima(model, VOCABULARY, model.config.max_position_embeddings)
    rounded = copy.deepcopy(model)
    for name, module in model.encoder.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        block = name.split(".attention.")[0]
        joined = [name]
        if ".self." in name:
            joined = [f"{block}.attention.self.{part}" for part in ("query", "key", "value")]
        weights = [model.encoder.get_submodule(each).weight for each in joined]
        factors = torch.ones(module.in_features)
        if ".self." in name or "intermediate" in name:
            factors = smoothing(maxima[module], weights)
        twin = rounded.encoder.get_submodule(name)
        twin.weight.data = _nearest(module.weight.data * factors)
        twin.register_forward_pre_hook(lambda _, inputs, f=factors: (_nearest(inputs[0] / f),))
    return rounded


def _nearest(rows):
    scale = rows.abs().amax(-1, keepdim=True) / 127
    return (rows / scale).round() * scale
