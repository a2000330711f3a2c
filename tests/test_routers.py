"""Routers: what they choose, their gates, the balance of their load, and bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastff
from conftest import make_rows
from fastff.ops import native_router
from fastff.routers import FlatRouter, ProductKeyRouter, RouterConfig, TreeRouter, make_router
from fastff.routers.choose import best

ROUTERS = {
    "tree": lambda **options: TreeRouter(8, 3, 2, **options),
    "paths": lambda **options: TreeRouter(8, 4, 2, paths=3, **options),
    "flat": lambda **options: FlatRouter(8, 12, 3, **options),
    "product_key": lambda **options: ProductKeyRouter(8, 5, 4, **options),
}


def make(kind, *, seed=0, **options):
    """A router with random weights and, where there is one, a random balance."""
    router = ROUTERS[kind](bias=True, dtype=torch.float64, **options)
    with torch.no_grad():
        for i, tensor in enumerate([*router.parameters(), *[b for b in [router.balance] if b is not None]]):
            scale = 0.2 if tensor is router.balance else 1.0
            tensor.copy_(scale * make_rows(*tensor.shape, seed=seed + i))
    return router


@pytest.fixture(params=["reference", "native"])
def inference(request):
    """Routing without gradients, by PyTorch and by the C++ core."""
    with torch.no_grad(), fastff.ops.use_backend(request.param):
        yield


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def take_best(candidates, k):
    """The k of (value, index, score) with the largest value, ties to the lower index; by index."""
    return sorted(sorted(candidates, key=lambda c: (-c[0], c[1]))[:k], key=lambda c: c[1])


def expected(router, row):
    """Leaves and gates of one row, in plain Python, one candidate after another."""
    c, weight, bias = router.config, router.weight.detach(), router.bias.detach()
    balance = None if router.balance is None else router.balance.double()
    if c.kind in ("flat", "product_key"):
        if c.kind == "flat":
            scores = [float(row @ w + b) for w, b in zip(weight, bias, strict=True)]
        else:
            half = c.in_features // 2
            first, second = (weight[h] @ row[h * half : (h + 1) * half] + bias[h] for h in range(2))
            scores = [float(a + b) for a in first for b in second]
        chosen = take_best([(sigmoid(s) + float(balance[i]), i, s) for i, s in enumerate(scores)], c.chosen)
        total = sum(sigmoid(s) for _, _, s in chosen)
        return [i for _, i, _ in chosen], [sigmoid(s) / total * c.chosen for _, _, s in chosen]
    leaves, gates = [], []
    for tree in range(c.trees):
        score = (weight[tree] @ row + bias[tree]).tolist()
        if c.kind == "tree":
            node, gate = 0, 1.0
            for _ in range(c.depth):
                gate *= math.tanh(abs(score[node]) / c.tau)
                node = 2 * node + 1 + (score[node] > 0)
            leaves.append(tree * 2**c.depth + node - c.nodes)
            gates.append(gate)
            continue
        level = [(0.0, 0, 0.0)]
        for depth in range(c.depth):
            below = []
            for _, node, total in level:
                for side, sign in ((1, -1), (2, 1)):
                    child, path = 2 * node + side, total + sign * score[node]
                    below.append((sigmoid(path) + float(balance[tree, child]), child, path))
            level = take_best(below, min(c.chosen, 2 ** (depth + 1)))
        total = sum(sigmoid(path) for _, _, path in level)
        leaves += [tree * 2**c.depth + node - c.nodes for _, node, _ in level]
        gates += [sigmoid(path) / total * c.chosen for _, _, path in level]
    return leaves, gates


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_leaves_and_gates_are_those_of_the_definition(kind, backend):
    router = make(kind).eval()
    x = make_rows(50, 8)
    with torch.no_grad(), fastff.ops.use_backend(backend):
        assert native_router.can_route(x, router.weight) == (backend == "native")
        leaf, gate = router(x)
    assert leaf.dtype == torch.int64
    assert leaf.shape == gate.shape == (50, router.k)
    for row in range(50):
        leaves, gates = expected(router, x[row])
        assert leaf[row].tolist() == leaves
        assert gate[row].tolist() == pytest.approx(gates, abs=1e-12)
    assert (leaf[:, 1:] > leaf[:, :-1]).all(), "ascending"
    assert leaf.max() < router.leaves
    assert router.balance is None or not torch.equal(leaf, unbalanced(router)(x).leaf), "the balance must matter here"


def unbalanced(router):
    other = make(router.config.kind).eval()
    other.balance.zero_()
    return other


@pytest.mark.parametrize(
    "options", [{"gate": "boundary"}, {"gate": "boundary_min", "tau": 0.7}, {"gate": None}], ids=str
)
def test_a_greedy_tree_routes_as_the_layer_does(options):
    """Rows that decide by more than rounding; the layer's y shows the gate: every leaf adds its own unit vector."""
    router = TreeRouter(8, 3, 2, bias=True, dtype=torch.float64, **options).eval()
    layer = fastff.FFF(
        8, 16, depth=3, trees=2, node_output=False, activation="identity", bias=True, dtype=torch.float64, **options
    )
    with torch.no_grad():
        router.bias.copy_(make_rows(2, 7, seed=3))
        layer.w_in.zero_(), layer.b_in.zero_()
        layer.w_in[:, :7], layer.b_in[:, :7] = router.weight, router.bias
        layer.b_in[:, 7:] = 1
        layer.w_out.copy_(torch.eye(16, dtype=torch.float64).view(2, 8, 16))
        x = make_rows(200, 8)
        routed, (leaf, gate) = layer.routed(x), router(x)
    assert routed.margin.min() > 1e-9
    assert torch.equal(leaf, routed.leaf + torch.tensor([0, 8]))
    assert (routed.y - torch.zeros(200, 16, dtype=torch.float64).scatter(1, leaf, gate)).abs().max() <= 1e-12


@pytest.mark.parametrize("kind", ROUTERS)
def test_gates_have_gradients(kind):
    router = make(kind).eval()
    x = make_rows(3, 8, seed=2).requires_grad_()

    def gate(x, weight, bias):
        return torch.func.functional_call(router, {"weight": weight, "bias": bias}, (x,)).gate

    assert torch.autograd.gradcheck(gate, (x, router.weight, router.bias), eps=1e-7, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("kind", ["paths", "flat", "product_key"])
def test_a_router_that_does_not_weigh_has_gates_of_one(kind):
    gate = make(kind, gate=None)(make_rows(3, 8)).gate
    assert torch.equal(gate, torch.ones_like(gate))


@pytest.mark.parametrize("kind", ["paths", "flat", "product_key"])
@pytest.mark.usefixtures("inference")
def test_gates_of_the_unlikely_are_still_gates(kind):
    """Scores so low that each sigmoid is 0 in float32."""
    router = ROUTERS[kind](bias=True).eval()
    with torch.no_grad():
        router.weight.zero_(), router.bias.fill_(-300)
    gate = router(make_rows(3, 8, dtype=torch.float32)).gate
    per = gate.view(3, router.config.trees, -1)
    assert torch.allclose(per.sum(-1), torch.full_like(per.sum(-1), router.config.chosen))


def test_best_breaks_ties_downwards_and_nan_loses():
    nan = float("nan")
    assert best(torch.tensor([1.0, 3, 3, 3, 0]), 2).tolist() == [1, 2]
    assert best(torch.tensor([1.0, 1, 3, 1, 1]), 3).tolist() == [0, 1, 2]
    assert best(torch.tensor([nan, 1.0, nan, 2, 0]), 3).tolist() == [1, 3, 4]
    assert best(torch.tensor([nan, nan, nan, 2.0]), 2).tolist() == [0, 3]
    assert best(torch.tensor([[5.0, 1], [1, 5]]), 2).tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.usefixtures("inference")
def test_ties_choose_the_lower_leaf(kind):
    router = ROUTERS[kind]().eval()
    router.weight.zero_()
    leaf = router(make_rows(2, 8, dtype=torch.float32)).leaf.view(2, router.config.trees, -1)
    lowest = torch.arange(router.config.chosen) + torch.arange(router.config.trees)[:, None] * (
        router.leaves // router.config.trees
    )
    assert (leaf == lowest).all()


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.usefixtures("inference")
def test_a_row_that_is_not_a_number_has_no_gate_and_disturbs_no_other(kind):
    router, x = make(kind).eval(), make_rows(5, 8)
    clean = router(x)
    x[2, 3] = float("nan")
    leaf, gate = router(x)
    assert gate[2].isnan().all() or kind == "product_key"
    assert gate[2].isnan().any()
    others = [0, 1, 3, 4]
    assert torch.equal(leaf[others], clean.leaf[others])
    assert torch.equal(gate[others], clean.gate[others])
    assert ((leaf >= 0) & (leaf < router.leaves)).all()


@pytest.mark.usefixtures("inference")
def test_one_score_that_is_not_a_number_loses():
    router, x = make("flat").eval(), make_rows(20, 8)
    router.bias[4] = float("nan")
    leaf, gate = router(x)
    assert (leaf != 4).all()
    assert gate.isfinite().all()


@pytest.mark.parametrize("kind", ["paths", "flat", "product_key"])
def test_balance_moves_by_a_fixed_step_against_the_load(kind):
    router, x = make(kind), make_rows(64, 8)
    before = router.balance.clone()
    chosen = router(x).leaf
    moved = router.balance - before
    leaves = router.leaves // router.config.trees
    load = F.one_hot(chosen % leaves + chosen // leaves * leaves, router.leaves).sum((0, 1)).view(-1, leaves)
    want = 1e-3 * torch.sign(load.float().mean(-1, keepdim=True) - load)
    if kind == "paths":
        assert torch.allclose(moved[:, leaves - 1 :], want, atol=1e-7)
        assert (moved[:, :3] == 0).all(), "levels of which all nodes are kept"
        assert (moved[:, 3:7] != 0).any(), "3 of 4 nodes are kept"
    else:
        assert torch.allclose(moved, want.flatten(), atol=1e-7)
    router.eval()(x)
    assert torch.equal(router.balance - before, moved)


@pytest.mark.parametrize("kind", ["paths", "flat", "product_key"])
def test_balance_spreads_rows_that_are_all_alike(kind):
    router = ROUTERS[kind](balance_step=0.05)
    x = make_rows(1, 8, dtype=torch.float32).expand(32, 8) + 0.05 * make_rows(32, 8, seed=7, dtype=torch.float32)
    before = router.usage(x).dead_leaves.sum()
    for _ in range(60):
        router(x)
    seen = router.usage()
    assert before > 0
    assert seen.dead_leaves.sum() == 0
    assert int(seen.counts.sum()) == 60 * 32 * router.k


def test_balance_is_saved_is_no_parameter_and_stays_float32():
    router = make("flat")
    router(make_rows(9, 8))
    assert set(dict(router.named_parameters())) == {"weight", "bias"}
    other = make("flat", seed=5)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.balance, router.balance)
    half = other.to(torch.bfloat16)
    assert half.weight.dtype == torch.bfloat16
    assert torch.equal(half.balance, router.balance), "not rounded either"
    still = ROUTERS["flat"](balance_step=0.0)
    still(make_rows(9, 8, dtype=torch.float32))
    assert (still.balance == 0).all()


@pytest.mark.parametrize("step", [0.0, 10.0])
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_computes_again_chooses_as_it_did(reentrant, step):
    """A step that would turn every choice over, were the moved balance used."""
    plain, again = (make("flat", balance_step=step) for _ in range(2))
    x = make_rows(20, 8).requires_grad_()
    want, got = (
        plain(x).gate,
        checkpoint(lambda x: again(x).gate, x, use_reentrant=reentrant),
    )
    weights = make_rows(20, 3, seed=4)
    (want * weights).sum().backward()
    wanted, x.grad = x.grad, None
    (got * weights).sum().backward()
    assert torch.equal(x.grad, wanted)
    assert torch.equal(plain.balance, again.balance)
    assert torch.equal(plain.usage().counts, again.usage().counts)


@pytest.mark.parametrize("kind", ROUTERS)
def test_inference_in_float32_routes_as_training_does_where_scores_are_apart(kind):
    """By the C++ core, in both dtypes, and it counts the same leaves."""
    router = make(kind).eval()
    x = make_rows(200, 8)
    with torch.no_grad():
        exact = router(x)
        single = copy.deepcopy(router).float()
        got = single(x.float())
    assert torch.equal(exact.leaf, router(x).leaf)
    assert (got.leaf == exact.leaf).all(-1).double().mean() > 0.98
    same = (got.leaf == exact.leaf).all(-1)
    assert (got.gate[same] - exact.gate[same]).abs().max() < 1e-5
    single.track_usage()
    with torch.no_grad():
        single(x.float())
    assert (
        single.usage().counts.flatten().tolist() == torch.bincount(got.leaf.flatten(), minlength=router.leaves).tolist()
    )


@pytest.mark.parametrize("kind", ROUTERS)
def test_usage_counts_what_was_chosen(kind):
    router, x = make(kind), make_rows(40, 8)
    leaf = router(x).leaf
    counts = router.usage().counts
    assert counts.flatten().tolist() == torch.bincount(leaf.flatten(), minlength=router.leaves).tolist()
    router.reset_usage()
    router.eval()(x)
    assert int(router.usage().counts.sum()) == 0
    leaf = router(x).leaf
    assert router.usage(x).counts.flatten().tolist() == torch.bincount(leaf.flatten(), minlength=router.leaves).tolist()
    router.track_usage()
    router(x)
    assert int(router.usage().counts.sum()) == 40 * router.k


@pytest.mark.parametrize("kind", ROUTERS)
def test_compile_without_graph_breaks(kind):
    plain, compiled = make(kind), make(kind)
    x = make_rows(9, 8)
    torch._dynamo.reset()
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        want, got = plain(x), run(x)
        assert torch.equal(want.leaf, got.leaf)
        assert torch.equal(want.gate, got.gate)
    assert plain.balance is None or torch.equal(plain.balance, compiled.balance)


def test_autocast_routes_in_float32():
    router, x = ROUTERS["flat"](bias=True).eval(), make_rows(64, 8, dtype=torch.float32)
    want = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = router(x)
    assert torch.equal(want.leaf, got.leaf)
    assert torch.equal(want.gate, got.gate)


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("shape", [(8,), (2, 3, 8), (0, 8)])
def test_any_leading_shape(kind, shape):
    leaf, gate = make(kind)(make_rows(*shape))
    assert leaf.shape == gate.shape == (*shape[:-1], ROUTERS[kind]().k)


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_configuration_makes_its_router(kind):
    router = make(kind)
    other = make_router(router.config, dtype=torch.float64)
    assert type(other) is type(router)
    assert other.config == router.config
    other.load_state_dict(router.state_dict())


def test_sizes_and_costs():
    assert (TreeRouter(8, 5, 24).k, TreeRouter(8, 5, 24).leaves) == (24, 768)
    assert TreeRouter(8, 5, 24).flops_per_row == 2 * 8 * 24 * 5
    assert TreeRouter(8, 8, paths=8).flops_per_row == 2 * 8 * (1 + 2 + 4 + 5 * 8)
    assert FlatRouter(8, 96, 3).flops_per_row == 2 * 8 * 96
    assert (ProductKeyRouter(8, 28, 24).leaves, ProductKeyRouter(8, 28, 24).flops_per_row) == (784, 2 * 8 * 28)


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: FlatRouter(8, 3, 4), "4 leaves cannot be chosen of 3"),
        (lambda: FlatRouter(8, 3, 0), "chosen 0 of a flat router is not an integer of at least 1"),
        (lambda: FlatRouter(8, 3, 2, gate="boundary"), "gate 'boundary' of a flat router is not None or 'normalised'"),
        (lambda: ProductKeyRouter(7, 3, 2), "in_features 7 of a product_key router is odd"),
        (lambda: TreeRouter(8, 2, paths=5), "5 leaves cannot be chosen of 4"),
        (lambda: TreeRouter(8, 25), "depth 25 is not 0 to 24"),
        (lambda: TreeRouter(8, 2, gate="normalised"), "gate 'normalised' of a tree router is not None or 'boundary'"),
        (lambda: TreeRouter(8, 2, tau=0.0), "tau 0.0 is not a positive finite number"),
        (lambda: FlatRouter(8, 3, 2, balance_step=-1.0), "balance_step -1.0 is not a finite number of at least 0"),
        (lambda: RouterConfig(kind="hash", in_features=8), "router kind 'hash' is not one of tree, paths"),
        (lambda: FlatRouter(8, 3, 2)(torch.zeros(2, 7)), r"x \(2, 7\) does not match in_features 8 of the router"),
        (lambda: FlatRouter(8, 3, 2)(torch.zeros(())), r"x \(\) does not match in_features 8"),
    ],
)
def test_bad_input_is_named(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()


OWN = {
    "tree": lambda **more: TreeRouter(24, 3, 2, bias=True, **more),
    "paths": lambda **more: TreeRouter(24, 4, paths=4, bias=True, **more),
    "flat": lambda **more: FlatRouter(24, 16, 4, bias=True, **more),
    "product_key": lambda **more: ProductKeyRouter(24, 4, 4, bias=True, **more),
}


def behind(kind):
    torch.manual_seed(0)
    return fastff.ConditionalFeedforward(24, router=OWN[kind](), leaves=16, leaf_width=2)


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("kind", OWN)
def test_weights_of_a_wrong_shape_are_an_error_not_a_read_beyond_the_end(kind, quantization):
    layer, x = behind(kind).quantize(quantization).eval(), torch.randn(3, 24)
    with torch.no_grad():
        layer(x)
        for name in ("weight", "bias"):
            right = getattr(layer.router, name)
            setattr(layer.router, name, nn.Parameter(right.detach().flatten()[:1].clone()))
            with pytest.raises(fastff.ShapeError, match=f"{name} .* of the router does not match"):
                layer(x)
            setattr(layer.router, name, right)
        layer.router.bias = None
        with pytest.raises(fastff.ShapeError, match="bias None of the router"):
            layer(x)


@pytest.mark.parametrize("kind", OWN)
def test_counters_are_defined_after_meta(kind):
    with torch.device("meta"):
        layer, other = behind(kind), behind(kind)
    layer.to_empty(device="cpu")
    assert int(layer.usage().counts.sum()) == 0
    other.load_state_dict(behind(kind).state_dict(), assign=True)
    other.train()(torch.randn(5, 24))
    assert int(other.usage().counts.sum()) == 5 * other.router.k


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("kind", OWN)
def test_functional_derivatives_in_training_and_of_quantised_layers(kind):
    layer, x = behind(kind).double().train(), torch.randn(3, 24, dtype=torch.float64)
    before = layer.usage().counts.clone()
    _, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    near = (layer(x + 1e-6) - layer(x - 1e-6)) / 2e-6
    torch.testing.assert_close(tangent, near, rtol=1e-4, atol=1e-7)
    grad = torch.func.grad(lambda x: layer(x).sum())(x)
    x.requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(layer(x).sum(), x)[0])
    assert int(layer.usage().counts.sum() - before.sum()) == 3 * 3 * layer.router.k
    quantised = behind(kind).quantize("int8").eval()
    with pytest.raises(RuntimeError, match="no gradient flows through a layer quantized"):
        torch.func.jvp(quantised, (x.detach().float(),), (torch.ones(3, 24),))
