"""Which rows of a table of learned positions are for tokens."""

from __future__ import annotations

from typing import Any

_FROM_PADDING = (  # model types whose positions begin after the padding's
    "camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm",
    "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip


def first_position(model_type: str | None, pad_token_id: int | None) -> int:
    """The row of a model's first token: as many positions of its configuration are not for tokens."""
    return (pad_token_id or 0) + 1 if model_type in _FROM_PADDING else 0


def token_positions(config: Any, default: int) -> int:
    """Tokens that a model of this configuration takes; `default` of one that names no positions."""
    positions = getattr(config, "max_position_embeddings", None)
    if not positions:
        return default
    return int(positions) - first_position(config.model_type, getattr(config, "pad_token_id", None))
