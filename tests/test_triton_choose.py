"""The GPU's choice of leaves equals the plain one: on a device, else in the interpreter's own process (see
tests/test_triton.py)."""

import os

import pytest
import torch

from fastff.ops import choose_ops
from fastff.routers import choose as plain

ON_DEVICE = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_DEVICE and not INTERPRETED else "cpu"

pytestmark = [
    pytest.mark.skipif(not (ON_DEVICE or INTERPRETED), reason="runs in the interpreter's own process"),
    *([pytest.mark.gpu] if ON_DEVICE else []),
]
if ON_DEVICE or INTERPRETED:
    from fastff.ops.triton_kernels import router_kernels


def normal(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(("rows", "count", "k"), [(37, 96, 3), (5, 7, 7), (9, 1, 1), (20, 40, 5)])
def test_the_best_leaves(rows, count, k, balanced):
    score, balance = normal(rows, count), 0.1 * normal(count, seed=1) if balanced else None
    score[0, 0], score[1], score[2] = float("nan"), 0.0, float("nan")  # NaN loses; all tie; nothing but NaN
    leaf, load = choose_ops.best(score, balance, k)
    want = plain.best(plain.preference(score, balance), k)
    assert torch.equal(leaf, want)
    assert torch.equal(load, plain.histogram(want, count))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("balance", [None, torch.zeros(3)], ids=["alone", "balanced"])
def test_minus_infinity_wins_against_nan(balance):
    nan, low, balance = float("nan"), -float("inf"), None if balance is None else balance.to(DEVICE)
    score = torch.tensor([[nan, low, low], [nan, low, 1.0], [-3.3e38, low, 0.0]], device=DEVICE)
    for k, want in ((1, [1, 2, 2]), (2, [[1, 2], [1, 2], None])):
        plain_leaf, leaf = plain.best(plain.preference(score, balance), k), choose_ops.best(score, balance, k)[0]
        for row, expected in enumerate(want):
            if expected is not None:
                assert plain_leaf[row].tolist() == leaf[row].tolist() == torch.tensor(expected).reshape(-1).tolist()
        x = torch.eye(3, device=DEVICE)
        routed = choose_ops.route(x[:1], torch.zeros(3, 3, device=DEVICE), score[0], balance, k, counted=False)[0]
        assert routed.flatten().tolist() == leaf[0].tolist()


def test_without_balance_scores_whose_sigmoids_are_1_keep_their_order():
    score = torch.tensor([[18.0, 40.0, 25.0]], device=DEVICE)
    assert choose_ops.best(score, None, 1)[0].item() == plain.best(plain.preference(score, None), 1).item() == 1
    assert choose_ops.beam(score.view(1, 1, 3), None, 1)[0].item() == plain.beam(score.view(1, 1, 3), 1, None).leaf == 3
    x, weight = (
        score.T.contiguous(),
        torch.ones(4, 1, device=DEVICE) * torch.tensor([[0.5], [0.9], [1.0], [0.8]], device=DEVICE),
    )
    leaf, _, _ = choose_ops.route(x, weight, None, None, 1, counted=True)
    assert leaf.flatten().tolist() == [2, 2, 2]


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(
    ("rows", "trees", "depth", "k"), [(21, 1, 5, 4), (7, 3, 3, 2), (6, 2, 3, 8), (4, 1, 1, 2), (9, 1, 0, 1)]
)
def test_the_best_leaves_of_trees(rows, trees, depth, k, balanced):
    nodes = 2**depth - 1
    score, balance = normal(rows, trees, nodes), 0.1 * normal(trees, 2 * nodes + 1, seed=1) if balanced else None
    if depth:
        score[0, 0, 0], score[1] = float("nan"), 0.0
    leaf, total, load = choose_ops.beam(score, balance, k)
    want = plain.beam(score, k, balance)
    first = torch.arange(trees, device=DEVICE)[:, None] * (2 * nodes + 1)
    assert torch.equal(leaf, want.leaf)
    torch.testing.assert_close(total, want.score, rtol=0, atol=1e-5, equal_nan=True)
    assert torch.equal(load.flatten(), plain.histogram(want.kept + first, load.numel()))


def test_path_sums_have_the_gradient_of_the_plain_form():
    score = normal(11, 2, 15).requires_grad_()
    other, weight = score.detach().double().requires_grad_(), normal(11, 2, 3, seed=2)
    (choose_ops.beam(score, None, 3)[1] * weight).sum().backward()
    (plain.beam(other, 3, None).score * weight).sum().backward()
    torch.testing.assert_close(score.grad.double(), other.grad, rtol=0, atol=1e-5)


ROUTERS = [  # rows, in_features, shape of weight without them, k
    (37, 24, (96,), 3), (70, 33, (7,), 7), (5, 16, (40,), 5),
    (21, 24, (1, 31), 4), (9, 40, (3, 7), 2), (6, 16, (2, 7), 8), (4, 16, (1, 1), 2),
]  # fmt: skip


def in_full(x, weight, bias, balance, k):
    """leaf, gate, load, and which rows' choices rounding could have changed, by the plain form in float64."""
    x, weight, bias = (None if t is None else t.double() for t in (x, weight, bias))
    score = torch.nn.functional.linear(x, weight.flatten(0, -2), None if bias is None else bias.flatten())
    if weight.dim() == 2:
        leaf = plain.best(plain.preference(score, balance), k)
        return leaf, plain.normalised(score.gather(1, leaf)), plain.histogram(leaf, weight.shape[0])
    found = plain.beam(score.view(-1, *weight.shape[:2]), k, balance)
    first, size = torch.arange(weight.shape[0], device=DEVICE)[:, None], weight.shape[1] + 1
    load = plain.histogram(found.kept + first * (2 * size - 1), weight.shape[0] * (2 * size - 1))
    return (found.leaf + first * size).flatten(1), plain.normalised(found.score).flatten(1), load.view(-1, 2 * size - 1)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("rows", "features", "shape", "k"), ROUTERS, ids=str)
def test_one_kernel_scores_chooses_and_gates(rows, features, shape, k, full):
    x, weight = normal(rows, features), normal(*shape, features, seed=3) * features**-0.5
    candidates = shape if len(shape) == 1 else (shape[0], 2 * shape[1] + 1)
    bias, balance = (0.1 * normal(*shape, seed=4), 0.1 * normal(*candidates, seed=5)) if full else (None, None)
    given = [tensor if tensor is None else tensor.requires_grad_() for tensor in (x, weight, bias)]
    exact = [tensor if tensor is None else tensor.detach().double().requires_grad_() for tensor in given]
    leaf, gate, load = choose_ops.route(*given, balance, k, counted=True)
    want_leaf, want_gate, want_load = in_full(*exact, balance, k)
    assert torch.equal(leaf, want_leaf)
    assert torch.equal(load.view(want_load.shape), want_load)
    torch.testing.assert_close(gate.double(), want_gate, rtol=0, atol=2e-6)
    grad = normal(*gate.shape, seed=6)
    (gate * grad).sum().backward()
    (want_gate * grad).sum().backward()
    for one, other in zip(given, exact, strict=True):
        if one is not None:
            torch.testing.assert_close(one.grad.double(), other.grad, rtol=0, atol=1e-5)
    assert choose_ops.route(*given, balance, k, counted=False)[2].numel() == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("shape", [(40,), (1, 31)])
def test_wide_steps_route_as_narrow_ones(shape, monkeypatch):
    """Where a program has memory for them, the products of few rows take more features at once."""
    x, weight = normal(9, 300).half(), (normal(*shape, 300, seed=3) / 300**0.5).half()
    steps, found = [], []
    for memory in (0, 2**18):
        monkeypatch.setattr(router_kernels, "_shared_memory", lambda _, memory=memory: memory)
        steps.append(router_kernels.step(x, 64))
        found.append(choose_ops.route(x, weight, None, None, 3, counted=True))
    assert steps == [64, 256]
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("shape", [(40,), (1, 31)])
def test_routing_that_finds_no_room_keeps_fewer_steps_in_flight(shape, monkeypatch):
    from triton.runtime.errors import OutOfResources

    x, weight = normal(9, 48), normal(*shape, 48, seed=3) / 48**0.5
    want = choose_ops.route(x, weight, None, None, 3, counted=True)
    kernel, tried = router_kernels._route_kernel, []

    class Small:
        """As the kernel on a device whose programs have room for one step."""

        def __getitem__(self, grid):
            def launch(*args, num_stages, **options):
                tried.append(num_stages)
                if num_stages > 1:
                    raise OutOfResources(200, 100, "shared memory")
                return kernel[grid](*args, num_stages=num_stages, **options)

            return launch

    monkeypatch.setattr(router_kernels, "_route_kernel", Small())
    monkeypatch.setattr("fastff.ops.triton_kernels._fitted", {})
    for _ in range(2):
        for got, expected in zip(choose_ops.route(x, weight, None, None, 3, counted=True), want, strict=True):
            assert torch.equal(got, expected)
    assert tried == [3, 2, 1, 1], "what fits is known the second time"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("shape", [(40,), (1, 31)])
def test_equal_scores_and_rows_that_are_not_finite_choose_as_the_plain_form(shape):
    x, weight = normal(6, 16), normal(*shape, 16, seed=3)
    x[1], x[2, 0], x[3, 0] = 0.0, float("nan"), float("inf")
    leaf, gate, _ = choose_ops.route(x, weight, None, None, 3, counted=False)
    want_leaf, want_gate, _ = in_full(x, weight, None, None, 3)
    assert torch.equal(leaf, want_leaf)
    torch.testing.assert_close(gate.double(), want_gate, rtol=0, atol=1e-5, equal_nan=True)


def test_the_ops_are_registered_as_they_behave():
    score = normal(5, 2, 7).requires_grad_()
    torch.library.opcheck(torch.ops.fastff.choose_best.default, (score.detach().flatten(1), None, 3))
    x, weight = normal(5, 16).requires_grad_(), normal(2, 7, 16).requires_grad_()
    for width in (weight, weight[0].detach().requires_grad_()):
        args = (x, width, None, None, 2, True)
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(torch.ops.fastff.route.default, args, test_utils=tests)
    # Not its fourth test: it adds the outputs up, in the dtype of the first, which is an integer here.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fastff.choose_beam.default, (score, normal(2, 15), 2), test_utils=tests)
