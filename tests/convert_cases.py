"""Shared by the tests of the conversion: a tokenizer, a text, tiny dense models and their settings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from conftest import make_rows
from fastff.convert import ConversionSettings, choose_layers
from fastff.models.families import DenseWeights

WORDS = [f"w{k}" for k in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: k for k, word in enumerate(["<pad>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [" ".join(rng.choice(WORDS, size=rng.integers(3, 20))) for _ in range(400)]
    path.write_text("\n\n".join(lines) + "\n")
    return path


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    """Whole conversions in these tests try two shapes: with and without a shared part."""
    monkeypatch.setattr(choose_layers, "TREES", (2,))
    monkeypatch.setattr(choose_layers, "DEPTHS", (3,))


def tiny(model_type="bert", seed=0, **extra):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    if model_type == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 128, "bos_token_id": 1, "eos_token_id": 1}
    if model_type == "llama":
        sizes["num_key_value_heads"] = 2
    if model_type == "ultrafastbert":
        del sizes["intermediate_size"]
        extra |= {"is_decoder": True, "feedforward": {"kind": "dense", "intermediate_size": 128}}
    if model_type == "modernbert":
        extra |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1}
    config = AutoConfig.for_model(model_type, vocab_size=62, initializer_range=0.3, **sizes, **extra)
    auto = AutoModelForCausalLM if model_type in ("gpt2", "llama", "ultrafastbert") else AutoModel
    if "num_labels" in extra:
        auto = AutoModelForSequenceClassification
    return auto.from_config(config).eval()


def saved(folder, tokenizer, model_type="bert", **extra):
    tiny(model_type, **extra).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def settings_for(folder, model, text, **changes):
    small = {
        "model": model,
        "text": text,
        "out": folder / "out",
        "active": 0.3,
        "rows": 600,
        "probe_rows": 300,
        "timing_s": 0.002,
        "shapes": ((1, 8),),
        "layer_steps": 3,
        "steps": 6,
        "batch": 8,
        "max_length": 16,
        "keep_slow": True,  # a layer of 128 neurons gains nothing from a tree
    }
    return ConversionSettings(**small | changes)


def random_dense(neurons=96, width=16, gated=False, activation="gelu"):
    w = make_rows(4, neurons, width, seed=3, dtype=torch.float32) / 4
    second = {"v_in": w[2], "v_b": w[3, :, 0]} if gated else {}
    return DenseWeights(w[0], w[3, :, 1], w[1], make_rows(width, dtype=torch.float32), activation, **second)
