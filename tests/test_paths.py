"""FFF(paths=k): the k best leaves of every tree, in the parameters and the files of FFF."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import fastff
from conftest import make_rows, supported_isas
from fastff import files
from fastff.models.feedforward import build_feedforward, complete
from fastff.ops import native
from pairs import every_pair

ACTIVATIONS = {"swiglu": lambda s: F.silu(s[: len(s) // 2]) * s[len(s) // 2 :], "relu": F.relu, "gelu": F.gelu}
SIZES = ((1, 0, 1, 1), (1, 4, 4, 3), (3, 3, 2, 1), (2, 3, 8, 2), (2, 5, 1, 4))  # trees, depth, paths, leaf_width
QUANTIZED = {"bf16": 0.01, "int8": 0.04}  # relative error of norms, at most


def max_abs_error(got, want):
    return float((got.detach() - want.detach()).abs().max())


def make(trees=2, depth=4, paths=3, leaf_width=2, *, dtype=torch.float64, **options):
    torch.manual_seed(0)
    options = {"activation": "swiglu", "gate": "normalised", "bias": True, **options}
    sizes = {"trees": trees, "depth": depth, "paths": paths, "leaf_width": leaf_width}
    layer = fastff.FFF(12, 7, **sizes, node_output=False, dtype=dtype, **options)
    with torch.no_grad():
        for tensor in (*layer.parameters(), layer.router.balance):
            tensor.copy_(0.5 * make_rows(*tensor.shape, seed=tensor.numel()))
    return layer.eval()


def one_row(layer, x):
    """y and the chosen leaves of a row by the words of the definition: lists, sorted by what is compared."""
    c, y, chosen = layer.config, 0, []
    for t in range(c.trees):
        beam = [(0, 0.0)]
        for _ in range(c.depth):
            scores = [float(layer.w_in[t, n] @ x + (0 if layer.b_in is None else layer.b_in[t, n])) for n, _ in beam]
            children = [(2 * n + 1 + side, s + (2 * side - 1) * own)
                        for (n, s), own in zip(beam, scores, strict=True) for side in (0, 1)]  # fmt: skip
            compared = sorted(children, key=lambda c: -1 / (1 + math.exp(-c[1])) - float(layer.router.balance[t, c[0]]))
            beam = sorted(compared[: c.paths])
        weights = [1 / (1 + math.exp(-s)) for _, s in beam]
        for (heap, _), weight in zip(beam, weights, strict=True):
            leaf = heap - c.nodes
            first = c.nodes + leaf * c.leaf_in_rows
            rows = slice(first, first + c.leaf_in_rows)
            score = layer.w_in[t, rows] @ x + (0 if layer.b_in is None else layer.b_in[t, rows])
            out = ACTIVATIONS[c.activation](score) @ layer.w_out[t, leaf * c.leaf_width : (leaf + 1) * c.leaf_width]
            gate = len(beam) * weight / sum(weights) if c.gate else 1
            y = y + gate * (out + (0 if layer.b_out is None else layer.b_out[t, leaf]))
            chosen.append(leaf)
    return y, chosen


@every_pair(sizes=SIZES, activation=tuple(ACTIVATIONS), gate=("normalised", None), bias=(True, False),
            backend=("reference", "eager", "native", None), isa=supported_isas(), grad=(True, False))  # fmt: skip
def test_output_follows_the_definition(sizes, activation, gate, bias, backend, isa, grad):
    layer = make(*sizes, activation=activation, gate=gate, bias=bias, backend=backend)
    x = make_rows(3, 2, 12, seed=1)
    before = native.isa()
    native.set_isa(isa)
    try:
        with torch.set_grad_enabled(grad):
            routed = layer.routed(x)
            assert torch.equal(layer(x), routed.y)
    finally:
        native.set_isa(before)
    with torch.no_grad():
        for row in ((0, 0), (2, 1)):
            y, leaf = one_row(layer, x[row])
            assert max_abs_error(routed.y[row], y) <= 1e-12
            assert routed.leaf[row].tolist() == leaf
    assert routed.margin.shape == (3, 2)
    assert bool((routed.margin > 0).all())


@every_pair(sizes=SIZES, isa=supported_isas(dots=True), quantization=(None, *QUANTIZED), rows=(1, 9, 70))
def test_packed_inference_takes_the_leaves_of_fp32(sizes, isa, quantization, rows):
    exact = make(*sizes)
    layer = copy.deepcopy(exact).float().quantize(quantization)
    x = make_rows(rows, 12, seed=2)
    before = native.isa()
    native.set_isa(isa)
    try:
        with torch.no_grad():
            y, want = layer(x.float()), exact.routed(x)
            assert torch.equal(layer.route(x.float())[want.margin > 1e-5], want.leaf[want.margin > 1e-5])
            layer.track_usage()
            assert torch.equal(layer(x.float())[:1], y[:1]) or quantization is None
    finally:
        native.set_isa(before)
    assert (want.margin > 1e-5).double().mean() > 0.9
    assert int(layer.usage().counts.sum()) == rows * layer.config.trees * layer.config.chosen
    decided = want.margin > 1e-5
    error = (y[decided].double() - want.y[decided]).norm() / want.y[decided].norm()
    assert error <= QUANTIZED.get(quantization, 2e-6)


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_gradients_are_those_of_the_reference_and_zero_elsewhere(backend):
    x = make_rows(5, 12, seed=3)
    grads = {}
    for name in ("reference", backend):
        layer, own = make(backend=name), x.clone().requires_grad_()
        layer(own).square().sum().backward()
        grads[name] = [own.grad, *(p.grad for p in layer.parameters())]
    for got, want in zip(grads[backend], grads["reference"], strict=True):
        assert max_abs_error(got, want) <= 1e-12
    c = layer.config
    unvisited = torch.ones(c.trees, c.leaves, dtype=torch.bool)
    unvisited[torch.arange(c.trees).repeat_interleave(c.paths), layer.route(x)] = False
    leaf_grads = layer.w_in.grad[:, c.nodes :].unflatten(1, (c.leaves, -1))
    assert unvisited.any()
    assert bool((leaf_grads[unvisited] == 0).all())
    assert layer.w_in.grad[:, : c.nodes].abs().max() > 0, "through the gates to the nodes"

    def function(x, *parameters):
        named = dict(zip([n for n, _ in layer.named_parameters()], parameters, strict=True))
        return torch.func.functional_call(layer, named, (x,))

    assert torch.autograd.gradcheck(function, (own, *layer.parameters()), eps=1e-7, atol=1e-6, fast_mode=True)


def test_training_counts_and_balances_the_load():
    layer = make(1, 3, 2).train()
    layer.router.reset_parameters()
    x = make_rows(40, 12, seed=4)
    layer(x).sum().backward()
    counts = layer.usage().counts
    assert counts.sum() == 80
    balance = layer.router.balance[0, 7:]
    assert torch.equal(balance, 1e-3 * torch.sign(10 - counts[0]).float())
    assert torch.equal(layer.usage(x).counts.sum(1), torch.tensor([80]))
    assert layer.path(x).shape == (40, 2, 4)
    layer.reset_usage()
    assert layer.usage().counts.sum() == 0
    assert torch.equal(layer(x).detach(), layer.eval()(x).detach()), "a step of the balance changed no choice"


@every_pair(edit=("data", "numpy", "load", "balance"), quantization=(None, "int8"))
def test_a_packed_copy_follows_edits(edit, quantization):
    layer = make(dtype=torch.float32).quantize(quantization)
    x = make_rows(60, 12, dtype=torch.float32)
    with torch.no_grad():
        before = layer(x)
        if edit == "data":
            layer.w_out.data.mul_(-2)
        elif edit == "numpy":
            with layer.updating():
                layer.w_in.detach().numpy()[:, 3:9] *= -1
        elif edit == "load":
            layer.load_state_dict({name: 1.5 * tensor for name, tensor in layer.state_dict().items()})
        else:
            layer.router.balance.copy_(make_rows(*layer.router.balance.shape))
        after = layer(x)
        assert torch.equal(after, copy.deepcopy(layer)(x)), "a copy packs anew"
    assert not torch.allclose(after, before, atol=1e-3)


def test_joined_is_the_same_function_with_weights_of_its_own():
    layer = make()
    other, x = layer.joined(), make_rows(30, 12)
    assert max_abs_error(other(x), layer(x)) <= 1e-12
    assert not other.training
    with pytest.raises(fastff.ShapeError, match="paths=None"):
        fastff.FFF(8, depth=2).joined()


def test_files_and_configurations_keep_the_paths(tmp_path):
    layer = make(dtype=torch.float32).quantize("int8")
    files.save(layer, tmp_path / "layer.safetensors")
    again = files.load(tmp_path / "layer.safetensors").eval()
    assert again.config == layer.config
    x = make_rows(6, 12, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(x), layer(x))
    name = "2x4-leaf3-swiglu-paths3-gate"
    built = build_feedforward(name, 16)
    assert isinstance(built, fastff.FFF)
    assert built.config.name == name
    assert complete(name)["paths"] == 3
    assert complete("1x11")["paths"] is None


def test_compiled_and_exported_as_in_eager_mode():
    layer, x = make(depth=2, dtype=torch.float32), make_rows(9, 12, dtype=torch.float32)
    with torch.no_grad():
        want = layer(x)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        for run in (compiled, torch.export.export(layer, (x,)).module()):
            assert max_abs_error(run(x), want) <= 1e-6 * want.abs().max()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"paths": 0}, fastff.ShapeError, "paths 0 is not 1 to 8"),
        ({"paths": 9}, fastff.ShapeError, "paths 9 is not 1 to 8"),
        ({"paths": True}, fastff.ShapeError, "paths True is not an integer"),
        ({"gate": "boundary"}, fastff.ShapeError, "gate 'boundary' with paths=2 is not None, 'normalised'"),
        ({"node_output": True}, fastff.ShapeError, "paths 2 needs node_output=False"),
        ({"surrogate": "straight_through"}, fastff.ShapeError, "is for greedy trees, got paths=2"),
        ({"sparse_grad": True}, ValueError, "sparse_grad needs paths None, got 2"),
        ({"paths": None, "gate": "normalised"}, fastff.ShapeError, "gate 'normalised' is not None, 'boundary'"),
    ],
)
def test_what_does_not_go_together_is_named(options, error, message):
    with pytest.raises(error, match=message):
        fastff.FFF(12, **{"depth": 3, "paths": 2, "node_output": False, **options})


def test_calls_that_paths_do_not_have_are_refused():
    layer, x = make(), make_rows(2, 12)
    with pytest.raises(fastff.ShapeError, match=r"paths=3: use fastff\.FFF"):
        fastff.ops.forward(x, layer.w_in, layer.b_in, layer.w_out, layer.b_out, config=layer.config)
    with pytest.raises(fastff.ShapeError, match="no soft form"):
        layer.soft(x)
    with pytest.raises(fastff.ShapeError, match="in_features 5"):
        layer(x[:, :5])
    layer.float().quantize("int8")
    with pytest.raises(RuntimeError, match="no gradient flows"):
        layer(x.float().requires_grad_())
    with pytest.raises(RuntimeError, match="cannot train"):
        layer.train()(x.float())
