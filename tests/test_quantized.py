"""Quantised weights: the leaves of the fp32 layer, and the values of the rounded weights."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import fastff
from conftest import make_layer, make_rows
from fastff.ops import reference

FORMS = [
    {"depth": 0, "leaf_width": 5, "node_output": False},
    {"depth": 7},
    {"depth": 4, "trees": 3, "gate": "boundary", "bias": True, "activation": "silu"},
    {"depth": 3, "trees": 2, "gate": "boundary_min"},
    {
        "depth": 3,
        "leaf_width": 6,
        "node_output": False,
        "gate": "boundary",
        "activation": "swiglu",
        "bias": True,
    },
]
# Several trees whose nodes only route: leaves that also round x and their activations (csrc/fastff.h).
FOREST = {"depth": 4, "trees": 6, "leaf_width": 4, "node_output": False, "gate": "boundary", "bias": True}
KINDS = ["bf16", "int8"]


def rounded(weights: Tensor, kind: str) -> Tensor:
    """What the formats store, in double precision: bf16 to nearest even, int8 with a row's largest weight at 127."""
    if kind == "bf16":
        return weights.bfloat16().double()
    scale = weights.abs().amax(-1, keepdim=True) / 127
    return torch.round(weights / scale).double() * scale.double()


def expected(layer: fastff.FFF, x: Tensor, leaf: Tensor, kind: str) -> Tensor:
    """The rounded layer's output on the given route, one row at a time, in double precision. A routing score within its
    error bound, ||x|| * ||w - rounded w|| and some rounding, is that of weights with what rounding left, rounded to
    int8. Within the bound of that one it is the unrounded one."""
    config = layer.config
    w_in, w_out = rounded(layer.w_in.detach(), kind), rounded(layer.w_out.detach(), kind)
    b_in = None if layer.b_in is None else layer.b_in.detach().double()
    b_out = None if layer.b_out is None else layer.b_out.detach().double()
    y = torch.zeros(len(x), config.out_features, dtype=torch.float64)
    pair = 2 if config.activation == "swiglu" else 1
    for row in range(len(x)):
        for tree in range(config.trees):
            at = int(leaf[row, tree])
            nodes = [((at + config.leaves) >> (config.depth - level)) - 1 for level in range(config.depth)]
            first = config.leaves - 1 + at * config.leaf_width * pair
            rows_in = nodes + list(range(first, first + config.leaf_width * pair))
            score = w_in[tree, rows_in] @ x[row].double()
            exact = layer.w_in[tree, rows_in].detach().double()
            bias = torch.zeros(len(rows_in)) if b_in is None else b_in[tree, rows_in]
            parts = [w_in[tree, rows_in]]
            parts.append(rounded((exact - parts[0]).float(), "int8"))
            for part in range(len(parts)):
                known = sum(parts[: part + 1])
                norms = exact.norm(dim=-1) + sum(p.norm(dim=-1) for p in parts[: part + 1])
                slack = (config.in_features / 16 + 10) * 2.0**-24 * norms
                doubt = (score + bias).abs() <= x[row].double().norm() * ((known - exact).norm(dim=-1) + slack)
                doubt[len(nodes) :] = False
                finer = exact if part + 1 == len(parts) else sum(parts[: part + 2])
                score = torch.where(doubt, finer @ x[row].double(), score)
            score = score + bias
            act = "silu" if pair == 2 else config.activation
            value = reference.activate(score, act)
            passed, factors = torch.ones((), dtype=torch.float64), []
            for level in range(config.depth):
                if config.node_output:
                    factors.append(passed * value[level])
                if config.gate is not None:
                    gate = torch.tanh(score[level].abs() / config.tau)
                    passed = torch.minimum(passed, gate) if config.gate == "boundary_min" else passed * gate
            own = value[config.depth : config.depth + config.leaf_width]
            if pair == 2:
                own = own * score[config.depth + config.leaf_width :]
            factors += list(passed * own)
            start = (config.leaves - 1 if config.node_output else 0) + at * config.leaf_width
            rows_out = (nodes if config.node_output else []) + list(range(start, start + config.leaf_width))
            y[row] += torch.stack(factors) @ w_out[tree, rows_out]
            if b_out is not None:
                y[row] += passed * b_out[tree, at]
    return y


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize(("rows", "in_features", "out_features"), [(1, 8, 8), (37, 131, 70)])
def test_values_are_those_of_the_rounded_weights(options, kind, rows, in_features, out_features):
    layer = make_layer(in_features, out_features, dtype=torch.float32, **options).eval()
    x = make_rows(rows, in_features, dtype=torch.float32)
    got = layer.quantize(kind).routed(x)
    want = expected(layer, x, got.leaf, kind)
    assert (got.y - want).abs().max() <= 2e-6 * max(1.0, want.abs().max().item())


@pytest.fixture(scope="module")
def many_rows():
    return make_rows(20_000, 192, dtype=torch.float32) * torch.logspace(-3, 3, 20_000).unsqueeze(1)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [{"depth": 9}, {"depth": 4, "trees": 8, "bias": True}, {"depth": 5, "node_output": False}, {**FOREST, "trees": 8}],
    ids=str,
)
def test_no_row_changes_its_leaf(options, kind, many_rows):
    layer = make_layer(192, dtype=torch.float32, **options).eval()
    plain = layer.routed(many_rows)
    quantised = layer.quantize(kind).routed(many_rows)
    assert torch.equal(quantised.leaf, plain.leaf)
    assert torch.equal(layer(many_rows[-4000:]), quantised.y[-4000:])
    error = (quantised.y - plain.y).norm(dim=-1) / plain.y.norm(dim=-1).clamp(min=1e-6)
    assert error.median() < (0.006 if kind == "bf16" else 0.03)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("options", [{"depth": 8}, {"depth": 3, "trees": 4, "leaf_width": 3}, FOREST], ids=str)
def test_a_row_alone_gives_the_same_bits_as_in_any_batch(options, kind):
    layer = make_layer(100, dtype=torch.float32, **options).eval().quantize(kind)
    x = make_rows(600, 100, dtype=torch.float32)
    with torch.no_grad():
        whole = layer(x)
        for first, last in [(0, 1), (5, 8), (100, 230), (599, 600)]:
            assert torch.equal(layer(x[first:last]), whole[first:last])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_hostile_size_take_the_fp32_route(kind):
    layer = make_layer(64, dtype=torch.float32, depth=6).eval()
    x = make_rows(9, 64, dtype=torch.float32)
    x[1] *= 1e-30
    x[2] *= 1e25
    x[3, 5] = float("nan")
    x[4, 5] = float("inf")
    x[5] = 0
    plain = layer.routed(x)
    quantised = layer.quantize(kind).routed(x)
    assert torch.equal(quantised.leaf, plain.leaf)
    assert quantised.y[3].isnan().all()
    for row in (0, 1, 5, 6, 7, 8):
        assert quantised.y[row].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_new_parameters_are_quantised_anew(kind):
    layer = make_layer(40, dtype=torch.float32, depth=4).eval().quantize(kind)
    other = make_layer(40, dtype=torch.float32, depth=4, seed=7).eval().quantize(kind)
    x = make_rows(5, 40, dtype=torch.float32)
    with torch.no_grad():
        first, second = layer(x), other(x)
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), second)
        assert torch.equal(copy.deepcopy(other)(x), second)
        assert not torch.equal(first, second)
        fp32 = other.quantize(None)(x)
    assert 0 < (fp32 - second).abs().max() < 0.1 * fp32.abs().max()


def test_half_precision_rows_give_half_precision_outputs():
    layer = make_layer(40, dtype=torch.float32, depth=4).eval().quantize("bf16")
    x = make_rows(2, 5, 40, dtype=torch.bfloat16)
    with torch.no_grad():
        y = layer(x)
        assert y.dtype == torch.bfloat16
        assert y.shape == (2, 5, 40)
        assert torch.equal(y, layer(x.float()).bfloat16())


def test_a_compiled_layer_keeps_its_quantised_weights():
    layer = make_layer(32, dtype=torch.float32, depth=3).eval().quantize("int8")
    x = make_rows(4, 32, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="eager")(x), layer(x))


def test_the_configuration_of_a_model_keeps_the_quantisation(tmp_path):
    from transformers import AutoModelForMaskedLM

    import fastff.models

    config = fastff.models.UltraFastBertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        feedforward={"kind": "fff", "depth": 3},
    )  # fmt: skip
    torch.manual_seed(0)
    model = fastff.models.UltraFastBertForMaskedLM(config).eval()
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        plain = model(ids).logits
        quantised = fastff.models.quantize(model, "int8")(ids).logits
        model.save_pretrained(tmp_path)
        loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(ids).logits, quantised)
    assert not torch.equal(plain, quantised)
    assert all(m.quantization == "int8" for m in loaded.modules() if isinstance(m, fastff.FFF))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, in jvp
def test_what_quantised_layers_refuse():
    layer = make_layer(16, dtype=torch.float32, depth=2)
    with pytest.raises(ValueError, match="quantization 'int4' is not None, 'bf16' or 'int8'"):
        layer.quantize("int4")
    layer.quantize("int8")
    x = make_rows(3, 16, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="quantized to 'int8' cannot train"):
        layer(x)
    layer.eval()
    with pytest.raises(RuntimeError, match="no gradient flows"):
        layer(x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"no gradient flows .* quantize\(None\) for derivatives"):
        torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    with (
        torch.no_grad(),
        fastff.ops.use_backend("reference"),
        pytest.raises(fastff.BackendUnavailable, match="'reference'"),
    ):
        layer(x)
    with torch.no_grad(), pytest.raises(fastff.ShapeError):
        layer(x[:, :9])
    with torch.no_grad(), pytest.raises(fastff.BackendUnavailable, match="float64"):
        layer.double()(x)


def test_quantizing_does_not_import_the_compiler():
    code = """
import sys, torch, fastff
layer = fastff.FFF(16, depth=3).quantize("int8").eval()
with torch.no_grad():
    layer(torch.zeros(1, 16))
    layer.route(torch.zeros(1, 16))
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
