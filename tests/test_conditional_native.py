"""The C++ kernels of conditional matrix multiplication: each instruction set beside the float64 reference, a row's bits
in any company, and the C ABI with hostile arguments (also run under sanitizers, by `make sanitize`)."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import SANITIZED, make_rows, supported_isas
from fastff.config import ACTIVATIONS
from fastff.ops import conditional_reference, native, native_conditional
from fastff.ops.library import library
from fastff.ops.weights import Leaves
from pairs import every_pair

# (rows, k, leaves, width, in_features, out_features)
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (3, 4, 9, 4, 65, 9),
    (40, 5, 32, 3, 33, 70),
    (7, 2, 900, 17, 130, 33),
    (150, 3, 6, 20, 24, 129),
]
NAMES = ("x", "gate", "w_in", "b_in", "w_out", "b_out")
OK, BAD_ARGUMENT = 0, 1


def make(
    rows, k, leaves, width, in_features, out_features, *, activation="swiglu", bias=True, dtype=torch.float64, seed=0
):
    """Random arguments; scores and y of order one, leaves in no order and some of them twice in a row."""
    in_rows = width * (2 if activation == "swiglu" else 1)
    shapes = {
        "x": (rows, in_features),
        "gate": (rows, k),
        "w_in": (leaves, in_rows, in_features),
        "b_in": (leaves, in_rows),
        "w_out": (leaves, width, out_features),
        "b_out": (leaves, out_features),
    }
    made = SimpleNamespace(activation=activation)
    for i, (name, shape) in enumerate(shapes.items()):
        scale = {"w_in": in_features**-0.5, "w_out": (width * max(k, 1)) ** -0.5}.get(name, 1.0)
        setattr(made, name, (scale * make_rows(*shape, seed=seed + i)).to(dtype))
    if not bias:
        made.b_in = made.b_out = None
    made.leaf = torch.randint(0, leaves, (rows, k), generator=torch.Generator().manual_seed(seed))
    return made


def leaves(made):
    return Leaves(made.w_in, made.b_in, made.w_out, made.b_out)


def reference(made):
    return conditional_reference.forward(made.x, made.leaf, made.gate, leaves(made), activation=made.activation)


def widened(made):
    """The same arguments in float64."""
    wide = {
        n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in vars(made).items()
    }
    return SimpleNamespace(**wide)


def native_forward(made):
    return native_conditional.forward(made.x, made.leaf, made.gate, leaves(made), activation=made.activation)


def native_gradients(made, grad_y):
    y, scores = native_forward(made)
    grads = native_conditional.backward(
        grad_y, made.x, made.leaf, made.gate, leaves(made), scores, activation=made.activation
    )
    return {"y": y, **{name: grad for name, grad in zip(NAMES, grads, strict=True) if getattr(made, name) is not None}}


def reference_gradients(made, grad_y):
    inputs = {n: getattr(made, n).detach().requires_grad_() for n in NAMES if getattr(made, n) is not None}
    given = {**vars(made), **inputs}
    y = reference(SimpleNamespace(**given))
    grads = torch.autograd.grad(y, [*inputs.values()], grad_y, materialize_grads=True, allow_unused=True)
    return {"y": y.detach(), **dict(zip(inputs, grads, strict=True))}


def max_error(a, b):
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


@every_pair(sizes=SIZES, activation=ACTIVATIONS, isa=supported_isas(), threads=(1, 2))
def test_float64_matches_the_reference(sizes, activation, isa, threads):
    made = make(*sizes, activation=activation, bias=activation != "silu")
    grad_y = make_rows(sizes[0], sizes[5], seed=9)
    got, want = native_gradients(made, grad_y), reference_gradients(made, grad_y)
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].shape == want[name].shape
        assert max_error(got[name], want[name]) <= 1e-12, name


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_float32_errs_at_most_twice_as_much_as_the_reference(activation):
    made = make(64, 6, 24, 4, 768, 384, activation=activation, dtype=torch.float32)
    grad_y = make_rows(64, 384, seed=9, dtype=torch.float32)
    exact = reference_gradients(widened(made), grad_y.double())
    got, plain = native_gradients(made, grad_y), reference_gradients(made, grad_y)
    for name in exact:
        assert max_error(got[name], exact[name]) <= 2 * max_error(plain[name], exact[name]) + 1e-6, name


@pytest.mark.usefixtures("isa")
def test_a_row_has_the_same_bits_in_any_company(threads):
    made = make(90, 5, 12, 4, 72, 40, dtype=torch.float32)
    y, scores = native_forward(made)
    for rows in ([17], [3, 89, 40], list(range(50))):
        part = SimpleNamespace(**{**vars(made), "x": made.x[rows], "leaf": made.leaf[rows], "gate": made.gate[rows]})
        alone, alone_scores = native_forward(part)
        assert torch.equal(alone, y[rows])
        assert torch.equal(alone_scores, scores[rows])


def test_gradients_do_not_depend_on_the_number_of_threads():
    made, grad_y = make(200, 5, 12, 4, 72, 130, dtype=torch.float32), make_rows(200, 130, seed=9, dtype=torch.float32)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(native_gradients(made, grad_y))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.usefixtures("isa")
def test_leaves_that_nobody_chose_get_exactly_zero():
    made = make(3, 2, 40, 4, 16, 16)
    grads = native_gradients(made, make_rows(3, 16, seed=9))
    chosen = torch.zeros(40, dtype=torch.bool)
    chosen[made.leaf.flatten()] = True
    for name in ("w_in", "b_in", "w_out", "b_out"):
        assert (grads[name][~chosen] == 0).all()
        assert (grads[name][chosen].flatten(1).abs().sum(-1) > 0).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("poison", ["x", "gate"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(poison, value):
    made = make(20, 4, 5, 4, 48, 33, dtype=torch.float32)
    clean, _ = native_forward(made)
    getattr(made, poison)[7, 1] = value
    dirty, _ = native_forward(made)
    keep = torch.arange(20) != 7
    assert torch.equal(dirty[keep], clean[keep])
    assert not dirty[7].isfinite().any()


@pytest.mark.parametrize(("rows", "k"), [(0, 3), (5, 0), (0, 0)])
def test_nothing_to_do(rows, k):
    made = make(rows, k, 4, 2, 9, 7)
    made.x = made.x.reshape(rows, 9)
    grads = native_gradients(made, torch.ones(rows, 7, dtype=torch.float64))
    assert grads["y"].shape == (rows, 7)
    assert all((grad == 0).all() for grad in grads.values())


# ---- packed for inference ----

PACKED_SIZES = [
    *SIZES,
    (200, 6, 24, 4, 768, 768),  # narrow leaves, row by row
    (300, 6, 900, 3, 33, 400),  # so many that w_out lies in blocks of columns
    (200, 3, 12, 32, 128, 200),  # wide ones, leaf by leaf
    (90, 2, 5, 12, 64, 33),  # both kinds of groups in a leaf
    (100, 3, 8, 61, 130, 50),  # as wide as a matrix tile takes
]
# What y may differ, as a part of its norm: bfloat16 has 8 bits, and an int8 row errs by 1/254 of its largest weight.
PACKED_ERROR = {"bf16": 1e-2, "int8": 3e-2}


def pack(made, quantization):
    return native_conditional.PackedLeaves(
        made.w_in,
        made.w_out,
        activation=made.activation,
        b_in=made.b_in,
        b_out=made.b_out,
        quantization=quantization,
    )


def some_rows(made, rows):
    return [getattr(made, name)[rows].contiguous() for name in ("x", "leaf", "gate")]


@every_pair(
    sizes=PACKED_SIZES,
    activation=("swiglu", "gelu", "relu"),
    dot_isa=supported_isas(dots=True, tiles=True),
    threads=(1, 2),
)
def test_packed_fp32_errs_at_most_twice_as_much_as_the_reference(sizes, activation, dot_isa, threads):
    made = make(*sizes, activation=activation, bias=activation != "relu", dtype=torch.float32)
    exact = reference(widened(made))
    plain = reference(made)
    y = pack(made, None)(made.x, made.leaf, made.gate)
    assert max_error(y, exact) <= 2 * max_error(plain, exact) + 1e-6


@every_pair(
    sizes=PACKED_SIZES,
    quantization=("bf16", "int8"),
    activation=("swiglu", "silu"),
    dot_isa=supported_isas(dots=True, tiles=True),
    threads=(1, 2),
)
def test_quantised_leaves_err_within_their_bound(sizes, quantization, activation, dot_isa, threads):
    made = make(*sizes, activation=activation, bias=activation == "silu", dtype=torch.float32)
    exact = reference(widened(made))
    y = pack(made, quantization)(made.x, made.leaf, made.gate).double()
    assert (y - exact).norm() <= PACKED_ERROR[quantization] * exact.norm()
    assert max_error(y, exact) > 0, "nothing was rounded"


@every_pair(sizes=PACKED_SIZES, quantization=(None, "bf16", "int8"), dot_isa=supported_isas(dots=True, tiles=True))
def test_a_packed_row_has_the_same_bits_in_any_company(sizes, quantization, dot_isa):
    made = make(*sizes, dtype=torch.float32)
    packed, rows = pack(made, quantization), sizes[0]
    together = packed(made.x, made.leaf, made.gate)
    torch.set_num_threads(2)
    assert torch.equal(packed(made.x, made.leaf, made.gate), together)
    for part in ([rows // 2], list(range(0, rows, 2)), list(reversed(range(min(rows, 30))))):
        assert torch.equal(packed(*some_rows(made, part)), together[part])


@every_pair(
    quantization=(None, "bf16", "int8"),
    rows=(3, 200),
    poison=("x", "gate"),
    value=(float("nan"), float("inf")),
    dot_isa=supported_isas(dots=True, tiles=True),
)
def test_a_packed_row_that_is_not_finite_disturbs_no_other(quantization, rows, poison, value, dot_isa):
    made = make(rows, 4, 7, 12, 48, 33, dtype=torch.float32)
    packed = pack(made, quantization)
    clean = packed(made.x, made.leaf, made.gate)
    getattr(made, poison)[1, 1] = value
    dirty = packed(made.x, made.leaf, made.gate)
    keep = torch.arange(rows) != 1
    assert torch.equal(dirty[keep], clean[keep])
    assert not dirty[1].isfinite().any()


@pytest.mark.usefixtures("tile_isa")
@pytest.mark.parametrize("quantization", [None, "bf16", "int8"])
@pytest.mark.parametrize(("rows", "k"), [(0, 3), (5, 0), (40, 0)])
def test_packed_leaves_with_nothing_to_do(quantization, rows, k):
    made = make(1, 2, 4, 20, 9, 37, dtype=torch.float32)
    x, leaf, gate = torch.ones(rows, 9), torch.zeros(rows, k, dtype=torch.int64), torch.ones(rows, k)
    y = pack(made, quantization)(x, leaf, gate)
    assert y.shape == (rows, 37)
    assert (y == 0).all()


@pytest.mark.usefixtures("tile_isa")
@pytest.mark.parametrize("scale", [1e-35, 1e-12, 1e12, 1e30])
def test_int8_leaves_follow_the_scale_of_their_inputs(scale):
    made = make(40, 3, 7, 4, 64, 48, activation="identity", bias=False, dtype=torch.float32)
    packed, one = pack(made, "int8"), torch.full_like(made.gate, 1.0)
    want = packed(made.x, made.leaf, one) * scale
    got = packed(made.x * scale, made.leaf, one)
    assert (got - want).norm() <= 1e-4 * want.norm() + 1e-28


def test_a_pack_takes_the_memory_that_its_weights_need():
    made = make(1, 2, 4096, 4, 96, 96, dtype=torch.float32)
    weights_bytes = made.w_in.nbytes + made.w_out.nbytes
    assert pack(made, None).bytes <= 1.3 * weights_bytes
    assert pack(made, "bf16").bytes <= 0.7 * weights_bytes
    assert pack(made, "int8").bytes <= 0.45 * weights_bytes


# ---- the C ABI ----

FORWARD = ("w_in", "b_in", "w_out", "b_out", "x", "leaf", "gate", "rows", "k", "y", "scores", "threads")
GUARD = 7  # elements before and after an array


class Call:
    """One call's arguments by name, each array between guards; outputs start as NaN."""

    def __init__(self, made, rows, k, threads=1):
        self.leaves = native_conditional._Leaves(
            made.w_in.shape[2], made.w_out.shape[2], *made.w_out.shape[:2], ACTIVATIONS.index(made.activation)
        )
        self.guarded = []
        arrays = {n: t for n, t in vars(made).items() if isinstance(t, torch.Tensor)}
        nothing = {"y": (rows, made.w_out.shape[2]), "scores": (rows, k, made.w_in.shape[1])}
        arrays |= {name: torch.full(shape, float("nan"), dtype=made.x.dtype) for name, shape in nothing.items()}
        self.values = {name: self._guard(tensor) for name, tensor in arrays.items()}
        self.values |= {"rows": rows, "k": k, "threads": threads}

    def _guard(self, tensor):
        room = torch.full((tensor.numel() + 2 * GUARD,), -77, dtype=tensor.dtype)
        inside = room[GUARD : GUARD + tensor.numel()].view(tensor.shape).copy_(tensor)
        self.guarded.append((room, tensor.numel()))
        return inside

    def forward(self, **change):
        values = {**self.values, **change}
        arguments = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in map(values.get, FORWARD)]
        return library().fastff_conditional_forward_f64(ctypes.addressof(self.leaves), *arguments)

    def guards_hold(self):
        return all((room[:GUARD] == -77).all() and (room[GUARD + n :] == -77).all() for room, n in self.guarded)


def error():
    return library().fastff_error().decode()


def test_bad_arguments_are_refused_by_name():
    made = make(4, 2, 5, 3, 8, 6)
    call = Call(made, 4, 2)
    y = call.values["y"]
    wrong = made.leaf.clone()
    wrong[2, 1] = 5
    refused = [
        ({"leaf": wrong}, "leaf 5 is not 0 to 4"),
        ({"leaf": wrong - 6}, "is not 0 to 4"),
        ({"rows": -1}, "rows -1 is not 0 to"),
        ({"k": 2**40}, "k 1099511627776 is not 0 to"),
        ({"x": None}, "x must not be NULL"),
        ({"gate": None}, "leaf and gate must not be NULL"),
        ({"w_out": None}, "w_in and w_out must not be NULL"),
        ({"y": None}, "y must not be NULL"),
        ({"y": made.x.data_ptr() + 1}, "not aligned"),
        ({"y": call.values["x"]}, "y overlaps x"),
        ({"scores": y}, "scores overlaps y"),
    ]
    for change, message in refused:
        assert call.forward(**change) == BAD_ARGUMENT, message
        assert message in error()
    assert y.isnan().all(), "a refused call writes nothing"
    for field, value in [("activation", 7), ("leaves", 0), ("in_features", -3), ("leaf_width", 2**45)]:
        before = getattr(call.leaves, field)
        setattr(call.leaves, field, value)
        assert call.forward() == BAD_ARGUMENT
        setattr(call.leaves, field, before)
    assert library().fastff_conditional_forward_f64(None, *[None] * 7, 0, 0, None, None, 1) == BAD_ARGUMENT
    assert error() == "leaves must not be NULL"
    assert call.forward() == OK
    assert call.guards_hold()


def test_packed_calls_refuse_bad_arguments_by_name():
    made = make(4, 2, 5, 3, 8, 6, dtype=torch.float32)
    packed, y, handle = pack(made, "int8"), torch.full((4, 6), float("nan")), ctypes.c_void_p()
    good = {"packed": packed._handle, "x": made.x, "leaf": made.leaf, "gate": made.gate, "rows": 4, "k": 2, "y": y}
    wrong = made.leaf.clone()
    wrong[3, 0] = -1
    refused = [
        ({"packed": None}, "packed must not be NULL"),
        ({"leaf": wrong}, "leaf -1 is not 0 to 4"),
        ({"x": None}, "x must not be NULL"),
        ({"gate": None}, "leaf and gate must not be NULL"),
        ({"y": None}, "y must not be NULL"),
        ({"y": made.x}, "y overlaps x"),
        ({"rows": -2}, "rows -2 is not 0 to"),
        ({"k": -1}, "k -1 is not 0 to"),
    ]
    for change, message in refused:
        values = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in (good | change).values()]
        assert library().fastff_conditional_infer_f32(*values, 1) == BAD_ARGUMENT, message
        assert message in error()
    assert y.isnan().all()
    leaves, pointers = (
        native_conditional.leaves_of(made.w_in, made.w_out, "swiglu"),
        [made.w_in, None, made.w_out, None],
    )
    pointers = [None if p is None else p.data_ptr() for p in pointers]
    pack_f32 = library().fastff_conditional_pack_f32
    assert pack_f32(leaves, *pointers, 3, ctypes.byref(handle)) == BAD_ARGUMENT
    assert error() == "weights 3 is not 0 to 2"
    assert pack_f32(leaves, *pointers, 0, None) == BAD_ARGUMENT
    assert library().fastff_conditional_packed_bytes(None) == 0
    library().fastff_conditional_packed_free(None)


@settings(
    max_examples=30 if SANITIZED else 60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(
    rows=st.integers(0, 70),
    k=st.integers(0, 9),
    leaves=st.integers(1, 60),
    width=st.integers(1, 19),
    in_features=st.integers(1, 140),
    out_features=st.integers(1, 140),
    activation=st.sampled_from(ACTIVATIONS),
    isa_index=st.integers(0, 9),
    thread_count=st.integers(1, 2),
    bad=st.booleans(),
)
def test_any_shape_is_computed_or_refused(
    rows, k, leaves, width, in_features, out_features, activation, isa_index, thread_count, bad
):
    made = make(rows, k, leaves, width, in_features, out_features, activation=activation)
    call, before, names = Call(made, rows, k, thread_count), native.isa(), supported_isas()
    if bad and rows * k:
        call.values["leaf"].view(-1)[rows * k // 2] = leaves + isa_index
    native.set_isa(names[isa_index % len(names)])
    try:
        status, message = call.forward(), error()
    finally:
        native.set_isa(before)
    assert call.guards_hold()
    if bad and rows * k:
        assert status == BAD_ARGUMENT
        assert message == f"leaf {leaves + isa_index} is not 0 to {leaves - 1}"
    else:
        assert status == OK, message
        assert max_error(call.values["y"], reference(made)) <= 1e-11


@settings(
    max_examples=30 if SANITIZED else 50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(
    sizes=st.tuples(st.integers(1, 70), st.integers(0, 9), st.integers(1, 60), st.integers(1, 19), st.integers(1, 140)),
    out_features=st.integers(1, 140),
    weights=st.sampled_from((None, "bf16", "int8")),
    isa_index=st.integers(0, 9),
    thread_count=st.integers(1, 2),
    fault=st.sampled_from(("none", "leaf", "infinite gate", "infinite row")),
)
def test_any_packed_leaves_are_computed_or_refused(sizes, out_features, weights, isa_index, thread_count, fault):
    rows, k, leaf_count, width, in_features = sizes
    made = make(rows, k, leaf_count, width, in_features, out_features, dtype=torch.float32)
    names, before, bad_row = supported_isas(dots=True, tiles=True), native.isa(), rows // 2
    native.set_isa(names[isa_index % len(names)])
    try:
        packed = pack(made, weights)
        clean = packed(made.x, made.leaf, made.gate)
        if fault == "leaf" and k:
            made.leaf[bad_row, k - 1] = -1 - isa_index
        elif fault == "infinite gate":
            made.gate[bad_row] = float("inf")
        elif fault == "infinite row":
            made.x[bad_row] = float("-inf")
        room = torch.full((rows * out_features + 16,), -77.0)
        y = room[8 : 8 + rows * out_features].view(rows, out_features)
        given = [t.data_ptr() if t.numel() else None for t in (made.x, made.leaf, made.gate)]
        infer = library().fastff_conditional_infer_f32
        status, message = infer(packed._handle, *given, rows, k, y.data_ptr(), thread_count), error()
    finally:
        native.set_isa(before)
    assert (room[:8] == -77).all()
    assert (room[8 + rows * out_features :] == -77).all()
    if fault == "leaf" and k:
        assert status == BAD_ARGUMENT
        assert message == f"leaf {-1 - isa_index} is not 0 to {leaf_count - 1}"
        assert (y == -77).all(), "a refused call writes nothing"
        return
    assert status == OK, message
    others = torch.arange(rows) != bad_row
    assert torch.equal(y[others].view(torch.int32), clean[others].view(torch.int32))
    if fault == "none" or k == 0:
        assert torch.equal(y, clean)
    else:
        assert not y[bad_row].isfinite().all(), "what is not finite is not hidden"
