"""The GPU kernels against the float64 reference: on a device where there is one, else under Triton's interpreter.

The interpreter has to be chosen before Triton is imported, so without a device this file runs itself in a process of
its own. It has no bf16 arithmetic: float32 and float16 are tested there, bfloat16 on a device.
"""

import json
import os
from dataclasses import replace

import pytest
import torch

from fastff import FFF, ops
from fastff.config import TreeConfig
from fastff.errors import BackendUnavailable
from fastff.ops import reference, triton_kernels
from fastff.ops.weights import Weights

ON_DEVICE = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_DEVICE and not INTERPRETED else "cpu"

runs_kernels = [
    pytest.mark.skipif(not (ON_DEVICE or INTERPRETED), reason="runs in the interpreter's own process"),
    *([pytest.mark.gpu] if ON_DEVICE else []),
]
if ON_DEVICE or INTERPRETED:
    from fastff.ops.triton_kernels import gradients, grouped, per_token, plan, sort, speculative, tuned, tuning


def config(**changes):
    return TreeConfig(**{"in_features": 20, "out_features": 36, "depth": 3, **changes})


SHAPES = [
    config(),
    config(depth=0, bias=True),
    config(depth=2, trees=3, leaf_width=5, activation="silu", gate="boundary", bias=True),
    config(depth=2, trees=2, leaf_width=3, activation="swiglu", node_output=False, gate="boundary", bias=True),
    config(depth=2, leaf_width=2, activation="swiglu", node_output=False),
    config(depth=6, activation="gelu_tanh", gate="boundary"),
    config(trees=4, activation="identity", node_output=False, in_features=17),
    config(depth=4, activation="abs"),
    config(depth=1, leaf_width=40, activation="relu", node_output=False, bias=True, out_features=7),
]


def make_inputs(config, count, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, scale):
        if shape is None:
            return None
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(DEVICE, dtype)

    return (
        normal((count, config.in_features), 1.0),
        normal(config.shape_of_w_in, config.in_features**-0.5),
        normal(config.shape_of_b_in, 0.1),
        normal(config.shape_of_w_out, config.active_neurons**-0.5),
        normal(config.shape_of_b_out, 0.1),
    )


def in_float64(args):
    return [None if a is None else a.double().requires_grad_() for a in args]


def split(args):
    return args[0], Weights(*args[1:])


def by_reference(args, config):
    return reference.forward(*split(args), config=config)


def small_tiles():
    return plan.Tiles(rows=16, columns=32, inner=16, outer=32, warps=4, stages=2)


def run(form, args, config):
    if form == "per_token":
        block = plan.PerTokenPlan(
            ahead=2, fused=False, block_in=16, block_out=32, block_leaf=4, block_entries=4, warps=1
        )
        return per_token.forward(*split(args), config=config, plan=block)
    if form == "fused":
        block = plan.PerTokenPlan(
            ahead=3, fused=True, block_in=32, block_out=16, block_leaf=2, block_entries=4, warps=1
        )
        return per_token.forward(*split(args), config=config, plan=block)
    if form == "speculative":
        return speculative.forward(
            *split(args), config=config, plan=plan.SpeculativePlan(levels=3, block_in=16, block_out=32, warps=1)
        )
    # Planned as for a large batch, so that several stages and joint trees occur at a small one.
    blocked = plan.grouped_plan(config, 65536, 4, tiles=small_tiles())
    return grouped.forward(*split(args), config=config, plan=blocked)


def backward(grad_y, args, leaf, scores, config, chunk=8):
    chosen = plan.backward_plan(config, 65536, 4, tiles=small_tiles(), outer_tiles=small_tiles())
    return gradients.backward(grad_y, *split(args), leaf, scores, config=config, plan=replace(chosen, chunk=chunk))


def max_error(got, want):
    return (got.double() - want.double()).abs().max().item()


class TestForward:
    pytestmark = runs_kernels

    @pytest.mark.parametrize("form", ["per_token", "fused", "grouped"])
    @pytest.mark.parametrize("config", SHAPES, ids=lambda c: f"{c.name}-{c.activation}")
    def test_matches_the_reference(self, form, config):
        args = make_inputs(config, 20 if form == "grouped" else 2)
        want = by_reference(in_float64(args), config)
        single = by_reference(args, config)
        y, leaf, margin, scores = run(form, args, config)
        decided = want.margin > 1e-4
        assert decided.double().mean() > 0.9
        assert torch.equal(leaf[decided], want.leaf[decided])
        rounding = max(1e-6, 2 * torch.finfo(torch.float32).eps * want.y.abs().max().item())
        allowed = 2 * max_error(single.y[decided], want.y[decided]) + rounding
        assert max_error(y[decided], want.y[decided]) <= allowed
        assert scores.shape == (len(y), config.trees, config.path_scores)
        if config.depth:
            assert max_error(margin[decided], want.margin[decided]) <= 2e-6
            path = scores[..., : config.depth].abs().flatten(1).amin(1)
            assert torch.equal(path, margin)
        else:
            assert margin.isinf().all()

    @pytest.mark.parametrize(
        "shape",
        [
            config(depth=5, gate="boundary", bias=True),
            config(depth=3, node_output=False, activation="relu", bias=True),
            config(depth=2, node_output=False, gate="boundary", bias=True),
            config(depth=0),
        ],
    )
    def test_the_speculative_form_matches_the_reference(self, shape):
        args = make_inputs(shape, 2)
        want = by_reference(in_float64(args), shape)
        y, leaf, margin, scores = run("speculative", args, shape)
        assert torch.equal(leaf, want.leaf)
        assert max_error(y, want.y) <= 2e-6
        assert torch.equal(margin, scores[:, 0, : shape.depth].abs().amin(1)) if shape.depth else margin.isinf().all()

    @pytest.mark.parametrize("form", ["per_token", "grouped"])
    def test_half_precision(self, form):
        shape = config(depth=4, in_features=32, leaf_width=2, gate="boundary")
        args = make_inputs(shape, 16 if form == "grouped" else 4, torch.float16)
        want = by_reference(in_float64(args), shape)
        y, leaf, _, _ = run(form, args, shape)
        decided = want.margin > 1e-2
        assert decided.double().mean() > 0.5
        assert torch.equal(leaf[decided], want.leaf[decided])
        assert ((y.double() - want.y)[decided].norm() / want.y[decided].norm()).item() <= 2e-3

    @pytest.mark.parametrize("form", ["speculative", "per_token", "grouped"])
    def test_a_nan_row_disturbs_no_other(self, form):
        shape = config(depth=3)
        args = make_inputs(shape, 3)
        clean = run(form, args, shape)
        args[0][1, 7] = float("nan")
        y, leaf, margin, _ = run(form, args, shape)
        others = torch.tensor([0, 2], device=DEVICE)
        assert torch.equal(y[others], clean[0][others])
        assert torch.equal(leaf[others], clean[1][others])
        assert y[1].isnan().all()
        assert leaf[1].item() == 0
        assert margin[1].isnan()

    def test_more_rows_than_one_sorting_tile(self):
        shape = config(depth=6, in_features=8, out_features=16)
        args = make_inputs(shape, sort.SORT_TILE + 6)
        want = by_reference(in_float64(args), shape)
        y, leaf, _, _ = run("grouped", args, shape)
        decided = want.margin > 1e-4
        assert torch.equal(leaf[decided], want.leaf[decided])
        assert max_error(y[decided], want.y[decided]) <= 2e-6

    @pytest.mark.parametrize("joint", [1, 2])
    @pytest.mark.parametrize(
        "shape",
        [
            config(depth=1, trees=3, leaf_width=5, activation="silu", gate="boundary", bias=True),
            config(depth=2, trees=2, leaf_width=3, activation="swiglu", node_output=False, gate="boundary", bias=True),
            config(depth=2, leaf_width=2),
            config(depth=0, trees=2, leaf_width=3, activation="swiglu", node_output=False),
        ],
    )
    def test_leaves_in_one_pass_match_the_reference(self, shape, joint):
        stages = (plan.Stage(0, shape.depth, 1),) if shape.depth else ()
        chosen = plan.GroupedPlan(stages, shape.depth, joint, False, True, small_tiles())
        args = make_inputs(shape, 20)
        want = by_reference(in_float64(args), shape)
        y, leaf, margin, scores = grouped.forward(*split(args), config=shape, plan=chosen)
        separate = grouped.forward(*split(args), config=shape, plan=replace(chosen, one_pass=False))
        assert torch.equal(leaf, want.leaf)
        assert max_error(y, want.y) <= 3e-6
        assert torch.equal(margin, separate[2])
        assert max_error(scores, separate[3]) <= 2e-6

    @pytest.mark.parametrize(("leaf_width", "one_pass"), [(16, True), (150, False)])
    def test_wide_leaves_take_one_pass_unless_they_are_too_wide(self, leaf_width, one_pass):
        shape = TreeConfig(in_features=768, out_features=768, depth=4, trees=8, leaf_width=leaf_width)
        assert plan.grouped_plan(shape, 65536, 2).one_pass == one_pass

    def test_an_empty_batch(self):
        shape = config(trees=2, bias=True)
        args = make_inputs(shape, 0)
        y, leaf, margin, scores = triton_kernels.forward(*split(args), config=shape)
        assert y.shape == (0, 36)
        assert leaf.shape == (0, 2)
        assert margin.shape == (0,)
        grads = triton_kernels.backward(y, *split(args), leaf, scores, config=shape)
        assert [tuple(g.shape) for g in grads] == [(0, 20), (2, 15, 20), (2, 15), (2, 15, 36), (0,)]
        assert all(not g.any() for g in grads)


class TestBackward:
    pytestmark = runs_kernels

    @pytest.mark.parametrize("config", SHAPES, ids=lambda c: f"{c.name}-{c.activation}")
    def test_matches_autograd_of_the_reference(self, config):
        args = make_inputs(config, 12)
        exact = in_float64(args)
        want = by_reference(exact, config)
        assert (want.margin > 1e-5).all()
        grad_y = make_inputs(config, 12, seed=1)[0][:, :1] + torch.linspace(-1, 1, config.out_features, device=DEVICE)
        _, leaf, _, scores = run("grouped", args, config)
        got = backward(grad_y, args, leaf, scores, config)
        wanted = torch.autograd.grad(want.y, [e for e in exact if e is not None], grad_y.double())
        given = [(name, g) for name, g, a in zip(("x", "w_in", "b_in", "w_out", "b_out"), got, args, strict=True)
                 if a is not None]  # fmt: skip
        for (name, g), w in zip(given, wanted, strict=True):
            assert g.shape == w.shape, name
            assert max_error(g, w) <= 3e-6 * max(1.0, w.abs().max().item()), name
        assert all(g.numel() == 0 for g, a in zip(got, args, strict=True) if a is None)

    def test_a_subtree_wider_than_a_tile(self):
        shape = config(depth=4, trees=2, gate="boundary")
        args = make_inputs(shape, 6)
        _, leaf, _, scores = run("grouped", args, shape)
        grad_y = torch.ones(6, 36, device=DEVICE)
        want = backward(grad_y, args, leaf, scores, shape)
        tiles = replace(small_tiles(), columns=16)
        chosen = plan.BackwardPlan(level=1, joint=1, outer_level=1, chunk=128, tiles=tiles, outer_tiles=tiles)
        got = gradients.backward(grad_y, *split(args), leaf, scores, config=shape, plan=chosen)
        assert all(max_error(g, w) <= 1e-5 for g, w in zip(got, want, strict=True) if g.numel())

    def test_rows_not_visited_get_exactly_zero_and_a_crowded_leaf_gets_the_whole_sum(self):
        shape = config(depth=3)
        args = make_inputs(shape, 30)
        args = (args[0][:1].expand(30, -1).contiguous(), *args[1:])
        _, leaf, _, scores = run("grouped", args, shape)
        ones = torch.ones(30, 36, device=DEVICE)
        _, grad_w_in, _, grad_w_out, _ = backward(ones, args, leaf, scores, shape, chunk=8)
        node = leaf[0, 0].item() + shape.nodes
        visited = {node}
        while node:
            node = (node - 1) // 2
            visited.add(node)
        for grad in (grad_w_in, grad_w_out):
            assert set(grad[0].abs().sum(1).nonzero().flatten().tolist()) == visited
        one_row = tuple(None if a is None else a[:1] if i == 0 else a for i, a in enumerate(args))
        single = backward(ones[:1], one_row, leaf[:1], scores[:1], shape)
        assert max_error(grad_w_out, 30 * single[3]) <= 1e-4

    def test_is_deterministic(self):
        shape = config(depth=2, trees=2)
        args = make_inputs(shape, 10)
        _, leaf, _, scores = run("grouped", args, shape)
        grad_y = torch.ones(10, 36, device=DEVICE)
        first, second = (backward(grad_y, args, leaf, scores, shape) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class TestThroughTheOp:
    pytestmark = runs_kernels

    def test_a_layer_trains_on_the_kernels(self):
        torch.manual_seed(0)
        layer = FFF(12, depth=2, gate="boundary", bias=True, backend="triton").to(DEVICE)
        x = torch.randn(2, 2, 12, device=DEVICE, requires_grad=True)
        y = layer(x)
        y.square().sum().backward()
        got = [x.grad, *(p.grad for p in layer.parameters())]
        x2 = x.detach().clone().requires_grad_()
        layer.zero_grad()
        layer.backend = "reference"
        layer(x2).square().sum().backward()
        for g, w in zip(got, [x2.grad, *(p.grad for p in layer.parameters())], strict=True):
            assert max_error(g, w) <= 1e-5

    def test_strided_inputs(self):
        shape = config(depth=2)
        args = make_inputs(shape, 6)
        wide = torch.cat((args[0], args[0]), 1)
        got = ops.forward(wide[::2, :20], *args[1:], config=shape, backend="triton")
        want = by_reference((args[0][::2], *args[1:]), shape)
        assert max_error(got.y, want.y) <= 1e-5

    def test_float64_is_refused_with_a_reason(self):
        shape = config()
        with pytest.raises(BackendUnavailable, match="float64"):
            ops.forward(*make_inputs(shape, 1, torch.float64), config=shape, backend="triton")

    def test_a_gate_without_kernels_is_refused_with_a_reason(self):
        shape = config(gate="boundary_min")
        with pytest.raises(BackendUnavailable, match="has no gate 'boundary_min'"):
            ops.forward(*make_inputs(shape, 1), config=shape, backend="triton")


class TestReplay:
    """Passes run from their recording, the second time; test_launch.py holds the recorder apart from the kernels."""

    pytestmark = runs_kernels

    @pytest.mark.parametrize("form", ["speculative", "per_token", "grouped", "one pass"])
    def test_a_forward_computes_on_the_tensors_it_is_given(self, form):
        shape = config(gate="boundary") if form == "speculative" else SHAPES[3]
        chosen = {
            "speculative": plan.SpeculativePlan(levels=3, block_in=16, block_out=32, warps=1),
            "per_token": plan.per_token_plan(shape, 6),
            "grouped": plan.grouped_plan(shape, 65536, 4, tiles=small_tiles()),
            "one pass": plan.GroupedPlan((plan.Stage(0, 2, 1),), 2, 2, False, True, small_tiles()),
        }[form]
        for seed in (0, 1):
            args = make_inputs(shape, 6, seed=seed)
            want = by_reference(in_float64(args), shape)
            y, leaf, margin, _ = triton_kernels.run_forward(chosen, *args, config=shape)
            assert torch.equal(leaf, want.leaf)
            assert max_error(y, want.y) <= 3e-6
            assert max_error(margin, want.margin) <= 2e-6

    def test_a_backward_computes_on_the_tensors_it_is_given(self):
        shape = config(depth=1, bias=True, node_output=False)
        chosen = plan.backward_plan(shape, 65536, 4, tiles=small_tiles(), outer_tiles=small_tiles())
        for seed in (0, 1):
            args = make_inputs(shape, 6, seed=seed)
            _, leaf, _, scores = run("per_token", args, shape)
            given = (args[0][:, :1] + torch.linspace(-1, 1, 36, device=DEVICE), *args, leaf, scores)
            got = triton_kernels.run_backward(chosen, *given, config=shape)
            want = gradients.backward(given[0], *split(given[1:6]), *given[6:], config=shape, plan=chosen)
            assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.fixture
def matmul_precision():
    """Torch's settings are put back."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("matmul_precision")
class TestPrecision:
    """How float32 is multiplied follows torch's setting, in whichever of its two ways it was made."""

    pytestmark = runs_kernels

    @pytest.mark.parametrize(("setting", "want"), [("tf32", "tf32"), ("ieee", "tf32x3")])
    def test_of_the_newer_way(self, setting, want):
        from fastff.ops.triton_kernels.linear import precision_of

        torch.backends.cuda.matmul.fp32_precision = setting
        assert [precision_of(dtype) for dtype in (torch.float32, torch.bfloat16)] == [want, "tf32x3"]

    def test_a_pass_does_not_ask_in_the_older_way(self):
        layer = FFF(8, depth=2).to(DEVICE)
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            torch.get_float32_matmul_precision()
        with ops.use_backend("triton"):
            layer(torch.zeros(3, 8, device=DEVICE))


class TestSort:
    pytestmark = runs_kernels

    @pytest.mark.parametrize(("count", "level", "joint", "shift"), [(1, 2, 1, 1), (150, 3, 1, 0), (70, 2, 2, 1)])
    def test_groups_are_stable_and_their_tables_exclusive_sums(self, count, level, joint, shift):
        torch.manual_seed(1)
        leaf = torch.randint(0, 2 ** (level + shift), (count, 3), device=DEVICE)
        groups = sort.group_rows(leaf, shift=shift, level=level, joint=joint, tile=16, chunk=32)
        for turn in range(groups.order.shape[0]):
            key = torch.zeros(count, dtype=torch.int64, device=DEVICE)
            for tree in range(turn * joint, turn * joint + joint):
                key = (key << level) | (leaf[:, tree] >> shift if tree < 3 else 0)
            assert torch.equal(groups.order[turn].long(), torch.sort(key, stable=True).indices)
            size = torch.bincount(key, minlength=groups.groups)
            chunks = (size + 31) // 32
            wanted = (size, (size + 15) // 16, chunks, torch.where(chunks > 1, chunks, 0))
            for row, value in zip(groups.table[turn].long(), wanted, strict=True):
                assert torch.equal(row, torch.cat((value.new_zeros(1), value.cumsum(0))))


class TestTuning:
    pytestmark = runs_kernels

    @pytest.fixture(autouse=True)
    def own_cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        tuned._loaded.clear()
        tuned._found.cache_clear()
        yield
        tuned._loaded.clear()
        tuned._found.cache_clear()

    def test_the_fastest_of_what_gives_the_same_result_is_kept(self, monkeypatch):
        shape = config(depth=3)
        monkeypatch.setattr(tuning, "_TRIED", {"ahead": (1, 3), "warps": (2,), "chunk": (64,)})
        monkeypatch.setattr(tuning, "_TRIED_TILES", {"stages": (2,)})
        args = make_inputs(shape, 2)
        times = iter([9.0, 7.0, 8.0, *[10.0] * 99])
        found = tuning.tune(*split(args), config=shape, time_us=lambda run: (run(), next(times))[1], training=True)
        best, least, first = found["forward"]
        assert (least, first) == (7.0, 9.0)
        assert best != plan.forward_plan(shape, 2, 4)
        name = triton_kernels.device_name(args[0]) or tuning.INTERPRETER
        assert tuned.forward_plan(shape, 2, torch.float32, name) == best
        tuned._loaded.clear()  # as another process would
        tuned._found.cache_clear()
        assert tuned.forward_plan(shape, 2, torch.float32, name) == best
        assert tuned.backward_plan(shape, 2, torch.float32, name) == found["backward"][0]
        assert tuned.forward_plan(shape, 3, torch.float32, name) == plan.forward_plan(shape, 3, 4)

    def test_what_gives_another_result_is_not_taken(self):
        args = make_inputs(config(), 2)
        timed = tuning._Timed(lambda chosen: (args[0] * chosen,), (args[0],), lambda run: 1.0)
        assert [timed(1.0), timed(1.001), timed(0.5), timed(float("nan"))] == [1.0, 1.0, float("inf"), float("inf")]

    @pytest.mark.parametrize("chosen", ["per_token", "speculative", "grouped", "backward"])
    def test_every_plan_survives_the_file(self, chosen):
        shape = TreeConfig(in_features=768, out_features=768, depth=11)
        made = {
            "per_token": plan.per_token_plan(shape, 100),
            "speculative": plan.speculative_plan(shape),
            "grouped": plan.grouped_plan(shape, 65536, 2),
            "backward": plan.backward_plan(shape, 65536, 2),
        }[chosen]
        direction = "backward" if chosen == "backward" else "forward"
        tuned.keep(direction, shape, 1000, torch.bfloat16, "a gpu", made)
        tuned._loaded.clear()
        tuned._found.cache_clear()
        look_up = tuned.backward_plan if chosen == "backward" else tuned.forward_plan
        assert look_up(shape, 1024, torch.bfloat16, "a gpu") == made
        shipped = (plan.backward_plan if chosen == "backward" else plan.forward_plan)(shape, 1024, 2)
        assert look_up(shape, 1024, torch.bfloat16, "another gpu") == shipped
        assert look_up(shape, 1024, torch.float16, "a gpu") == shipped
        assert look_up(shape, 1024, torch.bfloat16, None) == shipped

    @pytest.mark.parametrize("text", ["{", "[]", '{"format": FORMAT}', '{"format": FORMAT, "plans": []}'])
    def test_a_corrupt_file_is_told_and_the_shipped_plans_serve(self, text):
        tuned.cache_file().parent.mkdir(parents=True)
        tuned.cache_file().write_text(text.replace("FORMAT", str(tuned.FORMAT)))
        shape = config(depth=3)
        with pytest.warns(RuntimeWarning, match="cannot be read"):
            assert tuned.forward_plan(shape, 2, torch.float32, "a gpu") == plan.forward_plan(shape, 2, 4)
        assert tuned.forward_plan(shape, 3, torch.float32, "a gpu") == plan.forward_plan(shape, 3, 4)  # told once

    def test_a_plan_of_other_fields_is_told_and_the_shipped_one_serves(self):
        shape = config(depth=3)
        tuned.keep("forward", shape, 2, torch.float32, "a gpu", plan.per_token_plan(shape, 2))
        document = json.loads(tuned.cache_file().read_text())
        next(iter(document["plans"].values()))["colour"] = "red"
        tuned.cache_file().write_text(json.dumps(document))
        tuned._loaded.clear()
        tuned._found.cache_clear()
        with pytest.warns(RuntimeWarning, match="not one of this version"):
            assert tuned.forward_plan(shape, 2, torch.float32, "a gpu") == plan.forward_plan(shape, 2, 4)

    def test_a_cache_that_cannot_be_written_is_told_and_serves_this_process(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        shape = config(depth=3)
        chosen = replace(plan.per_token_plan(shape, 2), warps=16)
        with pytest.warns(RuntimeWarning, match="cannot write"):
            tuned.keep("forward", shape, 2, torch.float32, "a gpu", chosen)
        assert tuned.forward_plan(shape, 2, torch.float32, "a gpu") == chosen

    def test_the_cache_lies_where_the_platform_wants_it(self, tmp_path, monkeypatch):
        assert tuned.cache_file() == tmp_path / "fastff" / "triton-plans.json"
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert tuned.cache_file() == tmp_path / "home" / ".cache" / "fastff" / "triton-plans.json"


class TestAvailability:
    def test_the_kernels_under_the_interpreter(self, request):
        if ON_DEVICE or INTERPRETED:
            assert triton_kernels.why_unavailable() is None
            return
        code, said = request.getfixturevalue("interpreted")
        assert code == 0, said[-8000:]
        assert " passed" in said

    @pytest.mark.skipif(ON_DEVICE or INTERPRETED, reason="the kernels can run here")
    def test_without_a_device_the_reason_is_given(self):
        reason = triton_kernels.why_unavailable()
        assert reason is not None
        assert "triton" in reason
        shape = config()
        with pytest.raises(BackendUnavailable, match="triton"):
            ops.forward(*make_inputs(shape, 1), config=shape, backend="triton")
