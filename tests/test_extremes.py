"""Numbers at the ends of their range, equal gates and tensors that are not what their memory says: the same meaning in
the reference and in the kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastff
from conftest import make_layer, make_rows, weights_of
from fastff.config import ACTIVATIONS
from fastff.ops import conditional_matmul, reference

LARGE = [88.5, 89.0, 1e4, 1e19, 1e20, 1e38, 3e38]


def one_neuron(activation, score, dtype=torch.float32):
    """Output and its derivative by x of a layer that is act(x) alone."""
    options = {"node_output": False} if activation == "swiglu" else {}
    layer = make_layer(1, 1, depth=0, activation=activation, dtype=dtype, **options)
    with torch.no_grad():
        layer.w_in.fill_(1)
        layer.w_out.fill_(1)
    x = torch.tensor([[score]], dtype=dtype, requires_grad=True)
    y = fastff.ops.forward(x, *weights_of(layer), config=layer.config, backend="native").y
    return y.item(), torch.autograd.grad(y.sum(), x)[0].item()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "swiglu"])
def test_activations_of_large_scores_are_their_limits(activation, sign):
    for size in LARGE:
        score = sign * size
        value, slope = one_neuron(activation, score)
        left = {"identity": (score, 1.0), "abs": (size, -1.0)}.get(activation, (0.0, 0.0))
        want = left if sign < 0 else (score, 1.0)
        assert value == pytest.approx(want[0], rel=1e-6, abs=1e-30), score
        assert slope == pytest.approx(want[1], rel=1e-6, abs=1e-30), score


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations_between_agree_with_float64(activation):
    scores = torch.linspace(-100, 100, 401, dtype=torch.float64, requires_grad=True)
    want = reference.activate(scores, activation)
    slopes = torch.autograd.grad(want.sum(), scores)[0]
    for score, value, slope in zip(scores.tolist(), want.tolist(), slopes.tolist(), strict=True):
        got = one_neuron(activation, score)
        assert got == pytest.approx((value, slope), rel=2e-6, abs=1e-6), score


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("gate", ["boundary", "boundary_min"])
@pytest.mark.parametrize("tau", [1e-37, 1e-39, 1e-44, 1e-60, 1e-300])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_score_of_zero_has_gate_zero_however_small_tau_is(backend, tau, gate):
    layer = make_layer(6, 4, depth=3, gate=gate, tau=tau)
    x = torch.cat((torch.zeros(2, 6), make_rows(3, 6).float())).requires_grad_()
    y = fastff.ops.forward(x, *weights_of(layer), config=layer.config, backend=backend).y
    grads = torch.autograd.grad(y.sum(), [x, *layer.parameters()])
    ungated = make_layer(6, 4, depth=3)
    assert torch.equal(y[:2], torch.zeros(2, 4))
    assert torch.allclose(y[2:], fastff.ops.forward(x, *weights_of(ungated), config=ungated.config).y[2:], rtol=1e-5)
    assert all(grad.isfinite().all() for grad in grads)


def equal_gates():
    """A row whose three decisions have one score, so that their gates are equal."""
    layer = make_layer(4, 3, depth=3, gate="boundary_min", tau=2.0, dtype=torch.float64)
    with torch.no_grad():
        layer.w_in[0, :7] = torch.eye(4, dtype=torch.float64)[0] * 0.5
    return layer, torch.tensor([[1.0, 0.3, -0.2, 0.4]], dtype=torch.float64)


def gradients(layer, x, run):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(run(x).y.sum(), [x, layer.w_in, layer.w_out])


@pytest.mark.usefixtures("isa")
def test_equal_gates_have_one_subgradient_in_every_form():
    layer, x = equal_gates()
    weights, config = weights_of(layer), layer.config
    want = gradients(layer, x, lambda x: reference.forward(x, weights, config=config))
    masked = gradients(layer, x, lambda x: reference.forward_masked(x, weights, config=config))
    native = gradients(layer, x, lambda x: fastff.ops.forward(x, *weights, config=config, backend="native"))
    for forms in zip(want, masked, native, strict=True):
        for form in forms[1:]:
            assert (form - forms[0]).abs().max() <= 1e-12


def test_of_equal_gates_the_one_nearest_the_root_takes_the_gradient():
    score = torch.full((1, 3), 0.7, dtype=torch.float64, requires_grad=True)
    config = fastff.TreeConfig(in_features=4, out_features=3, depth=3, gate="boundary_min", tau=1.0)
    slope = 1 - torch.tanh(torch.tensor(0.7, dtype=torch.float64)) ** 2
    got = torch.autograd.grad(reference.gates(score, config=config).sum(), score)[0]
    assert torch.allclose(got, slope * torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("size", [1e30, 1e35, 1e36, 1e37, 1e38])
def test_rows_of_large_numbers_take_the_fp32_route(size, kind):
    layer = make_layer(64, 64, depth=8, activation="relu").eval()
    x = make_rows(200, 64).float()
    x = x / x.abs().amax(1, keepdim=True) * size
    with torch.no_grad():
        want = reference.forward(x, weights_of(layer), config=layer.config)
        got = fastff.ops.forward(x, *weights_of(layer), config=layer.config, backend="native").leaf
        assert torch.equal(layer.quantize(kind).route(x)[:, 0], got[:, 0])
        values = layer(x)
    fine = want.y.isfinite().all(1)
    assert size > 1e37 or fine.all()
    assert values[fine].isfinite().all()


NEGATED = {
    "float32": torch.float32,
    "float64": torch.float64,
}


@pytest.mark.parametrize("dtype", NEGATED.values(), ids=NEGATED)
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("negated", ["x", "w_in", "w_out", "grad_y"])
def test_the_negative_bit_counts(negated, backend, dtype):
    layer = make_layer(8, 6, depth=4, dtype=dtype)
    tensors = {"x": make_rows(5, 8).to(dtype), "w_in": layer.w_in.detach(), "w_out": layer.w_out.detach()}
    tensors["grad_y"] = make_rows(5, 6, seed=3).to(dtype)

    def run(change):
        given = {name: change(t) if name == negated else t for name, t in tensors.items()}
        leaves = [given[name].clone().requires_grad_() if name != negated else given[name] for name in ("x", "w_in")]
        leaves = [t if t.requires_grad else t.requires_grad_() for t in leaves]
        y = fastff.ops.forward(leaves[0], leaves[1], None, given["w_out"], None, config=layer.config, backend=backend).y
        return y, *torch.autograd.grad(y, leaves, given["grad_y"])

    for got, want in zip(run(torch._neg_view), run(torch.neg), strict=True):
        assert torch.equal(got, want)
    with torch.no_grad():
        x = tensors["x"]
        assert torch.equal(layer.double()(torch._neg_view(x.double())), layer(-x.double()))


def test_the_negative_bit_counts_in_packed_layers_and_routes():
    layer, x = make_layer(8, depth=4).eval(), make_rows(5, 8).float()
    with torch.no_grad():
        layer(x)  # packs
        for call in (layer, layer.route, layer.quantize("int8")):
            assert torch.equal(call(torch._neg_view(x)), call(-x))
        imaginary = torch.randn(5, 8, dtype=torch.complex64, generator=torch.Generator().manual_seed(1)).conj().imag
        assert imaginary.is_neg()
        assert torch.equal(layer(imaginary), layer(imaginary.resolve_neg()))


def test_the_negative_bit_counts_in_conditional_products():
    x, leaf = make_rows(5, 8), torch.arange(10).view(5, 2) % 3
    gate, w_in, w_out = make_rows(5, 2).abs(), make_rows(3, 4, 8, seed=4), make_rows(3, 4, 6, seed=5)
    want = conditional_matmul(-x, leaf, gate, w_in, w_out, activation="gelu", backend="native")
    got = conditional_matmul(torch._neg_view(x), leaf, gate, w_in, w_out, activation="gelu", backend="native")
    assert torch.equal(got, want)


def test_silu_of_the_lowest_number_is_zero():
    assert F.silu(torch.tensor(-1e38)).item() == 0
    assert one_neuron("silu", -1e38)[0] == 0
