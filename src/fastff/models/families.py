"""Where the feedforward layers of foreign architectures are, and how one is taken out and another put in.

A family says, for one kind of transformer block, which module computes the feedforward (its `slot`), what that module
computes, and what normalises the sum of the feedforward and its residual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastff.errors import CheckpointError
from fastff.models.feedforward import GATED_ACTIVATIONS, DenseFeedforward

# Names of activations in Transformers' configurations, and the layer's own. Others are not supported.
ACTIVATION_NAMES = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "quick_gelu": "silu",  # of 1.702 times the scores, and divided by that
}
QUICK_GELU = 1.702


@dataclass(frozen=True)
class DenseWeights:
    """A dense feedforward layer in one form: `act(x @ w_in.T + b_in) @ w_out + b_out`.

    w_in (neurons, in_features), b_in (neurons,) or None, w_out (neurons, out_features), b_out (out_features,) or None.
    With v_in (neurons, in_features) and v_b (neurons,) or None the layer is gated: `act(...) * (x @ v_in.T + v_b)`.
    """

    w_in: Tensor
    b_in: Tensor | None
    w_out: Tensor
    b_out: Tensor | None
    activation: str
    v_in: Tensor | None = None
    v_b: Tensor | None = None

    @property
    def neurons(self) -> int:
        return self.w_in.shape[0]

    @property
    def flops_per_row(self) -> int:
        """Floating-point operations of one row's matrix work (a multiply and an add are two)."""
        return 2 * sum(w.numel() for w in (self.w_in, self.w_out, self.v_in) if w is not None)


@dataclass(frozen=True)
class Family:
    """One kind of block.

    blocks    path of the list of blocks below the base model
    slot      name, in a block, of the module that the new layer replaces
    read      the dense weights of a block
    norm      the module that normalises feedforward plus residual where the residual is the slot's own input
              (post-norm), or None (pre-norm: the residual is another tensor and the next block normalises)
    tail      a module behind the slot that computes the second half of the feedforward, None where the slot has all
    after     a module through which the feedforward's output goes before it is added to the residual, or None
    pictures  whether the model reads pictures (`pixel_values`) instead of text
    """

    blocks: str
    slot: str
    read: Callable[[nn.Module, Any], DenseWeights]
    norm: str | None = None
    tail: str | None = None
    after: str | None = None
    pictures: bool = False

    def blocks_of(self, model: nn.Module) -> list[nn.Module]:
        """The blocks of a model (with or without a head), first to last."""
        base = cast(nn.Module, getattr(model, "base_model", model))
        return list(cast(nn.ModuleList, base.get_submodule(self.blocks)))

    def slot_of(self, block: nn.Module) -> nn.Module:
        return block.get_submodule(self.slot)

    def norm_of(self, block: nn.Module) -> nn.Module | None:
        return None if self.norm is None else block.get_submodule(self.norm)

    def after_of(self, block: nn.Module) -> nn.Module | None:
        return None if self.after is None else block.get_submodule(self.after)

    @contextmanager
    def replaced(self, block: nn.Module, layer: nn.Module) -> Iterator[None]:
        """Within the context, `layer` stands in the place of a block's feedforward."""
        slot = self.slot_of(block)
        tail = None if self.tail is None else block.get_submodule(self.tail)
        self.put(block, layer)
        try:
            yield
        finally:
            setattr(block, self.slot, slot)
            if tail is not None:
                self._set_tail(block, tail)

    def dense_of(self, block: nn.Module) -> nn.Module:
        """A block's dense feedforward as one module, (..., hidden) to (..., hidden)."""
        slot = self.slot_of(block)
        return slot if self.tail is None else nn.Sequential(slot, block.get_submodule(self.tail))

    def put(self, block: nn.Module, layer: nn.Module) -> None:
        """Replace a block's feedforward by `layer`, (..., hidden) to (..., hidden)."""
        setattr(block, self.slot, layer)
        if self.tail is not None:
            self._set_tail(block, nn.Identity())

    def _set_tail(self, block: nn.Module, module: nn.Module) -> None:
        assert self.tail is not None
        folder, _, name = self.tail.rpartition(".")
        setattr(block.get_submodule(folder), name, module)


def activation_name(config: Any) -> str:
    """The layer's name for the activation of a Transformers configuration. Raises CheckpointError for another one."""
    for field in ("hidden_activation", "hidden_act", "activation_function", "activation"):
        name = getattr(config, field, None)
        if isinstance(name, str):
            if name not in ACTIVATION_NAMES:
                raise CheckpointError(f"activation {name!r} is not one of {', '.join(ACTIVATION_NAMES)}")
            return ACTIVATION_NAMES[name]
    raise CheckpointError(f"the configuration of {config.model_type} names no activation")


def _plain(module: Any) -> Any:
    """A projection whose weight is all that it computes with: no adapter, quantised or offloaded layer, whose module
    gives something else. Raises CheckpointError."""
    hooked = hasattr(module, "_hf_hook") or module.weight.is_meta if type(module) in (nn.Linear, Conv1D) else True
    if hooked:
        raise CheckpointError(
            f"{type(module).__module__}.{type(module).__name__} stands where an ordinary layer is expected whose "
            "weights can be read: merge adapters and load without quantisation and offloading"
        )
    return module


def _two(up: str, down: str) -> Callable[[Any, Any], DenseWeights]:
    """Reads two projections by their names in a block."""

    def read(block: Any, config: Any) -> DenseWeights:
        first, second = _plain(block.get_submodule(up)), _plain(block.get_submodule(down))
        w_in, b_in, w_out, activation = first.weight, first.bias, second.weight.t(), activation_name(config)
        if "quick_gelu" in (getattr(config, "hidden_act", None), getattr(config, "hidden_activation", None)):
            w_in, b_in = w_in.detach() * QUICK_GELU, None if b_in is None else b_in.detach() * QUICK_GELU
            w_out = w_out.detach() / QUICK_GELU
        return DenseWeights(w_in, b_in, w_out, second.bias, activation)

    return read


def _read_dinov2(block: Any, config: Any) -> DenseWeights:
    if hasattr(block.mlp, "fc1"):
        return _two("mlp.fc1", "mlp.fc2")(block, config)
    return replace(_read_llama(block, config), activation="silu")  # whatever the configuration names


def _read_gpt2(block: Any, config: Any) -> DenseWeights:
    up, down = _plain(block.mlp.c_fc), _plain(block.mlp.c_proj)  # their weights are (in, out)
    return DenseWeights(up.weight.t(), up.bias, down.weight, down.bias, activation_name(config))


def _read_llama(block: Any, config: Any) -> DenseWeights:
    gate, up, down = map(_plain, (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj))
    return DenseWeights(
        gate.weight, gate.bias, down.weight.t(), down.bias, activation_name(config), v_in=up.weight, v_b=up.bias
    )


def _read_modernbert(block: Any, config: Any) -> DenseWeights:
    both, down = _plain(block.mlp.Wi), _plain(block.mlp.Wo)
    (w_in, v_in) = both.weight.chunk(2)
    (b_in, v_b) = (None, None) if both.bias is None else both.bias.chunk(2)
    return DenseWeights(w_in, b_in, down.weight.t(), down.bias, activation_name(config), v_in=v_in, v_b=v_b)


def _read_ours(block: Any, config: Any) -> DenseWeights:
    layer = block.feedforward
    if not isinstance(layer, DenseFeedforward):
        raise CheckpointError(f"feedforward {type(layer).__name__} is not a dense layer: nothing is to be converted")
    up, down = _plain(layer.linear_in), _plain(layer.linear_out)
    if layer.activation not in GATED_ACTIVATIONS:
        return DenseWeights(up.weight, up.bias, down.weight.t(), down.bias, layer.activation)
    w_in, v_in = up.weight.chunk(2)
    b_in, v_b = (None, None) if up.bias is None else up.bias.chunk(2)
    activation = GATED_ACTIVATIONS[layer.activation]
    return DenseWeights(w_in, b_in, down.weight.t(), down.bias, activation, v_in=v_in, v_b=v_b)


_BERT = Family(
    blocks="encoder.layer",
    slot="intermediate",
    read=_two("intermediate.dense", "output.dense"),
    norm="output.LayerNorm",
    tail="output.dense",
)
_LLAMA = Family(blocks="layers", slot="mlp", read=_read_llama)
_VIT = Family(blocks="layers", slot="mlp", read=_two("mlp.fc1", "mlp.fc2"), pictures=True)
_TOWER = Family(blocks="encoder.layers", slot="mlp", read=_two("mlp.fc1", "mlp.fc2"))

FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "mpnet": _BERT,
    "deberta-v2": _BERT,
    "distilbert": Family(
        blocks="transformer.layer", slot="ffn", read=_two("ffn.lin1", "ffn.lin2"), norm="output_layer_norm"
    ),
    "modernbert": Family(blocks="layers", slot="mlp", read=_read_modernbert),
    "gpt2": Family(blocks="h", slot="mlp", read=_read_gpt2),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma3_text": replace(_LLAMA, after="post_feedforward_layernorm"),
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": Family(blocks="encoder.layer", slot="mlp", read=_read_dinov2, after="layer_scale2", pictures=True),
    "clip_text_model": _TOWER,
    "clip_vision_model": replace(_TOWER, pictures=True),
    "siglip_text_model": _TOWER,
    "siglip_vision_model": replace(_TOWER, pictures=True),
    "ultrafastbert": Family(blocks="layers", slot="feedforward", read=_read_ours),
}


def family_of(model_type: str) -> Family:
    """Raises CheckpointError naming the known model types."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(f"model type {model_type!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
