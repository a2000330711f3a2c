"""Small decoders with random weights, exported, and the same ones with the weights that the export rounds to."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from fastff.conditional import ConditionalFeedforward
from fastff.engine import native_export
from fastff.engine.generate import Engine
from fastff.routers import FlatRouter, ProductKeyRouter, TreeRouter

VOCABULARY = 300
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "llama-apart": lambda: LlamaConfig(**{**_SIZES, "tie_word_embeddings": False}, attention_bias=True, head_dim=24),
    "llama3-rotation": lambda: LlamaConfig(**_SIZES, rope_parameters=_LLAMA3),
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=40, head_dim=16),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=32),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=96),
}


def random_model(name: str) -> torch.nn.Module:
    """With every parameter random, biases and norms included."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def rounded(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float64 with every matrix rounded as the export rounds it: 8 bits, one scale an output row."""
    model = model.double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "wpe" not in name:
                rows = weight.t() if any(part in name for part in ("c_attn", "c_proj", "c_fc")) else weight
                scale = rows.abs().amax(1, keepdim=True).float().double() / 127
                rows.copy_(torch.round(rows / scale) * scale)
    return model


@functools.cache
def exported(name: str) -> tuple[Engine, torch.nn.Module, Path]:
    """Engine, the model that it should compute, and the directory, which lives as long as the process."""
    folder = tempfile.TemporaryDirectory()
    _kept.append(folder)
    out = Path(folder.name) / "model"
    model = random_model(name)
    native_export.export_model(model, None, out)
    return Engine(out), rounded(model), out


@functools.cache
def conditional_model(kind: str) -> tuple[torch.nn.Module, Path]:
    """A Llama whose feedforwards are conditional, its matrices rounded as the export rounds them, and its export."""
    torch.manual_seed(1)
    router = {
        "flat": lambda: FlatRouter(64, 12, k=3),
        "paths": lambda: TreeRouter(64, depth=3, trees=2, paths=2),
        "product_key": lambda: ProductKeyRouter(64, n=4, k=5),
    }[kind]
    model = random_model("llama")
    for block in model.model.layers:
        made = router()
        block.mlp = ConditionalFeedforward(64, router=made, leaves=made.leaves, leaf_width=8)
        torch.nn.init.normal_(block.mlp.w_in, std=0.2)
        torch.nn.init.normal_(block.mlp.w_out, std=0.5)
        made.balance.normal_(std=0.1)
    folder = tempfile.TemporaryDirectory()
    _kept.append(folder)
    native_export.export_model(model.eval(), None, Path(folder.name) / "model")
    layers = [block.mlp for block in model.model.layers]
    for block in model.model.layers:
        block.mlp = torch.nn.Identity()
    rounded(model)
    for block, layer in zip(model.model.layers, layers, strict=True):
        block.mlp = _InFloat(layer)
    return model, Path(folder.name) / "model"


class _InFloat(torch.nn.Module):
    """A float32 layer within a float64 model."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.float()).double()


_kept: list[tempfile.TemporaryDirectory[str]] = []
