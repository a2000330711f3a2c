"""What a model is used for, by its family and the class that its configuration names, and the Auto class for it."""

from __future__ import annotations

from typing import Any, Literal

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from fastff.models.families import FAMILIES

Kind = Literal["embedding", "causal", "masked", "classifier", "image"]

AUTO: dict[Kind, Any] = {
    "embedding": AutoModel,
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "classifier": AutoModelForSequenceClassification,
    "image": AutoModel,
}


def kind_of(config: Any) -> Kind:
    """What a model is used for: image of families that read pictures, else by the class that `config` names."""
    original = getattr(config, "base", None) or {}  # of a converted model
    family = FAMILIES.get(original.get("model_type", config.model_type))
    if family is not None and family.pictures:
        return "image"
    name = (getattr(config, "architectures", None) or [""])[0]
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    if name.endswith("ForSequenceClassification"):
        return "classifier"
    return "masked" if name.endswith("ForMaskedLM") else "embedding"
