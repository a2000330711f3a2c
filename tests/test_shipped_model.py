"""The converted all-MiniLM-L6-v2 of models/ loads, and its vectors mean something."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

import fastff.models  # noqa: F401
from fastff.convert.quality import embed
from fastff.models import ConvertedFeedforward
from fastff.models.int8_files import INT8_FILE

FOLDER = Path(__file__).parents[1] / "models" / "all-minilm-l6-v2-experts"


def test_the_shipped_model_loads_and_tells_sentences_apart():
    assert (FOLDER / INT8_FILE).stat().st_size <= 25e6
    model, tokenizer = AutoModel.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    layers = [m for m in model.modules() if isinstance(m, ConvertedFeedforward)]
    assert len(layers) == 6
    assert sum(layer.flops_per_row for layer in layers) <= 0.1 * 6 * 4 * 384 * 1536
    pairs = [
        ("A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell today."),
        ("How do I reset my password?", "I forgot my login and need a new one.", "Bake the bread for an hour."),
    ]
    for sentence, near, far in pairs:
        a, b, c = embed(model, tokenizer, [sentence, near, far])
        assert float(a @ b) > 0.3 + float(a @ c)
    assert all(torch.isfinite(p).all() for p in model.parameters())
