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


def test_the_ops_are_registered_as_they_behave():
    score = normal(5, 2, 7).requires_grad_()
    torch.library.opcheck(torch.ops.fastff.choose_best.default, (score.detach().flatten(1), None, 3))
    # Not its fourth test: it adds the outputs up, in the dtype of the first, which is an integer here.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fastff.choose_beam.default, (score, normal(2, 15), 2), test_utils=tests)
