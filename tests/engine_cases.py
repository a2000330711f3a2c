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
from fastff.engine.conditional_layers import takes_4_bits
from fastff.engine.decoders import BODY, HEAD, Bits
from fastff.engine.generate import Engine
from fastff.layers import FFF
from fastff.models import UltraFastBertConfig, UltraFastBertForCausalLM, make_converted
from fastff.models.feedforward import complete
from fastff.ops.native_linear import MatrixForm, PackedMatrix
from fastff.routers import Router

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
    "llama-long": lambda: LlamaConfig(
        **{**_SIZES, "num_hidden_layers": 1, "num_key_value_heads": 1, "max_position_embeddings": 300}, head_dim=80
    ),
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


def held(weights: torch.Tensor, form: MatrixForm) -> torch.Tensor:
    """What a packed matrix holds of weights: its products with unit vectors (test_native_linear.py)."""
    return PackedMatrix(weights, form=form).multiply(torch.eye(weights.shape[1]), bits=16).T.double()


def rounded(model: torch.nn.Module, bits: Bits = "int8") -> torch.nn.Module:
    """The model in float64 with every matrix rounded as the export rounds it. Conditional layers stay as they are, in
    float32."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FFF | ConditionalFeedforward):
            model.set_submodule(name, _InFloat(module))
    kept = {id(p) for module in model.modules() if isinstance(module, _InFloat) for p in module.parameters()}
    model = model.double()
    for module in model.modules():
        if isinstance(module, _InFloat):
            module.float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "wpe" not in name and id(weight) not in kept:
                rows = weight.t() if any(part in name for part in ("c_attn", "c_proj", "c_fc")) else weight
                words = any(part in name for part in ("embed", "lm_head", "wte", "decoder"))
                rows.copy_(held(rows.float(), HEAD if words else BODY[bits]))
    return model


@functools.cache
def exported(name: str, bits: Bits = "int8") -> tuple[Engine, torch.nn.Module, Path]:
    """Engine, the model that it should compute, and the directory, which lives as long as the process."""
    folder = tempfile.TemporaryDirectory()
    _kept.append(folder)
    out = Path(folder.name) / "model"
    model = random_model(name)
    native_export.export_model(model, None, out, bits=bits)
    return Engine(out), rounded(model, bits), out


GREEDY = {"depth": 3, "trees": 2, "leaf_width": 6, "node_output": False, "activation": "swiglu", "gate": "boundary"}
FLAT = {"kind": "flat", "leaves": 12, "k": 3, "leaf_width": 8}
WIDE = {"kind": "flat", "leaves": 6, "k": 2, "leaf_width": 30, "bias": True}  # enough for 4 bits
FEEDFORWARDS = {  # of the two blocks, as descriptions; None leaves the dense one
    "flat": [FLAT] * 2,
    "paths": [{"kind": "paths", "depth": 3, "trees": 2, "paths": 2, "leaf_width": 8}] * 2,
    "product_key": [{"kind": "product_key", "n": 4, "k": 5, "leaf_width": 8}] * 2,
    "trees": [{"kind": "fff", "bias": True, **GREEDY}] * 2,
    "published": [{"kind": "fff", "depth": 4}] * 2,
    "mixed": [{"kind": "fff", "shared": 24, **GREEDY}, None],
    "other": [{**FLAT, "reads": 32}, {"kind": "paths", "depth": 3, "paths": 2, "leaf_width": 8, "bias": True}],
    "wide": [WIDE] * 2,
    "both": [FLAT, WIDE],
    "wide-gelu": [{"kind": "paths", "depth": 2, "paths": 2, "leaf_width": 64, "activation": "gelu"}, None],
    "narrow": [{"kind": "dense", "intermediate_size": 40, "activation": "swiglu"}, {"kind": "none"}],
}
OURS = {  # feedforwards of our own causal family, and changes of its configuration
    "ours-dense": ({"kind": "dense", "intermediate_size": 40, "bias": True}, {"decoder_bias": True}),
    "ours-swiglu": (
        {"kind": "dense", "intermediate_size": 40, "activation": "swiglu"},
        {"attention_bias": True, "tie_word_embeddings": False},
    ),
    "ours-trees": ({"kind": "fff", **GREEDY}, {}),
    "ours-flat": (FLAT, {}),
    "ours-mixed": ([{"kind": "none"}, {"kind": "fff", "depth": 4}], {}),
}


def _ours(name: str) -> torch.nn.Module:
    feedforward, changes = OURS[name]
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 96}
    sizes |= {"initializer_range": 0.3, "head_dim": 24, "is_decoder": True}
    config = UltraFastBertConfig(vocab_size=VOCABULARY, feedforward=feedforward, **sizes, **changes)
    return UltraFastBertForCausalLM(config)


@functools.cache
def conditional_model(kind: str, family: str = "llama", bits: Bits = "int8") -> tuple[torch.nn.Module, Path]:
    """A model whose feedforwards are fastff's, its matrices rounded as the export rounds them, and its export."""
    torch.manual_seed(1)
    if kind in OURS:
        model = _ours(kind)
    else:
        model = random_model(family)
        descriptions = [None if each is None else complete(each) for each in FEEDFORWARDS[kind]]
        model = make_converted(model, descriptions)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "scale" not in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
        for module in model.modules():
            if isinstance(module, FFF | ConditionalFeedforward):
                module.w_in.normal_(std=0.2)
                module.w_out.normal_(std=0.5)
            if isinstance(module, Router) and module.balance is not None:
                module.balance.normal_(std=0.1)
            if bits == "int4" and isinstance(module, ConditionalFeedforward) and takes_4_bits(module):
                _hold_leaves(module)
    folder = tempfile.TemporaryDirectory()
    _kept.append(folder)
    native_export.export_model(model.eval(), None, Path(folder.name) / "model", bits=bits)
    return rounded(model, bits), Path(folder.name) / "model"


def _hold_leaves(layer: ConditionalFeedforward) -> None:
    """Weights of leaves that 4 bits hold: in groups of 32 inputs, of neurons those of one leaf."""
    layer.w_in.copy_(held(layer.w_in.flatten(0, 1), "int4").view_as(layer.w_in))
    turned = layer.w_out.transpose(1, 2)
    layer.w_out.copy_(held(turned.flatten(0, 1), "int4").view(turned.shape).transpose(1, 2))


class _InFloat(torch.nn.Module):
    """A float32 layer within a float64 model."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.float()).double()


_kept: list[tempfile.TemporaryDirectory[str]] = []
