"""Conditional matrix multiplication: every backend beside the reference, gradients, transforms, bad input."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

import fastff
from conftest import make_rows
from fastff.config import ACTIVATIONS
from fastff.ops import conditional_interface, conditional_matmul

SIZES = {"in_features": 6, "out_features": 5, "leaves": 7, "width": 3, "k": 2}
NAMES = ("x", "gate", "w_in", "w_out", "b_in", "b_out")


def make(rows, *, activation="gelu", bias=True, dtype=torch.float64, seed=0, **sizes):
    """Arguments of conditional_matmul; scores and y are of order one."""
    s = SimpleNamespace(**{**SIZES, **sizes})
    in_rows = s.width * (2 if activation == "swiglu" else 1)
    shapes = {
        "x": (rows, s.in_features),
        "gate": (rows, s.k),
        "w_in": (s.leaves, in_rows, s.in_features),
        "w_out": (s.leaves, s.width, s.out_features),
    }
    if bias:
        shapes |= {"b_in": (s.leaves, in_rows), "b_out": (s.leaves, s.out_features)}
    given = {name: make_rows(*shape, seed=seed + i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}
    generator = torch.Generator().manual_seed(seed)
    given["w_in"] *= s.in_features**-0.5
    given["w_out"] *= max(1, s.width * s.k) ** -0.5
    given["leaf"] = torch.randint(0, s.leaves, (rows, s.k), generator=generator)
    return given | {"activation": activation}


def run(given, backend=None, **change):
    return conditional_matmul(**{**given, **change}, backend=backend)


def gradients(given, backend):
    """y and the gradients to everything that has one, by name."""
    leaves = {name: given[name].detach().requires_grad_() for name in NAMES if name in given}
    y = run(given, backend, **leaves)
    weights = make_rows(*y.shape, seed=9, dtype=y.dtype)
    return {
        "y": y.detach(),
        **dict(zip(leaves, torch.autograd.grad((y * weights).sum(), [*leaves.values()]), strict=True)),
    }


def backends():
    return [name for name in conditional_interface.BACKENDS[1:] if conditional_interface.why_unavailable(name) is None]


def close(got, want, tolerance):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].shape == want[name].shape, name
        scale = 1 + want[name].abs().max() if want[name].numel() else 1
        assert ((got[name] - want[name]).abs() <= tolerance * scale).all(), name


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (1, {"k": 1, "leaves": 1, "width": 1}),
        (5, {"in_features": 65, "out_features": 33, "width": 5}),
        (200, {"leaves": 3, "k": 3}),
        (40, {"leaves": 96, "width": 32, "k": 3, "bias": False}),
        (9, {"leaves": 784, "width": 4, "k": 24}),
        (0, {}),
        (4, {"k": 0}),
    ],
    ids=str,
)
def test_values_and_gradients_match_the_reference_in_float64(backend, activation, rows, sizes):
    given = make(rows, activation=activation, **sizes)
    close(gradients(given, backend), gradients(given, "reference"), 1e-12)


@pytest.mark.parametrize("backend", backends())
def test_float32_errs_at_most_twice_as_much_as_the_reference(backend):
    given = make(128, activation="swiglu", in_features=256, out_features=96, leaves=16, width=16, k=3)
    single = {name: value.float() if name in NAMES else value for name, value in given.items()}
    exact = gradients({name: value.double() if name in NAMES else value for name, value in single.items()}, "reference")
    reference, got = gradients(single, "reference"), gradients(single, backend)
    for name in exact:
        allowed = 2 * (reference[name] - exact[name]).abs().max() + 1e-6
        assert (got[name] - exact[name]).abs().max() <= allowed, name


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_gradcheck_of_the_op(activation):
    given = make(5, activation=activation, in_features=3, out_features=2, leaves=4)
    inputs = [given[name].requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(
        lambda *tensors: run(given, "native", **dict(zip(NAMES, tensors, strict=True))), inputs, atol=1e-7
    )


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias):
    given = make(5, dtype=torch.float32, bias=bias)
    for name in NAMES[: 6 if bias else 4]:
        given[name].requires_grad_()
    tensors = [given.get(name) for name in ("x", "leaf", "gate", "w_in", "b_in", "w_out", "b_out")]
    torch.library.opcheck(torch.ops.fastff.conditional_matmul, (*tensors, "gelu", "native", False))


def test_leaves_that_no_row_chose_have_no_gradient():
    given = make(20)
    given["leaf"] = given["leaf"] % 3
    for backend in ("native", "eager"):
        grads = gradients(given, backend)
        assert all((grads[name][3:] == 0).all() and (grads[name][:3] != 0).any() for name in NAMES[2:])


def test_a_leaf_that_stands_twice_in_a_row_adds_twice():
    given = make(6, k=2)
    twice = {**given, "leaf": given["leaf"][:, :1].expand(-1, 2)}
    once = {**given, "leaf": given["leaf"][:, :1], "gate": given["gate"].sum(1, keepdim=True)}
    for backend in ("reference", "eager", "native"):
        assert (run(twice, backend) - run(once, backend)).abs().max() <= 1e-12


def test_gates_and_rows_that_are_not_finite_stay_in_their_row():
    given = make(6)
    bad = {**given, "x": given["x"].clone(), "gate": given["gate"].clone()}
    bad["x"][1, 2], bad["gate"][3, 1], bad["gate"][4, 0] = float("nan"), float("nan"), float("inf")
    for backend in ("reference", "eager", "native"):
        y, clean = run(bad, backend), run(given, backend)
        assert y[[1, 3]].isnan().all()
        assert not y[4].isfinite().any()
        assert torch.equal(y[[0, 2, 5]], clean[[0, 2, 5]])


def test_infinite_weights_of_a_leaf_that_no_row_chose_change_nothing():
    given = make(20, leaves=4)
    given["leaf"] = 1 + given["leaf"] % 3
    want = gradients(given, "eager")
    for name in ("w_in", "w_out", "b_in", "b_out"):
        given[name][0] = float("inf")
    close(gradients(given, "eager"), want, 0)


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (0, 2)])
def test_any_leading_shape(shape):
    given = make(1)
    many = {name: given[name][0].expand(*shape, -1) for name in ("x", "leaf", "gate")}
    for backend in ("reference", "eager", "native"):
        got = run(given, backend, **many)
        assert got.shape == (*shape, 5)
        assert torch.allclose(got, run(given, backend)[0].expand(got.shape), atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_compile_without_graph_breaks_forward_and_backward(backend):
    given = make(9, dtype=torch.float32)
    want = gradients(given, backend)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    leaves = {n: given[n].detach().requires_grad_() for n in NAMES}
    y = compiled(given, backend, **leaves)
    grads = torch.autograd.grad((y * make_rows(*y.shape, seed=9, dtype=y.dtype)).sum(), [*leaves.values()])
    close({"y": y.detach(), **dict(zip(leaves, grads, strict=True))}, want, 1e-6)


class Product(torch.nn.Module):
    def __init__(self, given, backend):
        super().__init__()
        self.given, self.backend = given, backend

    def forward(self, x, leaf, gate):
        return run(self.given, self.backend, x=x, leaf=leaf, gate=gate)


def test_export_keeps_the_op():
    given, other = make(9, dtype=torch.float32), make(4, dtype=torch.float32, seed=3)
    rows = {0: torch.export.Dim("rows", min=2, max=64)}
    arguments = (given["x"], given["leaf"], given["gate"])
    program = torch.export.export(Product(given, "native"), arguments, dynamic_shapes=(rows,) * 3)
    assert "fastff.conditional_matmul" in str(program.graph)
    got = program.module()(other["x"], other["leaf"], other["gate"])
    assert torch.equal(got, run({**other, **{n: given[n] for n in NAMES[2:]}}, "native"))


def test_autocast_computes_in_float32_and_returns_the_autocast_dtype():
    given = make(8, dtype=torch.float32)
    for backend in ("eager", "native"):
        want = run(given, backend)
        with torch.autocast("cpu", torch.bfloat16):
            got = run(given, backend)
        assert torch.equal(got, want.bfloat16())


@pytest.mark.parametrize("batched", [("x",), ("x", "leaf", "gate"), ("w_in", "w_out"), NAMES])
def test_vmap_over_rows_and_over_weights(batched):
    sets = [make(4, seed=10 * i) for i in range(3)]
    given = {**sets[0], **{name: torch.stack([s[name] for s in sets]) for name in batched}}
    names = [name for name in given if name != "activation"]
    dims = tuple(0 if name in batched else None for name in names)
    for backend in ("eager", "reference", "native"):
        got = torch.vmap(lambda *t, b=backend: run(dict(zip(names, t, strict=True)) | {"activation": "gelu"}, b), dims)(
            *(given[name] for name in names)
        )
        want = torch.stack([run({**sets[0], **{n: s[n] for n in batched}}, backend) for s in sets])
        assert (got - want).abs().max() <= 1e-12


def test_gradients_of_each_row_by_torch_func_and_the_jacobian_of_the_op():
    """The weights' gradient of every row alone: vmap(grad) where the backend is free; vmap over the op's backward."""
    given = make(4)

    def loss(backend, w_in, x, leaf, gate):
        return run(given, backend, w_in=w_in, x=x, leaf=leaf, gate=gate).sum()

    arguments = (given["w_in"], given["x"][:, None], given["leaf"][:, None], given["gate"][:, None])
    want, free = (
        torch.vmap(torch.func.grad(partial(loss, backend)), (None, 0, 0, 0))(*arguments)
        for backend in ("reference", None)
    )
    w_in = given["w_in"].detach().requires_grad_()
    y = run(given, "native", w_in=w_in)
    each = torch.eye(4, dtype=y.dtype).unsqueeze(-1).expand(4, 4, 5)
    (jacobian,) = torch.autograd.grad(y, w_in, each, is_grads_batched=True)
    assert (free - want).abs().max() <= 1e-12
    assert (jacobian - want).abs().max() <= 1e-12


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own way to forward derivatives
def test_the_plain_backends_have_forward_and_second_derivatives():
    given = make(4, in_features=2, out_features=2, leaves=3, width=2)
    inputs = [given[name].requires_grad_() for name in NAMES]
    for backend in ("reference", "eager"):
        assert torch.autograd.gradgradcheck(
            lambda *tensors, b=backend: run(given, b, **dict(zip(NAMES, tensors, strict=True))), inputs, atol=1e-6
        )
        _, tangent = torch.func.jvp(lambda x, b=backend: run(given, b, x=x), (given["x"],), (given["x"],))
        assert tangent.shape == (4, 2)


def test_kernels_refuse_second_and_forward_derivatives_and_name_what_can():
    given = make(4)
    x = given["x"].detach().requires_grad_()
    (first,) = torch.autograd.grad(run(given, "native", x=x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only: name backend='eager'"):
        first.sum().backward()
    with pytest.raises(fastff.BackendUnavailable, match=r"within torch\.func: name backend='eager'"):
        torch.func.jvp(lambda x: run(given, "native", x=x), (given["x"],), (given["x"],))


@pytest.mark.parametrize("backend", ["reference", "eager", "native"])
@pytest.mark.parametrize("value", [-1, 7, 2**40, -(2**62)])
def test_a_leaf_out_of_range_is_named(backend, value):
    given = make(4)
    given["leaf"][2, 1] = value
    with pytest.raises(fastff.ShapeError, match=f"leaf {value} is not in 0 to 6"):
        run(given, backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 8)}, r"in_features 8 \(shape \(4, 8\)\) does not match in_features 6"),
        ({"x": torch.zeros(())}, "a scalar does not match in_features 6"),
        ({"leaf": torch.zeros(3, 2, dtype=torch.int64)}, r"leaf \(3, 2\) does not match \(4, 'k'\)"),
        ({"leaf": torch.zeros(4, 2, dtype=torch.int32)}, "leaf is torch.int32, expected torch.int64"),
        ({"leaf": torch.zeros(4, 2, dtype=torch.int64, device="meta")}, "leaf is on meta, x is on cpu"),
        ({"gate": torch.zeros(4, 3)}, r"gate \(4, 3\) does not match \(4, 2\) of leaf"),
        ({"gate": torch.zeros(4, 2).double()}, "gate is torch.float64, x is torch.float32"),
        ({"x": torch.zeros(4, 6).long()}, "x is torch.int64, expected a floating dtype"),
        ({"w_in": torch.zeros(7, 6)}, r"w_in \(7, 6\) does not have three dimensions"),
        ({"w_in": torch.zeros(7, 4, 6)}, r"w_in has 4 rows in a leaf, expected 1 \* 3 for 'gelu'"),
        ({"activation": "swiglu"}, r"w_in has 3 rows in a leaf, expected 2 \* 3 for 'swiglu'"),
        ({"w_out": torch.zeros(8, 3, 5)}, "w_out has 8 leaves, w_in 7"),
        ({"b_in": torch.zeros(7, 4)}, r"b_in \(7, 4\) does not match \(7, 3\)"),
        ({"b_out": torch.zeros(5)}, r"b_out \(5,\) does not match \(7, 5\)"),
        ({"activation": "tanh"}, "activation 'tanh' is not one of gelu"),
    ],
)
def test_bad_tensors_are_named(change, message):
    given = make(4, dtype=torch.float32)
    with pytest.raises(fastff.ShapeError, match=message):
        conditional_matmul(**{**given, **change})


def test_a_named_backend_runs_or_says_why_not():
    given = make(4)
    with pytest.raises(fastff.BackendUnavailable, match="'cuda' is not one of reference, eager, native, triton"):
        run(given, "cuda")
    with fastff.ops.use_backend("reference"):
        assert torch.equal(run(given), run(given, "reference"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_without_a_kernel(dtype):
    given = make(16, dtype=dtype, bias=False)
    y = run(given)
    assert y.dtype == dtype
    exact = run({name: value.double() if name in NAMES else value for name, value in given.items()}, "reference")
    most = 2 * (run(given, "reference") - exact).abs().max()
    assert 0 < (y - exact).abs().max() <= most
