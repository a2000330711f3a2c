"""Numbers of the published implementations (tests/golden/cases.json says which), within its tolerances."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastff
from conftest import weights_of
from fastff.ops import reference

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())["layer_cases"]
Y = {"rtol": 1e-5, "atol": 2e-6}
GRAD = {"rtol": 1e-5, "atol": 2e-5}
BACKENDS = ("reference", "native")


def cases(group):
    return pytest.mark.parametrize("case", [c for c in CASES if c["group"] == group], ids=lambda c: c["file"])


def run(layer, x, grad_y, backend):
    x = x.clone().requires_grad_()
    routed = fastff.ops.forward(x, *weights_of(layer), config=layer.config, backend=backend)
    (routed.y * grad_y).sum().backward()
    return routed, x.grad


@cases("cramming_fff")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("isa")
def test_ultrafastbert_layer(case, backend):
    t = load_file(GOLDEN / case["file"])
    state = {k: t[k] for k in ("linear_in.weight", "linear_in.bias", "linear_out.weight")}
    layer = fastff.FFF.from_published(state, depth=case["depth"])
    assert layer.config.trees == case["parallel_size"]
    routed, grad_x = run(layer, t["x"], t["grad_y"], backend)
    torch.testing.assert_close(routed.y, t["y"], **Y)
    torch.testing.assert_close(grad_x, t["grad_x"], **GRAD)
    path = layer.path(t["x"]).flatten(0, -3)
    assert torch.equal(path, t["path_nodes"].to(path.dtype))
    rows = case["n_nodes"] * case["parallel_size"]
    torch.testing.assert_close(layer.w_in.grad.reshape(rows, -1), t["grad.linear_in.weight"], **GRAD)
    torch.testing.assert_close(layer.b_in.grad.flatten(), t["grad.linear_in.bias"], **GRAD)
    torch.testing.assert_close(layer.w_out.grad.reshape(rows, -1).t(), t["grad.linear_out.weight"], **GRAD)


@cases("bmm_fff")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("isa")
def test_benchmark_layer(case, backend):
    t = load_file(GOLDEN / case["file"])
    layer = fastff.FFF(case["input_width"], case["output_width"], depth=case["depth"])
    with torch.no_grad():
        layer.w_in.copy_(t["w1s"].unsqueeze(0))
        layer.w_out.copy_(t["w2s"].unsqueeze(0))
    routed, _ = run(layer, t["x"], torch.ones_like(t["y"].squeeze(1)), backend)
    torch.testing.assert_close(routed.y, t["y"].squeeze(1), **Y)
    assert torch.equal(layer.path(t["x"]).squeeze(1), t["path_nodes"].to(torch.int64))


def fastfeedforward_state(t):
    names = ("depth", "node_weights", "node_biases", "w1s", "b1s", "w2s", "b2s")
    return {name: t[name] for name in names if name in t}


def published_gradients(layer):
    """The layer's gradients under the published names and shapes."""
    c = layer.config
    w_in, b_in = layer.w_in.grad[0], layer.b_in.grad[0]
    return {
        "node_weights": w_in[: c.nodes],
        "node_biases": b_in[: c.nodes, None],
        "w1s": w_in[c.nodes :].view(c.leaves, c.leaf_width, -1).transpose(1, 2),
        "b1s": b_in[c.nodes :].view(c.leaves, c.leaf_width),
        "w2s": layer.w_out.grad[0].view(c.leaves, c.leaf_width, -1),
        "b2s": layer.b_out.grad[0],
    }


def check_gradients(layer, grad_x, t, prefix, grad_x_name):
    torch.testing.assert_close(grad_x, t[grad_x_name], **GRAD)
    for name, grad in published_gradients(layer).items():
        torch.testing.assert_close(grad, t[f"{prefix}.grad.{name}"], **GRAD)


@cases("fast_fff")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("isa")
def test_fastfeedforward_layer_routed_hard(case, backend):
    t = load_file(GOLDEN / case["file"])
    layer = fastff.FFF.from_published(fastfeedforward_state(t))
    routed, grad_x = run(layer, t["x"], t["grad_y"], backend)
    torch.testing.assert_close(routed.y, t["y_hard"], **Y)
    torch.testing.assert_close(routed.y, t["y_eval_plus_b2"], **Y)
    assert torch.equal(routed.leaf.flatten(), t["leaf_index"].to(torch.int64))
    check_gradients(layer, grad_x, t, "hard", "grad_x_hard")


@cases("fast_fff")
@pytest.mark.parametrize("hardened", [False, True])
def test_fastfeedforward_layer_in_training(case, hardened):
    t = load_file(GOLDEN / case["file"])
    layer = fastff.FFF.from_published(fastfeedforward_state(t), surrogate="soft").train()
    x = t["x"].clone().requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, t["y_soft"], **Y)
    mixed = layer.soft(t["x"])
    torch.testing.assert_close(mixed.entropy.flatten(), t["entropies"], **Y)
    exact = reference.forward_soft(t["x"].double(), weights_of(layer).map(torch.Tensor.double), config=layer.config)
    torch.testing.assert_close(exact.mixture[:, 0], t["mixture_f64"], rtol=1e-12, atol=1e-12)
    loss = (y * t["grad_y"]).sum()
    if hardened:
        loss = loss + case["hardening_h"] * layer.hardening_loss()
    loss.backward()
    prefix = "soft_hard_loss" if hardened else "soft"
    check_gradients(layer, x.grad, t, prefix, f"grad_x_{prefix}")
