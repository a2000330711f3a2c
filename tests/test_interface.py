"""The one door: checks, dispatch, autograd, compile, export, autocast."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastff
from conftest import make_layer, make_rows, supported_isas, weights_of
from fastff.conditional import ConditionalConfig
from fastff.ops import backends, interface, reference, registered
from fastff.ops.library import find_library

GATED = {"depth": 3, "trees": 2, "leaf_width": 2, "gate": "boundary", "bias": True}
LEAVES = {"depth": 2, "trees": 2, "leaf_width": 3, "node_output": False, "activation": "swiglu", "bias": True}
PUBLISHED = {"depth": 4}
LEAST = {**GATED, "gate": "boundary_min", "activation": "abs"}


def run(layer, x, backend=None):
    return fastff.ops.forward(x, *weights_of(layer), config=layer.config, backend=backend)


def test_backends_are_listed_and_native_is_among_them():
    assert fastff.ops.available_backends()[:2] == ("reference", "native")


@pytest.mark.parametrize("options", [PUBLISHED, GATED, LEAVES], ids=str)
def test_opcheck(options):
    layer = make_layer(6, 5, **options)
    arguments = (make_rows(7, 6, dtype=torch.float32).requires_grad_(), *weights_of(layer))
    torch.library.opcheck(torch.ops.fastff.forward, (*arguments, *registered._flat(layer.config), "native"))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("options", [PUBLISHED, GATED, LEAST, LEAVES], ids=str)
def test_gradcheck(options, backend):
    layer = make_layer(5, 4, dtype=torch.float64, **options)
    x = make_rows(6, 5, seed=4).requires_grad_()
    assert run(layer, x).margin.min() > 1e-3, "finite differences must not flip a turn: choose another seed"
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *parameters):
        given = dict(zip(names, parameters, strict=True))
        weights = (given["w_in"], given.get("b_in"), given["w_out"], given.get("b_out"))
        return fastff.ops.forward(x, *weights, config=layer.config, backend=backend).y

    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(function, (x, *parameters), eps=1e-6, atol=1e-7)


def test_one_layer_used_twice_and_backward_twice():
    layer = make_layer(6, **PUBLISHED, dtype=torch.float64)
    x = make_rows(5, 6)
    grads = []
    for backend in ("native", "reference"):
        y = run(layer, run(layer, x, backend).y, backend).y
        first = torch.autograd.grad(y.sum(), list(layer.parameters()), retain_graph=True)
        again = torch.autograd.grad(y.sum(), list(layer.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        grads.append(first)
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() <= 1e-12


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 6), (2, 1, 3, 6)])
def test_any_leading_shape(shape):
    layer = make_layer(6, 5, **GATED)
    routed = run(layer, make_rows(*shape, dtype=torch.float32))
    assert routed.y.shape == (*shape[:-1], 5)
    assert routed.leaf.shape == (*shape[:-1], 2)
    assert routed.margin.shape == shape[:-1]


@pytest.mark.parametrize("options", [PUBLISHED, LEAVES], ids=str)
def test_compile_without_graph_breaks(options):
    layer = make_layer(6, 5, **options)
    x = make_rows(9, 6, dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    want, got = layer(x), compiled(x)
    assert torch.equal(want, got)
    got.sum().backward()
    compiled_grad = layer.w_in.grad.clone()
    layer.zero_grad()
    want.sum().backward()
    assert torch.allclose(compiled_grad, layer.w_in.grad, atol=1e-6)
    layer.eval()
    with torch.no_grad():  # the compiled layer reads its parameters, the other one packed leaves: sums in another order
        compiled, packed = torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)
        exact = layer.double()(x.double())
    plain_error = (compiled - exact).abs().max()
    assert (packed - exact).abs().max() <= 2 * plain_error + 1e-6


def test_export_keeps_the_op():
    layer = make_layer(6, 5, **PUBLISHED).eval()
    x = make_rows(9, 6, dtype=torch.float32)
    rows = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},))
    assert "fastff.forward" in str(program.graph)
    other = make_rows(4, 6, seed=3, dtype=torch.float32)
    assert torch.equal(program.module()(other), layer(other))


class Watcher(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_who_watches_sees_the_registered_op_and_its_backward():
    layer, x = make_layer(6, 5, **GATED), make_rows(4, 6, dtype=torch.float32)
    want = torch.autograd.grad(run(layer, x).y.sum(), list(layer.parameters()))
    with Watcher() as watcher:
        got = torch.autograd.grad(run(layer, x).y.sum(), list(layer.parameters()))
    assert {"fastff.forward.default", "fastff.backward.default"} <= set(watcher.seen)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.filterwarnings("ignore")  # torch's own: tracing is deprecated
def test_a_trace_holds_the_op():
    layer, x = make_layer(6, 5, **PUBLISHED), make_rows(4, 6, dtype=torch.float32)
    traced = torch.jit.trace(layer, x, check_trace=False)
    assert "fastff::forward" in str(traced.graph)
    assert torch.equal(traced(2 * x), layer(2 * x))


def test_fake_tensors_take_their_shape_from_the_op():
    with FakeTensorMode():
        layer = make_layer(6, 5, **GATED)
        assert run(layer, torch.empty(3, 2, 6)).y.shape == (3, 2, 5)


def test_a_second_derivative_of_the_registered_op_is_refused():
    layer, x = make_layer(6, 5, **PUBLISHED), make_rows(4, 6, dtype=torch.float32).requires_grad_()
    with Watcher():
        (first,) = torch.autograd.grad(run(layer, x).y.square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="use backend='reference' or eager mode"):
            first.sum().backward()


def test_autocast_computes_in_float32_and_returns_the_autocast_dtype():
    layer = make_layer(32, **PUBLISHED)
    x = make_rows(8, 32, dtype=torch.float32)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        from_bf16 = layer(x.bfloat16())
        got = layer(x)
    assert got.dtype == from_bf16.dtype == torch.bfloat16
    assert torch.equal(got, want.bfloat16())
    got.sum().backward()
    assert layer.w_in.grad.dtype == torch.float32
    layer.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("options", [PUBLISHED, GATED, LEAST, LEAVES], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32_and_rounded_once(dtype, options):
    layer = make_layer(16, **options, dtype=dtype)
    x = make_rows(40, 16, dtype=dtype).requires_grad_()
    want = reference.forward(x.float(), weights_of(layer).map(torch.Tensor.float), config=layer.config)
    for backend in (None, "native"):
        routed = run(layer, x, backend)
        assert routed.y.dtype == dtype
        assert torch.equal(routed.leaf, want.leaf)
        torch.testing.assert_close(routed.y, want.y.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    routed.y.sum().backward()
    assert x.grad.dtype == layer.w_in.grad.dtype == dtype
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), want.y.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    assert layer._packed.bytes > 0


@pytest.mark.parametrize("options", [PUBLISHED, GATED, LEAST, LEAVES, {"depth": 0}], ids=str)
def test_masked_and_straight_through_forms_compute_the_same_function(options):
    layer = make_layer(6, 5, dtype=torch.float64, **options)
    x = make_rows(30, 6)
    want = reference.forward(x, weights_of(layer), config=layer.config)
    for straight_through in (False, True):
        got = reference.forward_masked(x, weights_of(layer), config=layer.config, straight_through=straight_through)
        assert (got.y - want.y).abs().max() <= 1e-12
        assert torch.equal(got.leaf, want.leaf)
        assert torch.allclose(got.margin, want.margin)


@pytest.mark.parametrize("options", [GATED, LEAST], ids=str)
def test_masked_form_has_the_gradients_of_the_gathered_form(options):
    layer = make_layer(6, 5, dtype=torch.float64, **options)
    x = make_rows(30, 6)
    one = torch.autograd.grad(
        reference.forward(x, weights_of(layer), config=layer.config).y.sum(), list(layer.parameters())
    )
    two = torch.autograd.grad(
        reference.forward_masked(x, weights_of(layer), config=layer.config).y.sum(), list(layer.parameters())
    )
    for a, b in zip(one, two, strict=True):
        assert (a - b).abs().max() <= 1e-12


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("gate", "passed"), [("boundary", [1, 0.5, 0.125, 0.0625]), ("boundary_min", [1, 0.5, 0.25, 0.25])]
)
def test_what_hangs_below_a_node_is_weighed_by_the_gates_above(gate, passed, backend):
    """Each neuron of a path adds its score to a column of its own."""
    gates = torch.tensor([0.5, -0.25, 0.5], dtype=torch.float64)  # tanh(|score| / tau) of each turn, and its side
    turns = gates.atanh() * 0.5
    config = fastff.TreeConfig(in_features=1, out_features=15, depth=3, activation="identity", gate=gate, tau=0.5)
    path = [0, 2, 5, 12]  # right, left, right
    w_in = torch.zeros(1, 15, 1, dtype=torch.float64)
    w_in[0, path, 0] = torch.cat((turns, turns.new_ones(1)))
    x, w_out = turns.new_ones(1, 1), torch.eye(15, dtype=torch.float64)[None]
    routed = fastff.ops.forward(x, w_in, None, w_out, None, config=config, backend=backend)
    assert routed.leaf.item() == 12 - 7
    want = w_in[0, path, 0] * torch.tensor(passed, dtype=torch.float64)
    assert (routed.y[0, path] - want).abs().max() <= 1e-12


@pytest.mark.parametrize("gate", ["boundary", "boundary_min"])
def test_a_gated_layer_is_continuous_where_its_turns_flip(gate):
    """Walk a segment between two rows that reach different leaves: y has no jump, biases included."""
    layer = make_layer(6, 5, dtype=torch.float64, **{**LEAVES, "gate": gate})
    a, b = make_rows(2, 6, seed=5)
    x = a + torch.linspace(0, 1, 20001, dtype=torch.float64)[:, None] * (b - a)
    routed = run(layer, x)
    assert (routed.leaf[1:] != routed.leaf[:-1]).any()
    assert (routed.y[1:] - routed.y[:-1]).abs().max() < 5e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 7)}, "in_features 7 .* does not match in_features 6"),
        ({"x": torch.zeros(())}, "a scalar does not match in_features 6"),
        ({"w_in": torch.zeros(1, 30, 6)}, r"w_in \(1, 30, 6\) does not match \(1, 31, 6\)"),
        ({"b_in": torch.zeros(1, 31)}, r"b_in \(1, 31\) does not match None"),
        ({"w_out": torch.zeros(2, 31, 5)}, r"w_out \(2, 31, 5\) does not match \(1, 31, 5\)"),
        ({"x": torch.zeros(3, 6, dtype=torch.float64)}, "w_in is torch.float32, x is torch.float64"),
        ({"x": torch.zeros(3, 6, dtype=torch.int64)}, "x is torch.int64, expected a floating dtype"),
        ({"w_out": torch.zeros(1, 31, 5, device="meta")}, "w_out is on meta, x is on cpu"),
    ],
)
def test_bad_tensors_are_named(change, message):
    layer = make_layer(6, 5, **PUBLISHED)
    tensors = {"x": torch.zeros(3, 6), "w_in": layer.w_in, "b_in": None, "w_out": layer.w_out, "b_out": None, **change}
    with pytest.raises(fastff.ShapeError, match=message):
        fastff.ops.forward(*tensors.values(), config=layer.config)


def test_depth_zero_is_a_dense_layer_and_goes_to_matrix_products():
    layer = make_layer(6, 5, depth=0, leaf_width=7, trees=2, bias=True)
    x = make_rows(3, 6, dtype=torch.float32)
    assert interface.resolve(None, x, layer.config) == "reference"
    want = sum(
        torch.nn.functional.gelu(x @ w_in.t() + b_in) @ w_out
        for w_in, b_in, w_out in zip(layer.w_in, layer.b_in, layer.w_out, strict=True)
    )
    torch.testing.assert_close(layer.eval()(x), want)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(run(layer, x, "native").y, want)


def test_a_named_backend_runs_or_says_why_not():
    layer = make_layer(6, 5, **PUBLISHED)
    x = make_rows(3, 6, dtype=torch.float32)
    with pytest.raises(fastff.BackendUnavailable, match="'cuda' is not one of reference, native, triton"):
        run(layer, x, "cuda")
    with pytest.raises(fastff.BackendUnavailable, match="not one of"), fastff.ops.use_backend("cuda"):
        pass
    with fastff.ops.use_backend("reference"):
        assert backends.forced_backend() == "reference"
        reference_y = layer.eval()(x)
    assert backends.forced_backend() is None
    assert torch.allclose(reference_y, layer(x), atol=1e-6)


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", supported_isas(dots=True, tiles=True))
def test_the_environment_forces_an_instruction_set(name):
    """Read when the core is first asked, so by a process of its own; without torch it takes a tenth of a second."""
    ask = f"import ctypes; core = ctypes.CDLL({str(find_library())!r}); core.fastff_isa.restype = ctypes.c_char_p"
    done = run_python(f"{ask}; print(core.fastff_isa().decode())", FASTFF_ISA=name)
    assert done.stdout.strip() == name, done.stderr


def test_an_instruction_set_that_cannot_run_makes_native_unavailable_and_says_so():
    code = "import fastff; fastff.ops.forward; print(fastff.ops.backends.why_unavailable('native'))"
    done = run_python(code, FASTFF_ISA="mmx")
    assert "instruction set 'mmx' is not one of" in done.stdout, done.stderr


def test_import_is_light():
    ours = "import fastff; fastff.FFF, fastff.ops.forward, fastff.load"
    done = run_python(f"import sys, torch; before = set(sys.modules); {ours}; print(*(set(sys.modules) - before))")
    brought = set(done.stdout.split())
    assert "fastff.layers" in brought, done.stderr
    heavy = {"triton", "transformers", "cyclopts", "numpy"}
    assert not heavy & brought, "importing fastff must not bring in more than torch does"


PLAIN = fastff.TreeConfig(in_features=768, out_features=768, depth=11)


def test_explain_says_where_a_dense_layer_would_win():
    few_of_many = fastff.TreeConfig(in_features=768, out_features=768, depth=2, trees=64, node_output=False)
    slower = fastff.ops.explain(few_of_many, 1024, threads=1)
    assert slower.predicted_us > slower.dense_us
    assert slower.reason.endswith("; a dense layer with as many neurons is expected to be faster")
    assert "dense layer" not in fastff.ops.explain(PLAIN, 1024, threads=1).reason


def test_explain_knows_layers_behind_routers():
    sizes = {"in_features": 768, "out_features": 768, "leaf_width": 32}
    router = fastff.FlatRouter(768, leaves=96, k=3).config
    experts = ConditionalConfig(router=router, leaves=96, **sizes)
    one, many = (fastff.ops.explain(experts, rows, backend="native", threads=1) for rows in (1, 1024))
    assert (one.form, one.choices["k"], one.choices["routing_scores"]) == ("grouped", 3, 96)
    assert 0 < one.predicted_us < many.predicted_us < many.dense_us
    assert fastff.ops.explain(experts, 0, backend="native").predicted_us == 0
    paths = fastff.TreeConfig(depth=8, paths=8, node_output=False, activation="swiglu", **sizes)
    explained = fastff.ops.explain(paths, 128, threads=1)
    assert explained.choices["k"] == 8
    assert explained.choices["routing_scores"] == 1 + 2 + 4 + 5 * 8
    fewer = fastff.TreeConfig(depth=8, paths=2, node_output=False, activation="swiglu", **sizes)
    assert fastff.ops.explain(fewer, 128, threads=1).predicted_us < explained.predicted_us
    all_leaves = fastff.TreeConfig(depth=3, paths=8, node_output=False, activation="swiglu", **sizes)
    assert "a dense layer" in fastff.ops.explain(all_leaves, 1024, threads=1).reason
    assert fastff.ops.explain(experts, 8, backend="eager").predicted_us is None
    with pytest.raises(fastff.BackendUnavailable, match="'avx' is not one of reference, eager, native, triton"):
        fastff.ops.explain(experts, 8, backend="avx")
    with pytest.raises(ValueError, match="not one of fastff's"):
        fastff.ops.explain(ConditionalConfig(router=None, leaves=96, **sizes), 8)


def test_explain_names_what_the_reference_would_do():
    explained = fastff.ops.explain(PLAIN, 8, backend="reference")
    assert (explained.backend, explained.form) == ("reference", "gather")
    dense = fastff.ops.explain(fastff.TreeConfig(in_features=8, out_features=8, depth=0), 8)
    assert (dense.backend, dense.form) == ("reference", "dense")
    assert "depth 0" in str(dense)
    assert "active_neurons = 12" in str(explained)


def test_explain_names_the_native_forms():
    forms = [fastff.ops.explain(PLAIN, rows, threads=1, backend="native").form for rows in (1, 64, 16384)]
    assert forms == ["lockstep", "grouped", "sorted"]
    single = fastff.ops.explain(PLAIN, 1, threads=2, backend="native")
    assert single.choices["threads"] == 1
    assert single.choices["isa"] == fastff.ops.native.isa()
    assert 0 < single.predicted_us < single.dense_us
    forest = fastff.TreeConfig(in_features=768, out_features=768, depth=4, trees=64)
    assert fastff.ops.explain(forest, 5000, backend="native").choices["block_rows"] < 5000


def test_a_layer_that_uses_most_neurons_takes_the_masked_form():
    wide = fastff.TreeConfig(in_features=768, out_features=768, depth=1, trees=16)
    layer = make_layer(768, dtype=torch.float32, depth=1, trees=16).eval()
    x = make_rows(256, 768, dtype=torch.float32)
    explained = fastff.ops.explain(wide, len(x), threads=1)
    assert (explained.backend, explained.form) == ("reference", "masked")
    assert fastff.ops.explain(wide, 1, threads=1).form == "lockstep"
    assert fastff.ops.explain(wide, len(x), threads=1, backend="native").form == "grouped"
    with torch.no_grad():
        masked, native = layer.routed(x), fastff.ops.forward(x, *weights_of(layer), config=wide, backend="native")
    assert torch.equal(masked.leaf, native.leaf)
    assert not torch.equal(masked.y, native.y), "two forms do not round alike"
    assert (masked.y - native.y).abs().max() < 1e-4


def test_explain_describes_the_gpu_kernels_without_a_gpu():
    explained = fastff.ops.explain(PLAIN, 65536, dtype=torch.bfloat16, backend="triton")
    assert explained.form == "grouped"
    assert explained.choices["tiles.rows"] == 64


def test_explain_refuses_what_cannot_be():
    with pytest.raises(fastff.BackendUnavailable, match="float64"):
        fastff.ops.explain(PLAIN, 8, dtype=torch.float64, backend="triton")
    with pytest.raises(fastff.BackendUnavailable, match="'no-such' is not one of"):
        fastff.ops.explain(PLAIN, 8, backend="no-such")
    with pytest.raises(fastff.ShapeError, match="rows -1"):
        fastff.ops.explain(PLAIN, -1)


DIFFERENTIABLE = [GATED, LEAVES, PUBLISHED]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, for jvp
@pytest.mark.parametrize("options", DIFFERENTIABLE, ids=str)
def test_derivatives_by_function_transforms_are_those_of_the_reference(options):
    layer = make_layer(6, **options, dtype=torch.float64).eval()
    x, direction = make_rows(6), make_rows(6, seed=2)

    def loss(row):
        return layer(row.unsqueeze(0)).square().sum()

    def truth(row):
        return run(layer, row.unsqueeze(0), "reference").y.square().sum()

    want = torch.autograd.functional.jacobian(truth, x)
    second = torch.autograd.functional.hessian(truth, x)
    assert second.abs().sum() > 0
    transforms = {
        "grad": (lambda: torch.func.grad(loss)(x), want),
        "jacrev": (lambda: torch.func.jacrev(loss)(x), want),
        "jacfwd": (lambda: torch.func.jacfwd(loss)(x), want),
        "jvp": (lambda: torch.func.jvp(loss, (x,), (direction,))[1], want @ direction),
        "vjp": (lambda: torch.func.vjp(loss, x)[1](torch.ones((), dtype=x.dtype))[0], want),
        "hessian": (lambda: torch.func.hessian(loss)(x), second),
        "hvp": (lambda: torch.func.jvp(torch.func.grad(loss), (x,), (direction,))[1], second @ direction),
        "autograd hvp": (lambda: torch.autograd.functional.hvp(loss, x, direction)[1], second @ direction),
        "autograd hessian": (lambda: torch.autograd.functional.hessian(loss, x), second),
        "per row": (lambda: torch.func.vmap(torch.func.grad(loss))(x.unsqueeze(0))[0], want),
    }
    for name, (compute, expected) in transforms.items():
        assert torch.allclose(compute(), expected, rtol=1e-9, atol=1e-12), name
    with torch.no_grad():
        assert torch.allclose(torch.func.jvp(loss, (x,), (direction,))[1], want @ direction)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, direction)
            tangent = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
            assert torch.allclose(tangent, want @ direction)


@pytest.mark.parametrize("options", DIFFERENTIABLE, ids=str)
def test_second_derivatives_reach_the_weights(options):
    layer = make_layer(5, **options, dtype=torch.float64)
    x = make_rows(4, 5).requires_grad_()

    def penalty(backend):
        y = run(layer, x, backend).y
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), list(layer.parameters()), allow_unused=True)

    for got, want in zip(penalty("native"), penalty("reference"), strict=True):
        assert (got is None) == (want is None)
        assert want is None or torch.allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, for jvp
def test_a_named_backend_without_derivatives_says_what_to_use():
    layer = make_layer(6, **GATED, backend="native")
    with pytest.raises(fastff.BackendUnavailable, match=r"'native' has no derivatives under torch\.func .*'reference'"):
        torch.func.jvp(layer, (make_rows(2, 6, dtype=torch.float32),), (make_rows(2, 6, dtype=torch.float32),))


def test_function_transforms_leave_no_trace_in_the_usage():
    layer = make_layer(6, **GATED)
    torch.func.grad(lambda x: layer(x).sum())(make_rows(2, 6, dtype=torch.float32))
    assert layer.usage().counts.sum() == 0


def test_the_negative_bit_is_read():
    layer = make_layer(6, **GATED).eval()
    x = make_rows(3, 6, dtype=torch.float32)
    with torch.no_grad():
        want = layer(-x)
        assert torch.equal(layer(torch._neg_view(x)), want)
        torch.testing.assert_close(run(layer, torch._neg_view(x), "native").y, want)
