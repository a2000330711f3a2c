"""Conditional products on a GPU against the float64 reference: on a device, else in the interpreter's own process (see
tests/test_triton.py)."""

import os

import pytest
import torch

from fastff.ops import conditional_reference as reference
from fastff.ops.weights import Leaves

ON_DEVICE = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_DEVICE and not INTERPRETED else "cpu"

pytestmark = [
    pytest.mark.skipif(not (ON_DEVICE or INTERPRETED), reason="runs in the interpreter's own process"),
    *([pytest.mark.gpu] if ON_DEVICE else []),
]
if ON_DEVICE or INTERPRETED:
    from fastff.ops.triton_kernels import conditional_kernels, conditional_plan, conditional_products, plan, sort

# rows, slots, leaves, width, in_features, out_features, activation, bias
SHAPES = [
    (50, 3, 7, 5, 20, 36, "swiglu", True),
    (40, 2, 5, 70, 33, 20, "gelu", True),  # a leaf wider than one pass
    (17, 1, 1, 3, 16, 16, "relu", False),
    (60, 3, 3, 16, 32, 32, "swiglu", False),  # tiles of one leaf in several programs
    (5, 3, 20, 4, 64, 64, "silu", False),  # more leaves than rows
    (30, 2, 4, 2, 17, 19, "abs", True),
    (30, 2, 4, 2, 17, 19, "gelu_tanh", False),
    (30, 2, 4, 2, 17, 19, "identity", True),
]
NAMES = ("x", "gate", "w_in", "b_in", "w_out", "b_out")


def make_inputs(shape, dtype=torch.float64, seed=0):
    """x, leaf, gate, w_in, b_in, w_out, b_out and grad_y on the CPU."""
    rows, slots, leaves, width, in_features, out_features, activation, bias = shape
    generator = torch.Generator().manual_seed(seed)
    in_rows = width * (2 if activation == "swiglu" else 1)

    def normal(*size, scale=1.0):
        return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(dtype)

    leaf = torch.randint(0, leaves, (rows, slots), generator=generator)
    return {
        "x": normal(rows, in_features), "leaf": leaf, "gate": normal(rows, slots),
        "w_in": normal(leaves, in_rows, in_features, scale=in_features**-0.5),
        "b_in": normal(leaves, in_rows) if bias else None,
        "w_out": normal(leaves, width, out_features, scale=max(1, slots * width) ** -0.5),
        "b_out": normal(leaves, out_features) if bias else None, "grad_y": normal(rows, out_features),
    }  # fmt: skip


def arguments(tensors):
    """x, leaf and gate, and the weights of the leaves."""
    routed = [tensors[name] for name in ("x", "leaf", "gate")]
    return routed, Leaves(**{name: tensors[name] for name in Leaves._fields})


def truth(inputs, activation, dtype=torch.float64):
    """y and the gradients, by the reference in this dtype."""
    leaves = {
        name: None if inputs[name] is None else inputs[name].to(dtype).detach().requires_grad_() for name in NAMES
    }
    routed, weights = arguments({**leaves, "leaf": inputs["leaf"]})
    y = reference.forward(*routed, weights, activation=activation)
    y.backward(inputs["grad_y"].to(dtype))
    return [y.detach(), *(None if tensor is None else tensor.grad for tensor in leaves.values())]


def computed(inputs, activation, dtype):
    on = {
        name: None if tensor is None else tensor.to(DEVICE, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in inputs.items()
    }
    grad_y = on.pop("grad_y")
    routed, leaves = arguments(on)
    y, scores = conditional_products.forward(*routed, leaves, activation=activation)
    grads = conditional_products.backward(grad_y, *routed, leaves, scores, activation=activation)
    return [y, *(None if inputs[name] is None else grad for name, grad in zip(NAMES, grads, strict=True))]


def error(got, want):
    return (got.cpu().double() - want.double()).abs().max().item() if want.numel() else 0.0


HALVES = [torch.float16] + ([torch.bfloat16] if ON_DEVICE else [])
CASES = [(shape, torch.float32) for shape in SHAPES] + [(SHAPES[0], dtype) for dtype in HALVES]


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_forward_and_gradients_match_the_reference(shape, dtype):
    activation = shape[6]
    inputs = make_inputs(shape, dtype)
    want, plain = truth(inputs, activation), truth(inputs, activation, dtype)
    for name, got, exact, rough in zip(("y", *NAMES), computed(inputs, activation, dtype), want, plain, strict=True):
        if exact is not None:
            assert got.dtype == dtype
            # Half precision stores scores and coefficients rounded, as the reference does; sums differ in order.
            allowed = 2 * error(rough, exact) + (1e-5 if dtype == torch.float32 else 0.02 * exact.abs().max().item())
            assert error(got, exact) <= allowed, name


@pytest.fixture(params=["looked up", "sorted"])
def grouping(request, monkeypatch):
    """How the pairs of a leaf are found, which is recorded with a pass for its shapes: rows that no other test has."""
    if request.param == "sorted":
        monkeypatch.setattr(sort, "FEW", 0)
    return request.param


def test_leaves_that_no_row_uses_get_exactly_zero(grouping):
    inputs = make_inputs((52 if grouping == "sorted" else 50, *SHAPES[0][1:]))
    inputs["leaf"] = inputs["leaf"] % 3
    _, _, _, *weights = computed(inputs, "swiglu", torch.float32)
    for grad in weights:
        assert torch.count_nonzero(grad[3:]) == 0
        assert torch.count_nonzero(grad[:3]) > 0


def test_a_leaf_that_stands_twice_in_a_row_adds_twice(grouping):
    inputs = make_inputs((62 if grouping == "sorted" else 60, *SHAPES[3][1:]))
    inputs["leaf"][:, 1] = inputs["leaf"][:, 0]
    inputs["gate"][:, 1] = inputs["gate"][:, 0]
    want = truth(inputs, "swiglu")
    for got, exact in zip(computed(inputs, "swiglu", torch.float32), want, strict=True):
        if exact is not None:
            assert error(got, exact) <= 1e-4


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy
def test_what_is_not_finite_stays_in_its_row():
    inputs = make_inputs(SHAPES[0])
    inputs["gate"][3, 1], inputs["x"][8, 0] = float("nan"), float("inf")
    y, grad_x, *_ = computed(inputs, "swiglu", torch.float32)
    finite = torch.isfinite(y).all(1)
    assert finite.nonzero().flatten().tolist() == [row for row in range(50) if row not in (3, 8)]
    assert torch.isfinite(grad_x[finite]).all()


def test_no_rows_and_no_slots():
    for rows, slots in ((0, 3), (4, 0)):
        inputs = make_inputs((rows, slots, 7, 5, 20, 36, "swiglu", True))
        y, *grads = computed(inputs, "swiglu", torch.float32)
        assert y.shape == (rows, 36)
        assert all(torch.count_nonzero(tensor) == 0 for tensor in (y, *grads))


@pytest.mark.parametrize("favoured", [False, True])
def test_blocks_of_rows_and_parts_of_a_weight_gradient_are_summed(favoured):
    """favoured: one leaf has most of the rows, another none."""
    inputs = make_inputs((61, 3, 5, 20, 32, 32, "swiglu", True))
    if favoured:
        inputs["leaf"] = torch.where(inputs["leaf"] > 2, 1, inputs["leaf"])
    tensors = {name: None if t is None else t.to(DEVICE, torch.float32 if t.is_floating_point() else t.dtype)
               for name, t in inputs.items()}  # fmt: skip
    grad_y = tensors.pop("grad_y")
    tiles = plan.Tiles(rows=16, columns=16, inner=16, outer=16)
    chosen = conditional_plan.Plan(tiles, tiles, chunk=24, blocks=3)
    routed, leaves = arguments(tensors)
    y, scores = conditional_kernels.forward(*routed, leaves, activation="swiglu", plan=chosen)
    grads = conditional_kernels.backward(grad_y, *routed, leaves, scores, activation="swiglu", plan=chosen)
    for got, exact in zip((y, *grads), truth(inputs, "swiglu"), strict=True):
        assert error(got, exact) <= 1e-4


@pytest.mark.parametrize("blocks", [1, 3])
def test_pairs_are_grouped_by_leaf_in_blocks_of_rows(blocks, monkeypatch):
    monkeypatch.setattr(sort, "FEW", 0)
    leaf = torch.randint(0, 7, (100, 3), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    groups = sort.group_pairs(leaf, level=3, tile=16, blocks=blocks)
    assert groups.order.shape == (blocks, -(-100 // blocks) * 3)
    for block, (part, order) in enumerate(zip(leaf.flatten().split(groups.order.shape[1]), groups.order, strict=True)):
        first = block * groups.order.shape[1]
        assert torch.equal(order[: len(part)].long() - first, part.argsort(stable=True))
        counts = part.bincount(minlength=8)
        for row, each in zip(groups.table[block], (counts, -(-counts // 16)), strict=False):
            assert row.tolist() == [0, *each.cumsum(0).tolist()]


def test_too_many_leaves_are_refused():
    x, w_out = torch.zeros(1, 16, device=DEVICE), torch.zeros(5000, 1, 16, device=DEVICE)
    reason = conditional_products.why_not(x, torch.zeros(5000, 2, 16, device=DEVICE), w_out, "swiglu")
    assert reason == "backend 'triton' sorts rows by at most 4096 leaves, these are 5000"
