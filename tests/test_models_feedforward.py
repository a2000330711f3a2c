"""What stands in a dense layer's place calls its parts as modules, so that libraries that wrap them are heard, and
leaves alone what a hook has seen."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from conftest import make_rows
from convert_cases import tiny
from fastff.errors import CheckpointError
from fastff.models import ConvertedFeedforward, DenseFeedforward, make_converted
from fastff.models.families import FAMILIES, family_of

TREE = {"kind": "fff", "depth": 2, "trees": 2, "leaf_width": 3, "gate": "boundary", "bias": True}
DESCRIPTIONS = [TREE, {**TREE, "shared": 6}, {"kind": "dense", "intermediate_size": 5, "bias": True}, {"kind": "none"}]


class Doubled(nn.Module):
    """As an adapter does: keeps the layer inside and gives something else, with the layer's own attributes."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.in_features, self.out_features = inner.in_features, inner.out_features

    @property
    def weight(self):
        return self.inner.weight

    @property
    def bias(self):
        return self.inner.bias

    def forward(self, x):
        return 2 * self.inner(x)


def feedforward(description):
    torch.manual_seed(0)
    layer = ConvertedFeedforward(description, 32).eval()
    with torch.no_grad():
        layer.bias.normal_()
    return layer


def rows():
    return make_rows(7, 32, dtype=torch.float32)


@pytest.mark.parametrize("name", ["linear_in", "linear_out"])
@pytest.mark.parametrize("gradients", [True, False])
def test_an_adapter_on_a_part_is_heard(name, gradients):
    layer = feedforward({**TREE, "shared": 6, "shared_activation": "relu"})
    with torch.no_grad():
        layer.shared.linear_in.bias.zero_()
        plain, beside = layer(rows()), layer.shared(rows())
    setattr(layer.shared, name, Doubled(getattr(layer.shared, name)))
    with torch.set_grad_enabled(gradients):
        assert (layer(rows()) - (plain + beside)).abs().max() < 1e-5  # relu: twice the scores give twice the values
    assert layer.shared.flops_per_row == 2 * 2 * 6 * 32


@pytest.mark.parametrize("description", DESCRIPTIONS)
def test_offloaded_weights_compute_the_same(description):
    layer = feedforward(description)
    with torch.no_grad():
        want = layer(rows())
        cpu_offload(layer, execution_device=torch.device("cpu"))
        assert torch.equal(layer(rows()), want)


def test_offloaded_weights_train_masked_as_well():
    layer = feedforward(TREE).train()
    layer.masked_training = True
    with torch.no_grad():
        want = layer(rows())
        cpu_offload(layer, execution_device=torch.device("cpu"))
        assert torch.equal(layer(rows()), want)


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("description", DESCRIPTIONS[1:3])
def test_dynamic_quantisation_of_the_linear_layers_runs(description):
    layer = feedforward(description)
    with torch.no_grad():
        want = layer(rows())
        quantised = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
        assert 0 < (quantised(rows()) - want).abs().max() < 0.05 * want.abs().max()
    assert quantised.flops_per_row == layer.flops_per_row


@pytest.mark.parametrize("description", DESCRIPTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_what_a_hook_captured_stays_as_it_was(description, training):
    layer = feedforward(description).train(training)
    kept = []
    for part in (layer.layer, layer.shared, getattr(layer.shared, "linear_out", None)):
        if part is not None:
            part.register_forward_hook(lambda _m, _a, y: kept.append((y, y.clone())))
    bias = layer.bias.detach().clone()
    with torch.no_grad():
        layer(rows()).add_(1)
        layer(rows()[:1]).add_(1)
    assert all(torch.equal(seen, then) for seen, then in kept)
    assert torch.equal(layer.bias, bias)


@pytest.mark.parametrize("description", DESCRIPTIONS[:3])
def test_a_hook_may_give_the_same_tensor_again_and_again(description):
    layer = feedforward(description)
    cached = torch.ones(7, 32)
    layer.layer.register_forward_hook(lambda *_: cached)
    with torch.no_grad():
        first, second = layer(rows()), layer(rows())
    assert torch.equal(first, second)
    assert torch.equal(cached, torch.ones(7, 32))


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name in ("bert", "gpt2", "llama", "modernbert")])
def test_weights_that_are_not_all_of_a_layer_are_not_read(model_type):
    """A conversion would take the layer without its adapter, or without its offloaded weights, for the whole."""
    model = tiny(model_type)
    family = family_of(model_type)
    block = family.blocks_of(model)[1]
    wrapped = copy.deepcopy(block)
    folder, name = {"bert": ("output", "dense"), "gpt2": ("mlp", "c_proj"), "llama": ("mlp", "down_proj")}.get(
        model_type, ("mlp", "Wo")
    )
    setattr(wrapped.get_submodule(folder), name, Doubled(nn.Linear(2, 2)))
    with pytest.raises(CheckpointError, match="Doubled stands where an ordinary layer is expected"):
        family.read(wrapped, model.config)
    with pytest.raises(CheckpointError, match="merge adapters and load without quantisation and offloading"):
        family.read(copy.deepcopy(block).to("meta"), model.config)


def test_a_dense_layer_counts_its_work_without_reading_weights():
    layer = DenseFeedforward(8, intermediate_size=5, activation="swiglu")
    assert layer.flops_per_row == 2 * (8 * 10 + 5 * 8)


def test_a_copy_of_an_offloaded_model_is_refused():
    with pytest.raises(CheckpointError, match="on meta"):
        make_converted(tiny().to("meta"), [TREE, None])
