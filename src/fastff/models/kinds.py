"""What a model is used for, by the class that its configuration names, and the Auto class that loads it."""

from __future__ import annotations

from typing import Any, Literal

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

Kind = Literal["embedding", "causal", "masked", "classifier"]

AUTO: dict[Kind, Any] = {
    "embedding": AutoModel,
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "classifier": AutoModelForSequenceClassification,
}


def kind_of(config: Any) -> Kind:
    """What a model is used for, by the class that its configuration names."""
    name = (getattr(config, "architectures", None) or [""])[0]
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    if name.endswith("ForSequenceClassification"):
        return "classifier"
    return "masked" if name.endswith("ForMaskedLM") else "embedding"
