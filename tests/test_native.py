"""The C++ kernels against the float64 reference: route and values apart, every instruction set."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastff
from conftest import SANITIZED, make_layer, make_rows, weights_of
from fastff.ops import native, reference

FORMS = [
    {"depth": 0},
    {"depth": 0, "leaf_width": 5, "node_output": False, "activation": "swiglu", "bias": True},
    {"depth": 1, "trees": 2, "bias": True, "activation": "gelu_tanh"},
    {"depth": 3, "leaf_width": 3, "activation": "relu", "bias": True},
    {"depth": 4, "trees": 3, "gate": "boundary", "bias": True, "activation": "silu"},
    {"depth": 5, "leaf_width": 2, "node_output": False, "gate": "boundary", "bias": True, "activation": "identity"},
    {"depth": 4, "trees": 8, "leaf_width": 16, "node_output": False, "gate": "boundary", "activation": "swiglu"},
    {"depth": 5, "trees": 2, "leaf_width": 2, "gate": "boundary_min", "bias": True, "activation": "abs"},
    {"depth": 9},
]
SIZES = [(1, 8, 8), (3, 65, 9), (130, 33, 17)]


def gradients(layer, x, grad_y, backend):
    inputs = [x.requires_grad_(), *layer.parameters()]
    routed = fastff.ops.forward(x, *weights_of(layer), config=layer.config, backend=backend)
    grads = torch.autograd.grad((routed.y * grad_y).sum(), inputs, allow_unused=True, materialize_grads=True)
    return routed, grads


@functools.cache
def referred(form, rows, in_features, out_features, dtype):
    """A layer, rows, gradients of outputs, and what the reference makes of them: once for all instruction sets."""
    layer = make_layer(in_features, out_features, dtype=dtype, **FORMS[form])
    x, grad_y = make_rows(rows, in_features, dtype=dtype), make_rows(rows, out_features, seed=2, dtype=dtype)
    return layer, x, grad_y, *gradients(layer, x.clone(), grad_y, "reference")


@functools.cache
def exact_of(form, rows, width):
    """What the reference makes in float64 of a float32 layer's weights and rows."""
    layer, x, grad_y, *_ = referred(form, rows, width, width, torch.float32)
    exact = make_layer(width, dtype=torch.float64, **FORMS[form])
    exact.load_state_dict(layer.state_dict())
    return gradients(exact, x.double(), grad_y.double(), "reference")


def max_error(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("form", range(len(FORMS)), ids=lambda form: str(FORMS[form]))
@pytest.mark.parametrize(("rows", "in_features", "out_features"), SIZES)
def test_float64_matches_the_reference(form, rows, in_features, out_features, threads):
    layer, x, grad_y, want, want_grads = referred(form, rows, in_features, out_features, torch.float64)
    got, got_grads = gradients(layer, x.clone(), grad_y, "native")
    assert (want.margin > 1e-9).all()
    assert torch.equal(got.leaf, want.leaf)
    assert max_error(got.y, want.y) <= 1e-12
    if layer.config.depth:
        assert max_error(got.margin, want.margin) <= 1e-12
    else:
        assert torch.isinf(got.margin).all()
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        assert max_error(got_grad, want_grad) <= 1e-12


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("form", range(len(FORMS)), ids=lambda form: str(FORMS[form]))
def test_float32_errs_at_most_twice_as_much_as_the_reference(form):
    rows, width = 64, 768 if FORMS[form]["depth"] < 9 else 129
    layer, x, grad_y, single, single_grads = referred(form, rows, width, width, torch.float32)
    want, want_grads = exact_of(form, rows, width)
    got, got_grads = gradients(layer, x.clone(), grad_y, "native")
    clear = want.margin > 1e-4
    assert clear.double().mean() > 0.9
    assert torch.equal(got.leaf[clear], want.leaf[clear])
    assert max_error(got.y[clear], want.y[clear]) <= 2 * max_error(single.y[clear], want.y[clear]) + 1e-6
    assert torch.equal(got.leaf, single.leaf), "a row on the fence makes gradients incomparable: choose another seed"
    for got_grad, mild_grad, want_grad in zip(got_grads, single_grads, want_grads, strict=True):
        assert max_error(got_grad, want_grad) <= 2 * max_error(mild_grad, want_grad) + 1e-6


@st.composite
def shapes(draw):
    options = {
        "depth": draw(st.integers(0, 9)),
        "trees": draw(st.integers(1, 9)),
        "leaf_width": draw(st.integers(1, 17)),
        "node_output": draw(st.booleans()),
        "gate": draw(st.sampled_from([None, "boundary", "boundary_min"])),
        "bias": draw(st.booleans()),
    }
    pair = [] if options["node_output"] else ["swiglu"]
    options["activation"] = draw(st.sampled_from(["gelu", "gelu_tanh", "relu", "silu", "identity", "abs", *pair]))
    width = draw(st.one_of(st.integers(1, 130), st.just(768)))
    config = fastff.TreeConfig(in_features=width, out_features=width, **options)
    if config.trees * config.in_rows * width > 60_000:  # keep the test fast: trade the trees and the leaves for depth
        options.update(trees=1, leaf_width=1)
    return draw(st.integers(0, 300)), width, draw(st.integers(1, 40)), options


@settings(
    max_examples=40 if SANITIZED else 120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(shape=shapes(), isa_index=st.integers(0, 2), thread_count=st.integers(1, 2))
def test_any_shape_matches_the_reference(shape, isa_index, thread_count):
    from conftest import supported_isas

    rows, in_features, out_features, options = shape
    names = supported_isas()
    before, threads_before = native.isa(), torch.get_num_threads()
    layer = make_layer(in_features, out_features, dtype=torch.float64, **options)
    x, grad_y = make_rows(rows, in_features), make_rows(rows, out_features, seed=2)
    native.set_isa(names[isa_index % len(names)])
    torch.set_num_threads(thread_count)
    try:
        want, want_grads = gradients(layer, x, grad_y, "reference")
        got, got_grads = gradients(layer, x.detach().clone(), grad_y, "native")
    finally:
        native.set_isa(before)
        torch.set_num_threads(threads_before)
    assert torch.equal(got.leaf, want.leaf)
    scale = max(1.0, max((grad.abs().max().item() if grad.numel() else 0.0) for grad in want_grads))
    assert max_error(got.y, want.y) <= 1e-12 * scale
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        assert max_error(got_grad, want_grad) <= 1e-12 * scale


@pytest.mark.parametrize(("rows", "depth"), [(1, 8), (7, 8), (300, 8), (1500, 8), (3000, 2), (3000, 1), (70000, 3)])
def test_any_number_of_rows_takes_the_reference_path(isa, rows, depth, threads):
    if SANITIZED and isa == "scalar" and rows == 70000:
        pytest.skip("too slow; other instruction sets run the same loops over blocks of rows")
    layer = make_layer(11, depth=depth, trees=2, bias=True, dtype=torch.float64)
    x = make_rows(rows, 11)
    together = fastff.ops.forward(x, *weights_of(layer), config=layer.config, backend="native")
    alone = reference.forward(x, weights_of(layer), config=layer.config)
    assert torch.equal(together.leaf, alone.leaf)
    assert max_error(together.y, alone.y) <= 1e-12


def test_few_rows_of_many_trees_are_worth_two_threads_and_keep_their_bits():
    layer = make_layer(96, depth=3, trees=32, gate="boundary", dtype=torch.float32).eval()
    shares = [native.explain(layer.config, rows, torch.float32, 2).choices["threads"] for rows in (1, 2, 5)]
    assert shares == [1, 2, 2]
    x = make_rows(5, 96, dtype=torch.float32)
    with torch.no_grad():
        torch.set_num_threads(2)
        together = layer.routed(x)
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(together, layer.routed(x), strict=True))


def test_gradients_do_not_depend_on_the_number_of_threads():
    layer = make_layer(96, depth=6, trees=2, gate="boundary", bias=True)
    x, grad_y = make_rows(500, 96, dtype=torch.float32), make_rows(500, 96, seed=2, dtype=torch.float32)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(gradients(layer, x.clone(), grad_y, "native")[1][1:])
    for one, two in zip(*results, strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-6)
    again = gradients(layer, x.clone(), grad_y, "native")[1][1:]
    assert all(torch.equal(a, b) for a, b in zip(again, results[1], strict=True))


def test_unvisited_rows_get_exactly_zero_gradient():
    layer = make_layer(16, depth=6)
    x = make_rows(3, 16, dtype=torch.float32)
    layer(x).sum().backward()
    visited = torch.zeros(layer.config.in_rows, dtype=torch.bool)
    visited[layer.path(x).flatten()] = True
    assert visited.sum() < 22
    assert (layer.w_in.grad[0, ~visited] == 0).all()
    assert (layer.w_out.grad[0, ~visited] == 0).all()
    assert (layer.w_out.grad[0, visited].abs().sum(-1) > 0).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("options", [form for form in FORMS if form["depth"] > 0], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_sparse_gradients_are_the_visited_rows_of_dense_ones(options, rows, threads):
    layer = make_layer(33, 17, dtype=torch.float64, **options)
    twin = make_layer(33, 17, dtype=torch.float64, sparse_grad=True, **options)
    twin.load_state_dict(layer.state_dict())
    x, twin_x = make_rows(rows, 33).requires_grad_(), make_rows(rows, 33).requires_grad_()
    grad_y = make_rows(rows, 17, seed=2)
    fastff.ops.forward(x, *weights_of(layer), config=layer.config, backend="native").y.backward(grad_y)
    twin(twin_x).backward(grad_y)
    assert torch.equal(x.grad, twin_x.grad)
    visits = layer.usage(x.detach()).visits > 0
    per_leaf = {"w_in": layer.config.leaf_in_rows, "w_out": layer.config.leaf_width, "b_out": 1}
    for name, sparse in twin.named_parameters():
        dense = getattr(layer, name).grad
        assert torch.equal(sparse.grad.to_dense(), dense), name
        if name == "b_in":
            continue
        first = layer.config.nodes if name == "w_in" or (name == "w_out" and layer.config.node_output) else 0
        leaves = visits[:, layer.config.nodes :].repeat_interleave(per_leaf[name], 1)
        seen = torch.cat((visits[:, :first], leaves), 1)
        assert torch.equal(sparse.grad.coalesce().indices(), seen.nonzero().T), name


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.SparseAdam(p, lr=0.1)])
def test_optimisers_take_sparse_gradients(make):
    layer = make_layer(24, depth=6, trees=2, sparse_grad=True, dtype=torch.float32)
    before = [p.detach().clone() for p in layer.parameters()]
    x = make_rows(3, 24, dtype=torch.float32)
    visited = layer.usage(x).visits > 0
    layer(x).sum().backward()
    layer(x).sum().backward()  # gradients of two batches are added
    make(layer.parameters()).step()
    for old, new in zip(before, layer.parameters(), strict=True):
        assert torch.equal((old != new).any(-1), visited)


def test_where_there_are_no_sparse_gradients_it_is_said():
    x = make_rows(3, 8, dtype=torch.float32)
    layer = make_layer(8, depth=3, backend="reference", sparse_grad=True)
    with pytest.raises(fastff.BackendUnavailable, match="'reference' has no sparse gradients"):
        layer(x)
    with torch.no_grad():
        assert layer(x).shape == (3, 8)
    with pytest.raises(fastff.BackendUnavailable, match="no sparse gradients"):
        make_layer(8, depth=0, sparse_grad=True)(x)
    with pytest.raises(ValueError, match="sparse_grad needs surrogate None, got 'straight_through'"):
        make_layer(8, depth=3, surrogate="straight_through", sparse_grad=True)
    with pytest.raises(RuntimeError, match="sparse_grad has no compiled form"):
        torch.compile(make_layer(8, depth=3, sparse_grad=True), backend="eager", fullgraph=True)(x)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    "options",
    [{"depth": 5}, {"depth": 5, "node_output": False, "activation": "relu", "leaf_width": 2}, {"depth": 0}],
    ids=str,
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_nan_row_stays_in_its_row(options, backend):
    layer = make_layer(20, dtype=torch.float32, **options).eval()
    x = make_rows(40, 20, dtype=torch.float32)
    clean = fastff.ops.forward(x, *weights_of(layer), config=layer.config, backend=backend)
    dirty_x = x.clone()
    dirty_x[17, 3] = float("nan")
    dirty = fastff.ops.forward(dirty_x, *weights_of(layer), config=layer.config, backend=backend)
    assert torch.isnan(dirty.y[17]).all()
    assert (dirty.leaf[17] == 0).all(), "NaN turns left at every node"
    keep = torch.arange(40) != 17
    assert torch.allclose(dirty.y[keep], clean.y[keep], rtol=1e-6, atol=1e-6)
    assert torch.equal(dirty.leaf[keep], clean.leaf[keep])


@pytest.mark.usefixtures("isa")
def test_zero_turns_left():
    layer = make_layer(8, depth=3, dtype=torch.float32)
    with torch.no_grad():
        layer.w_in.zero_()
    assert (layer.route(make_rows(5, 8, dtype=torch.float32)) == 0).all()
    with torch.no_grad():
        layer.w_in[0, 0] = -0.0
    assert (layer.route(make_rows(5, 8, dtype=torch.float32)) == 0).all()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_empty_batch(backend):
    layer = make_layer(8, 5, depth=3, bias=True)
    x = torch.zeros(2, 0, 8, requires_grad=True)
    routed = fastff.ops.forward(x, *weights_of(layer), config=layer.config, backend=backend)
    assert routed.y.shape == (2, 0, 5)
    assert routed.leaf.shape == (2, 0, 1)
    routed.y.sum().backward()
    assert (layer.w_in.grad == 0).all()
    with torch.no_grad():
        assert layer.eval()(x).shape == (2, 0, 5)


@pytest.mark.usefixtures("isa")
def test_strided_and_unaligned_inputs():
    layer = make_layer(33, depth=5, dtype=torch.float32).eval()
    wide = make_rows(20, 70, dtype=torch.float32)
    storage = torch.empty(20 * 33 + 1)
    unaligned = storage[1:].view(20, 33).copy_(wide[:, 2:35])
    for x in (wide[:, 2:35], wide.t()[2:35].t(), unaligned, wide.flip(0)[:, 2:35]):
        want = reference.forward(x.contiguous(), weights_of(layer), config=layer.config).y
        with torch.no_grad():
            assert torch.allclose(layer(x), want, atol=1e-5)
        assert torch.allclose(layer(x), want, atol=1e-5)


def test_forward_does_not_read_memory_it_was_not_given():
    """Outputs are poisoned by the allocator's reuse of NaN-filled memory: every element must be written."""
    layer = make_layer(24, 31, depth=4, trees=2, bias=True)
    for rows in (1, 3, 50):
        poison = torch.full((rows * 31 + rows * 24,), float("nan"))
        del poison
        y, leaf, margin, scores = native.forward(
            make_rows(rows, 24, dtype=torch.float32), weights_of(layer), config=layer.config
        )
        assert not torch.isnan(y).any()
        assert not torch.isnan(scores).any()
        assert ((leaf >= 0) & (leaf < 16)).all()
        assert (margin > 0).all()


def advised_for_huge_pages(tensor: Tensor) -> bool:
    """Whether the system was asked for huge pages at the tensor's middle."""
    middle, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= middle < int(span[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    return False


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="needs Linux with huge pages")
def test_large_outputs_lie_on_huge_pages():
    layer = make_layer(4, 1024, depth=3, dtype=torch.float32).eval()
    x = make_rows(2**25 // 4096, 4, dtype=torch.float32)  # so large that its output is never memory used before
    with torch.no_grad():
        assert advised_for_huge_pages(layer(x))
        assert advised_for_huge_pages(layer.routed(x).y)


def test_an_unknown_instruction_set_is_named():
    with pytest.raises(fastff.BackendUnavailable, match=r"'sse9' is not one of .*scalar"):
        native.set_isa("sse9")
