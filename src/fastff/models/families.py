"""Where the feedforward layers of foreign architectures are, and how one is taken out and another put in.

A family says, for one kind of transformer block, which module computes the feedforward (its `slot`), what that module
computes, and what normalises the sum of the feedforward and its residual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastff.errors import CheckpointError
from fastff.models.feedforward import GATED_ACTIVATIONS, DenseFeedforward

# Names of activations in Transformers' configurations, and the layer's own. "quick_gelu" and others are not supported.
ACTIVATION_NAMES = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


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
    """

    blocks: str
    slot: str
    read: Callable[[nn.Module, Any], DenseWeights]
    norm: str | None = None

    def blocks_of(self, model: nn.Module) -> list[nn.Module]:
        """The blocks of a model (with or without a head), first to last."""
        base = cast(nn.Module, getattr(model, "base_model", model))
        return list(cast(nn.ModuleList, base.get_submodule(self.blocks)))

    def slot_of(self, block: nn.Module) -> nn.Module:
        return block.get_submodule(self.slot)

    def norm_of(self, block: nn.Module) -> nn.Module | None:
        return None if self.norm is None else block.get_submodule(self.norm)

    @contextmanager
    def replaced(self, block: nn.Module, layer: nn.Module) -> Iterator[None]:
        """Within the context, `layer` stands in the place of a block's feedforward."""
        slot = self.slot_of(block)
        tail = None if self.norm is None else block.get_submodule("output.dense")
        self.put(block, layer)
        try:
            yield
        finally:
            setattr(block, self.slot, slot)
            if tail is not None:
                block.get_submodule("output").dense = tail

    def dense_of(self, block: nn.Module) -> nn.Module:
        """A block's dense feedforward as one module, (..., hidden) to (..., hidden)."""
        slot = self.slot_of(block)
        return slot if self.norm is None else nn.Sequential(slot, block.get_submodule("output.dense"))

    def put(self, block: nn.Module, layer: nn.Module) -> None:
        """Replace a block's feedforward by `layer`, (..., hidden) to (..., hidden)."""
        setattr(block, self.slot, layer)
        if self.norm is not None:
            block.get_submodule("output").dense = nn.Identity()


def activation_name(config: Any) -> str:
    """The layer's name for the activation of a Transformers configuration. Raises CheckpointError for another one."""
    for field in ("hidden_activation", "hidden_act", "activation_function"):
        name = getattr(config, field, None)
        if name is not None:
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


def _read_bert(block: Any, config: Any) -> DenseWeights:
    up, down = _plain(block.intermediate.dense), _plain(block.output.dense)
    return DenseWeights(up.weight, up.bias, down.weight.t(), down.bias, activation_name(config))


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


_BERT = Family(blocks="encoder.layer", slot="intermediate", read=_read_bert, norm="output.LayerNorm")
_LLAMA = Family(blocks="layers", slot="mlp", read=_read_llama)

FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "modernbert": Family(blocks="layers", slot="mlp", read=_read_modernbert),
    "gpt2": Family(blocks="h", slot="mlp", read=_read_gpt2),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "ultrafastbert": Family(blocks="layers", slot="feedforward", read=_read_ours),
}


def family_of(model_type: str) -> Family:
    """Raises CheckpointError naming the known model types."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(f"model type {model_type!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
