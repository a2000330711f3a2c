"""ConditionalFeedforward: a router and leaves as one layer, by itself, by name, and within a model."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastff
import fastff.models
from conftest import make_rows
from fastff.conditional import ConditionalConfig, make_conditional, parse_layer
from fastff.models.feedforward import build_feedforward, complete
from fastff.ops.cost import routed_us, work_of
from fastff.routers import FlatRouter, ProductKeyRouter, TreeRouter
from model_cases import small_batch, small_config

ROUTERS = {
    "tree": lambda **options: TreeRouter(8, 3, 2, **options),
    "paths": lambda **options: TreeRouter(8, 4, 2, paths=3, **options),
    "flat": lambda **options: FlatRouter(8, 12, 3, **options),
    "product_key": lambda **options: ProductKeyRouter(8, 5, 4, **options),
    "reads": lambda **options: FlatRouter(6, 12, 3, **options),
}


def make(kind, *, dtype=torch.float64, **options):
    torch.manual_seed(0)
    router = ROUTERS[kind](dtype=dtype)
    options = {"leaf_width": 3, "bias": True, **options}
    layer = fastff.ConditionalFeedforward(8, 5, router=router, leaves=router.leaves, dtype=dtype, **options)
    with torch.no_grad():
        leaves = (layer.w_in, layer.w_out, layer.b_in, layer.b_out)
        for i, parameter in enumerate(p for p in leaves if p is not None):
            parameter.copy_(0.5 * make_rows(*parameter.shape, seed=i))
    return layer


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("kind", ROUTERS)
def test_output_is_the_sum_over_the_chosen_leaves(kind, activation):
    layer = make(kind, activation=activation).eval()
    x = make_rows(2, 10, 8)
    y = layer(x)
    assert y.shape == (2, 10, 5)
    leaf, gate = layer.router(x[..., : layer.router.in_features])
    for row in ((0, 0), (1, 7)):
        want = 0
        for own, weight in zip(leaf[row].tolist(), gate[row], strict=True):
            score = layer.w_in[own] @ x[row] + layer.b_in[own]
            value = F.silu(score[:3]) * score[3:] if activation == "swiglu" else F.gelu(score)
            want = want + weight * (value @ layer.w_out[own] + layer.b_out[own])
        assert (y[row] - want).abs().max() <= 1e-12
    assert torch.equal(layer.route(x), leaf)
    assert int(layer.usage(x).counts.sum()) == leaf.numel()


@pytest.mark.parametrize("kind", ROUTERS)
def test_gradients_reach_the_router_through_the_gates(kind):
    layer = make(kind).eval()
    x = make_rows(3, 8, seed=5).requires_grad_()
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def function(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters), eps=1e-7, atol=1e-6, fast_mode=True)
    assert layer.router.weight.grad is None
    function(x, *parameters).square().sum().backward()
    assert layer.router.weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["paths", "flat"])
def test_compile_without_graph_breaks(kind):
    layer = make(kind, dtype=torch.float32)
    x = make_rows(9, 8, dtype=torch.float32)
    other = copy.deepcopy(layer)
    torch._dynamo.reset()
    want, got = layer(x), torch.compile(other, fullgraph=True, backend="aot_eager")(x)
    assert torch.allclose(want, got, atol=1e-6)
    want.sum().backward(), got.sum().backward()
    for a, b in zip(layer.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5)


def test_autocast_has_the_values_of_float32():
    layer, x = make("flat", dtype=torch.float32).eval(), make_rows(20, 8, dtype=torch.float32)
    with torch.no_grad():
        want = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), want.bfloat16())


def test_half_precision_layers_run():
    layer = make("flat").to(torch.bfloat16)
    assert layer(make_rows(4, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


class Hash(nn.Module):
    """A router of one's own: no parameters, two leaves by the sign pattern of the first three features."""

    leaves, k, flops_per_row = 8, 2, 0

    def forward(self, x):
        code = ((x[..., :3] > 0).long() * torch.tensor([1, 2, 4])).sum(-1)
        leaf = torch.stack((code, 7 - code), -1).sort(-1).values
        return leaf, torch.ones(leaf.shape, dtype=x.dtype)


def test_a_router_of_ones_own():
    layer = fastff.ConditionalFeedforward(8, router=Hash(), leaves=8, leaf_width=2)
    y = layer(make_rows(5, 8, dtype=torch.float32))
    assert y.shape == (5, 8)
    y.sum().backward()
    assert layer.active_neurons == 4
    assert layer.flops_per_row == 2 * 4 * 3 * 8
    assert layer.config.router is None


def test_counts_and_costs():
    layer = fastff.ConditionalFeedforward(8, 6, router=FlatRouter(8, 96, 3), leaves=96, leaf_width=32)
    assert (layer.neurons, layer.active_neurons, layer.in_features, layer.out_features) == (3072, 96, 8, 6)
    assert layer.flops_per_row == 2 * (96 * 8 + 96 * (2 * 8 + 6))
    reads = fastff.ConditionalFeedforward(8, 6, router=FlatRouter(2, 96, 3), leaves=96, leaf_width=32)
    assert reads.flops_per_row == 2 * (96 * 2 + 96 * (2 * 8 + 6))
    assert routed_us(work_of(layer.config), 64) > routed_us(work_of(reads.config), 64)
    layer(make_rows(10, 8, dtype=torch.float32))
    assert int(layer.usage().counts.sum()) == 30
    layer.reset_usage()
    layer.route(make_rows(10, 8, dtype=torch.float32))
    assert int(layer.usage().counts.sum()) == 0
    assert layer.router.training


def test_initialisation_is_the_recipe_of_the_comparison():
    layer = fastff.ConditionalFeedforward(512, router=FlatRouter(512, 96, 3), leaves=96, leaf_width=8)
    assert layer.w_in.std().item() == pytest.approx(0.02, rel=0.02)
    assert layer.w_out.std().item() == pytest.approx(0.02, rel=0.02)
    assert layer.router.weight.std().item() == pytest.approx(512**-0.5, rel=0.02)


@pytest.mark.parametrize(
    ("name", "description", "stored", "active"),
    [
        ("flat-96x32-top3", {"kind": "flat", "leaves": 96, "leaf_width": 32, "k": 3}, 3072, 96),
        ("pk-784x4-top24", {"kind": "product_key", "n": 28, "leaf_width": 4, "k": 24}, 3136, 96),
        ("1x8-leaf12-paths8", {"kind": "paths", "trees": 1, "depth": 8, "leaf_width": 12, "paths": 8}, 3072, 96),
        ("flat-9x4-top2-reads32", {"kind": "flat", "leaves": 9, "leaf_width": 4, "k": 2, "reads": 32}, 36, 8),
        ("2x3-leaf1-paths2-gelu_tanh", {"kind": "paths", "trees": 2, "depth": 3, "leaf_width": 1, "paths": 2}, 16, 4),
    ],
)
def test_names_are_read_and_written(name, description, stored, active):
    activation = "gelu_tanh" if name.endswith("gelu_tanh") else "swiglu"
    assert parse_layer(name) == {**description, "activation": activation}
    layer = build_feedforward(name, 64)
    assert isinstance(layer, fastff.ConditionalFeedforward)
    assert layer.config.name == name
    assert (layer.neurons, layer.active_neurons) == (stored, active)
    assert complete(name) == complete(complete(name))
    again = make_conditional(layer.config)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.eval()(torch.ones(1, 64)), layer.eval()(torch.ones(1, 64)))


def test_names_of_trees_are_read_by_the_same_parser():
    layer = build_feedforward("2x3-leaf4-swiglu-gate", 64)
    assert isinstance(layer, fastff.FFF)
    assert layer.config == fastff.TreeConfig.parse("2x3-leaf4-swiglu-gate", 64)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flat-96x32", "layer 'flat-96x32' is not of the form flat-96x32-top3, pk-784x4-top24"),
        ("pk-783x4-top24", "783 leaves of product keys in 'pk-783x4-top24' are not a square number"),
        ("flat-96x32-top3-tanh", "is not of the form"),
        ("flat-96x32-top3-reads", "is not of the form"),
        ("", "is not of the form"),
    ],
)
def test_names_that_are_wrong_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        parse_layer(name)


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda r: {"router": r, "leaves": 13, "leaf_width": 2}, "chooses among 12 leaves, the layer has 13"),
        (lambda r: {"router": Hash(), "leaves": 9, "leaf_width": 2}, "chooses among 8 leaves, the layer has 9"),
        (lambda r: {"router": FlatRouter(9, 12, 1), "leaves": 12, "leaf_width": 2}, "reads 9 features, the layer 8"),
        (lambda r: {"router": r, "leaves": 12, "leaf_width": 0}, "leaf_width 0 is not an integer of at least 1"),
        (lambda r: {"router": r, "leaves": 12, "leaf_width": 1, "activation": "tanh"}, "activation 'tanh' is not one"),
    ],
)
def test_a_router_or_a_size_that_does_not_fit_is_named(make_it, message):
    with pytest.raises(fastff.ShapeError, match=message):
        fastff.ConditionalFeedforward(8, **make_it(FlatRouter(8, 12, 3)))


def test_a_configuration_without_a_router_makes_none():
    config = ConditionalConfig(in_features=8, out_features=8, router=None, leaves=4, leaf_width=2)
    with pytest.raises(ValueError, match="no router to make"):
        make_conditional(config)
    with pytest.raises(ValueError, match="no name says"):
        _ = config.name


@pytest.mark.parametrize("name", ["flat-6x4-top2", "pk-9x2-top3", "1x3-leaf2-paths2"])
def test_a_model_trains_and_comes_back_from_its_files(name, tmp_path):
    """Balance and statistics too: from_pretrained makes its modules without memory."""
    torch.manual_seed(0)
    model = fastff.models.UltraFastBertForMaskedLM(small_config(feedforward=complete(name)))
    rows = small_batch(0)[0]
    model(rows, labels=rows).loss.backward()
    layers = [m for m in model.modules() if isinstance(m, fastff.ConditionalFeedforward)]
    assert all(layer.router.weight.grad.abs().max() > 0 for layer in layers)
    model.save_pretrained(tmp_path)
    again = fastff.models.UltraFastBertForMaskedLM.from_pretrained(tmp_path)
    found = [m for m in again.modules() if isinstance(m, fastff.ConditionalFeedforward)]
    for a, b in zip(layers, found, strict=True):
        assert a.router.balance.abs().max() > 0
        assert torch.equal(a.router.balance, b.router.balance)
        assert int(b.usage().counts.sum()) == 0
    assert torch.equal(model.eval()(rows).logits, again.eval()(rows).logits)
    fastff.models.quantize(model, "int8").save_pretrained(tmp_path / "int8")
    small = fastff.models.UltraFastBertForMaskedLM.from_pretrained(tmp_path / "int8")
    with torch.no_grad():
        assert torch.equal(small.eval()(rows).logits, model(rows).logits)
        assert not torch.equal(small(rows).logits, again(rows).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ROUTERS)
def test_a_layer_comes_back_from_its_file(kind, dtype, tmp_path):
    layer = make(kind, bias=kind != "flat").to(dtype)
    layer(make_rows(9, 8, dtype=dtype))
    layer.router.balance_step = 0.25
    layer.quantize("int8")
    fastff.save(layer, tmp_path / "layer")
    again = fastff.load(tmp_path / "layer", backend="reference")
    assert again.config == layer.config
    assert (again.backend, again.router.balance_step) == ("reference", 0.25)
    assert again.quantization == again.router.quantization == "int8"
    assert int(again.usage().counts.sum()) == 0
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in layer.state_dict().items())


def test_files_that_describe_no_layer_are_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = tmp_path / "layer"
    with pytest.raises(TypeError, match="the layer's router is Hash, expected one of fastff's"):
        fastff.save(fastff.ConditionalFeedforward(8, router=Hash(), leaves=8, leaf_width=2), path)
    fastff.save(make("flat"), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for change, message in (
        ({"layer": "other"}, "has layer 'other' in its metadata"),
        ({"router.kind": "hash"}, "describes an impossible layer: router kind 'hash'"),
        ({"leaves": "13"}, "describes an impossible layer: the router chooses among 12 leaves, the layer has 13"),
        ({"balance_step": "x"}, "has balance_step 'x' in its metadata, expected float"),
        ({"leaf_width": "4"}, "holds tensors .* expected"),
    ):
        save_file(tensors, path, metadata | change)
        with pytest.raises(fastff.CheckpointError, match=message):
            fastff.load(path)
    del metadata["router.depth"]
    save_file(tensors, path, metadata)
    with pytest.raises(fastff.CheckpointError, match=r"lacks router\.depth in its metadata"):
        fastff.load(path)


def test_the_examples_of_the_page_run():
    page = (Path(__file__).parents[1] / "docs" / "primitive.md").read_text()
    names = {}
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        exec(example, names)


@pytest.mark.parametrize("quantization", ["bf16", "int8"])
@pytest.mark.parametrize("kind", ROUTERS)
def test_quantized_layers_take_the_leaves_of_fp32_and_round_values(kind, quantization):
    layer = make(kind, dtype=torch.float32).eval()
    x = make_rows(2, 150, 8, dtype=torch.float32)
    with torch.no_grad():
        want, leaf = layer(x), layer.route(x)
        layer.quantize(quantization)
        got = layer(x)
        assert torch.equal(layer.route(x), leaf)
        assert 0 < (got - want).abs().max() < 0.05 * want.abs().max()
        assert torch.equal(copy.deepcopy(layer)(x), got)
        layer.w_out.mul_(2), layer.b_out.mul_(2)
        assert torch.allclose(layer(x), 2 * got, atol=1e-5), "packed again"
        layer.router.weight.zero_()
        assert not torch.equal(layer.route(x), leaf)
        assert torch.equal(layer.quantize(None)(x), layer(x))


def test_quantized_layers_refuse_what_they_cannot_do():
    layer = make("flat", dtype=torch.float32).quantize("int8")
    x = make_rows(3, 8, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"quantized to 'int8' cannot train: call eval\(\)"):
        layer(x)
    layer.eval()
    with fastff.ops.use_backend("reference"), pytest.raises(fastff.BackendUnavailable, match="has no 'reference'"):
        layer(x)
    with pytest.raises(RuntimeError, match=r"no gradient flows through a layer quantized to 'int8': use no_grad\(\)"):
        layer(x.requires_grad_())
    with pytest.raises(ValueError, match="quantization 'int4' is not None, 'bf16' or 'int8'"):
        layer.quantize("int4")
    with torch.no_grad():
        layer(x)
        layer.w_in.untyped_storage().resize_(0)  # as sharding frees what it gathers again
        with pytest.raises(fastff.FastffError, match="the weights have no memory"):
            layer(x)
