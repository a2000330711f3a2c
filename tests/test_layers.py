"""The FFF module: drop-in use, fresh weights, usage, training forms, published state dicts."""

from __future__ import annotations

import copy
import math
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fastff
from conftest import make_layer, make_rows, weights_of
from fastff.ops import native, reference


def expected(layer, x):
    return reference.forward(x.reshape(-1, x.shape[-1]), weights_of(layer), config=layer.config).y


@pytest.mark.parametrize("options", [{"depth": 5}, {"depth": 3, "bias": True, "node_output": False, "leaf_width": 2}])
def test_inference_takes_the_packed_path_and_agrees(options):
    layer = make_layer(130, 70, **options).eval()
    x = make_rows(4, 3, 130, dtype=torch.float32)
    with torch.no_grad():
        y = layer(x)
        assert layer._direct.bytes > 0
    torch.testing.assert_close(y.view(12, 70), expected(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
@pytest.mark.parametrize(
    ("options", "quantization"),
    [({}, None), ({}, "int8"), ({"trees": 2, "paths": 2, "gate": "normalised"}, "bf16")],
)
def test_no_rows_give_no_rows(options, quantization, shape):
    layer = make_layer(8, 5, depth=2, node_output=False, **options).quantize(quantization).eval()
    with torch.no_grad():
        for y, leaf, margin in (layer.routed(torch.empty(*shape, 8)), (layer(torch.empty(*shape, 8)), None, None)):
            assert y.shape == (*shape, 5)
            assert leaf is None or leaf.shape == (*shape, 4 if options else 1)
            assert margin is None or margin.shape == shape


@pytest.mark.parametrize(
    "training", [{"surrogate": "soft"}, {"surrogate": "straight_through"}, {"masked_training": True}]
)
def test_training_forms_take_no_rows(training):
    layer = make_layer(8, 5, depth=2, node_output=False)
    for name, value in training.items():
        setattr(layer, name, value)
    assert layer.train()(torch.empty(2, 0, 8)).shape == (2, 0, 5)


def optimiser_step(layer):
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(make_rows(9, 24, dtype=torch.float32)).square().sum().backward()
    optimiser.step()


def load_other_weights(layer):
    layer.load_state_dict(make_layer(24, depth=4, bias=True, seed=9).state_dict())


def assign_other_weights(layer):
    layer.load_state_dict(make_layer(24, depth=4, bias=True, seed=9).state_dict(), assign=True)


def edit_one_weight(layer):
    with torch.no_grad():
        layer.w_out[0, 3, 5] += 1.0
        layer.w_in[0, 0] *= -1


def edit_behind_autograds_back(layer):
    layer.w_in.data.mul_(-1.5)


def replace_data(layer):
    layer.w_out.data = layer.w_out.data * 2


def replace_parameter(layer):
    layer.w_out = nn.Parameter(layer.w_out.detach() * 3)


def edit_bias(layer):
    with torch.no_grad():
        layer.b_in.add_(0.5)


def there_and_back(layer):
    layer.to(torch.bfloat16)
    layer.to(torch.float32)


EDITS = [
    optimiser_step,
    load_other_weights,
    assign_other_weights,
    edit_one_weight,
    edit_behind_autograds_back,
    replace_data,
    replace_parameter,
    edit_bias,
    there_and_back,
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda f: f.__name__)
def test_the_next_call_uses_the_new_weights(edit):
    layer = make_layer(24, depth=4, bias=True).eval()
    x = make_rows(64, 24, dtype=torch.float32)
    with torch.no_grad():
        before = layer(x)
    edit(layer.train())
    layer.eval()
    with torch.no_grad():
        after = layer(x)
    torch.testing.assert_close(after, expected(layer, x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-4)


def doubled_by_a_hook(layer):
    layer.register_forward_hook(lambda module, inputs, y: 2 * y)


def doubled_by_a_pre_hook(layer):
    layer.w_in.data.div_(2)
    layer.w_out.data.mul_(2)
    layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def doubled_by_a_wrapper(layer):
    plain = layer.forward
    layer.forward = lambda x: 2 * plain(x)  # as accelerate does


def doubled_by_a_subclass(layer):
    class Doubled(fastff.FFF):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.__class__ = Doubled


def doubled_by_a_compiled_form(layer):
    layer._compiled_call_impl = lambda x: 2 * layer._call_impl(x)  # what layer.compile() sets


@pytest.mark.parametrize(
    "double",
    [
        doubled_by_a_hook,
        doubled_by_a_pre_hook,
        doubled_by_a_wrapper,
        doubled_by_a_subclass,
        doubled_by_a_compiled_form,
    ],
)
def test_inference_leaves_out_nothing_that_surrounds_forward(double):
    layer = make_layer(24, depth=4).eval()
    x = make_rows(3, 24, dtype=torch.float32)
    with torch.no_grad():
        want = layer(x)
        double(layer)
        torch.testing.assert_close(layer(x), 2 * want)


def test_hooks_of_all_modules_see_the_layer():
    layer, seen = make_layer(24, depth=4).eval(), []
    hook = nn.modules.module.register_module_forward_hook(lambda module, inputs, y: seen.append(module))
    try:
        with torch.no_grad():
            layer(make_rows(3, 24, dtype=torch.float32))
    finally:
        hook.remove()
    assert seen == [layer]


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_transforms_and_traces_of_inference_use_the_registered_op():
    layer = make_layer(24, depth=4).eval()
    x, other = (make_rows(3, 24, seed=seed, dtype=torch.float32) for seed in (1, 2))
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(layer)(x), layer(x))
        graph = make_fx(layer)(x)
        assert torch.equal(graph(other), layer(other))


def test_nothing_is_packed_again_when_nothing_changed(monkeypatch):
    layer = make_layer(24, depth=4).eval()
    x = make_rows(3, 24, dtype=torch.float32)
    packs = []
    with torch.no_grad():
        layer(x)
        original = type(layer._direct)._packed
        monkeypatch.setattr(type(layer._direct), "_packed", lambda self, w: packs.append(1) or original(self, w))
        for rows in (1, 2, 3):
            layer(x[:rows])
        assert packs == []
        layer.w_in.mul_(1.5)
        layer(x)
        layer(x)
    assert packs == [1]


def test_packed_weights_take_one_copy():
    layer = fastff.FFF(768, depth=8).eval()
    with torch.no_grad():
        layer(torch.zeros(1, 768))
    parameters = sum(p.numel() * 4 for p in layer.parameters())
    assert parameters <= layer._direct.bytes <= parameters + 2**21  # rounded up to a huge page


def test_training_never_packs():
    layer = make_layer(24, depth=4)
    layer(make_rows(3, 24, dtype=torch.float32)).sum().backward()
    assert layer._direct.bytes == 0


def test_copies_and_pickles_pack_for_themselves():
    layer = make_layer(24, depth=4).eval()
    x = make_rows(3, 24, dtype=torch.float32)
    with torch.no_grad():
        want = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x), want)
            twin.w_out.zero_()
            assert (twin(x) == 0).all()
        assert torch.equal(layer(x), want)


def test_weights_made_in_inference_mode_are_followed_too():
    with torch.inference_mode():
        layer = make_layer(24, depth=4).eval()
        x = make_rows(3, 24, dtype=torch.float32)
        want = layer(x).clone()
        layer.w_out.mul_(2)
        torch.testing.assert_close(layer(x), 2 * want)


def test_many_python_threads_share_one_layer():
    layer = make_layer(24, depth=5).eval()
    inputs = [make_rows(1 + i % 9, 24, seed=i, dtype=torch.float32) for i in range(200)]
    wanted = [expected(layer, x) for x in inputs]

    def answer(x):
        with torch.no_grad():  # grad mode belongs to the thread
            return layer(x)

    with ThreadPoolExecutor(8) as pool:
        for got, want in zip(pool.map(answer, inputs), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_threads_that_meet_at_the_first_call_pack_once(monkeypatch):
    """A second pack would write what the first thread already reads."""
    packs, call = [], native.call

    def counted(name, *arguments):
        packs.append(name)
        return call(name, *arguments)

    monkeypatch.setattr(native, "call", counted)
    layer, x = make_layer(64, depth=9).eval(), make_rows(3, 64, dtype=torch.float32)
    together = Barrier(8)

    def answer(_):
        together.wait()
        with torch.no_grad():
            return layer(x)

    with ThreadPoolExecutor(8) as pool:
        for y in pool.map(answer, range(8)):
            torch.testing.assert_close(y, expected(layer, x), rtol=1e-5, atol=1e-5)
    assert packs == ["fastff_pack_f32", "fastff_packed_watch"]


def test_a_forked_child_can_use_the_layer():
    layer = make_layer(24, depth=5).eval()
    x = make_rows(3, 24, dtype=torch.float32)
    with torch.no_grad():
        want = layer(x)
        child = os.fork()
        if child == 0:
            code = 2  # of an exception, which must not go on with the other tests
            try:
                torch.set_num_threads(1)  # as torch's own workers do: its pool does not survive a fork
                code = 0 if torch.equal(layer(x), want) else 1
            finally:
                os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_drop_in_for_a_dense_block_trains():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), fastff.FFF(32, depth=4, trees=2, gate="boundary"), nn.Linear(32, 3))
    x, target = torch.randn(256, 10), torch.randint(0, 3, (256,))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_route_path_and_repr():
    layer = make_layer(8, depth=3, trees=2)
    x = make_rows(4, 5, 8, dtype=torch.float32)
    leaf, path = layer.route(x), layer.path(x)
    assert leaf.shape == (4, 5, 2)
    assert path.shape == (4, 5, 2, 4)
    assert (path[..., 0] == 0).all()
    assert torch.equal((path[..., 1:] - 1) // 2, path[..., :-1])
    assert torch.equal(path[..., -1] - 7, leaf)
    assert "2x3" in repr(layer)
    assert (layer.neurons, layer.active_neurons) == (30, 8)


def test_usage_of_given_rows():
    layer = make_layer(8, depth=2)
    with torch.no_grad():
        layer.w_in.zero_()
        layer.w_in[0, 0, 0] = 1.0  # the root turns right for x[0] > 0, all other nodes turn left
    x = torch.zeros(4, 8)
    x[0, 0] = 1.0
    usage = layer.usage(x)
    assert usage.counts.tolist() == [[3, 0, 1, 0]]
    assert usage.dead_leaves.tolist() == [2]
    share = torch.tensor([0.75, 0.25], dtype=torch.float64)
    assert usage.entropy_bits.item() == pytest.approx(-(share * share.log2()).sum().item())


def test_usage_counts_training_and_on_request_evaluation():
    layer = make_layer(8, depth=2, trees=3)
    x = make_rows(10, 8, dtype=torch.float32)
    assert layer.usage().counts.sum() == 0
    layer(x)
    assert layer.usage().counts.sum(-1).tolist() == [10, 10, 10]
    layer.eval()
    with torch.no_grad():
        layer(x)
        assert layer.usage().counts.sum(-1).tolist() == [10, 10, 10]
        layer.track_usage()
        layer(x)
    assert torch.equal(layer.usage().counts, 2 * layer.usage(x).counts)
    layer.reset_usage()
    assert layer.usage().counts.sum() == 0
    assert "_leaf_counts" not in layer.state_dict()


def test_straight_through_gives_the_routing_a_gradient():
    options = {"depth": 3, "node_output": False, "activation": "relu", "bias": True}
    x = make_rows(200, 8, dtype=torch.float32)
    hard, soft = make_layer(8, **options), make_layer(8, surrogate="straight_through", **options)
    for layer in (hard, soft):
        layer(x).square().sum().backward()
    torch.testing.assert_close(soft(x), hard(x), rtol=1e-5, atol=1e-5)
    assert (soft.usage(x).counts.view(4, 2).sum(-1) > 0).all(), "every node must see a row: choose another seed"
    assert (hard.w_in.grad[0, :7] == 0).all()
    assert (soft.w_in.grad[0, :7].abs().sum(-1) > 0).all()


def test_soft_training_evaluates_hard_and_region_leak_swaps_sides():
    layer = make_layer(8, depth=3, node_output=False, surrogate="soft", region_leak=0.5)
    x = make_rows(2, 5, 8, dtype=torch.float32)
    torch.manual_seed(0)
    one, two = layer(x), layer(x)
    assert one.shape == (2, 5, 8)
    assert not torch.allclose(one, two)
    assert layer.hardening_loss().ndim == 0
    layer.eval()
    torch.testing.assert_close(layer(x).view(10, 8), expected(layer, x), rtol=1e-5, atol=1e-6)


def test_hardening_loss_needs_a_soft_forward():
    with pytest.raises(RuntimeError, match="needs a forward in training mode"):
        make_layer(8, depth=3, node_output=False, surrogate="soft").hardening_loss()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"surrogate": "gumbel"}, "surrogate 'gumbel' is not None"),
        ({"surrogate": "soft"}, "needs node_output=False and gate=None, got True"),
        ({"surrogate": "soft", "node_output": False, "region_leak": 0.6}, r"region_leak 0.6 is not in \[0, 0.5\]"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        fastff.FFF(8, depth=2, **options)


def test_wrong_last_dimension_and_dtype():
    layer = make_layer(8, depth=2).eval()
    with torch.no_grad():
        with pytest.raises(fastff.ShapeError, match=r"in_features 9 .* does not match in_features 8"):
            layer(torch.zeros(3, 9))
        with pytest.raises(fastff.ShapeError, match=r"w_in is torch.float32, x is torch.float64"):
            layer(torch.zeros(3, 8, dtype=torch.float64))


def test_initial_scores_and_outputs_have_unit_scale():
    torch.manual_seed(0)
    layer = fastff.FFF(256, depth=6, trees=4, activation="identity")
    x = torch.randn(512, 256)
    path = reference.descend(x, layer.w_in, None, config=layer.config)
    assert 0.8 < path.score.std() < 1.25
    assert 0.8 < layer(x).std() < 1.25


ULTRA = {
    "linear_in.weight": torch.randn(14, 6),
    "linear_in.bias": torch.zeros(14),
    "linear_out.weight": torch.randn(5, 14),
}
FAST = {
    "depth": torch.tensor(2),
    "node_weights": torch.randn(3, 6),
    "node_biases": torch.zeros(3, 1),
    "w1s": torch.randn(4, 6, 3),
    "b1s": torch.zeros(4, 3),
    "w2s": torch.randn(4, 3, 5),
    "b2s": torch.zeros(4, 5),
}


def without(state, *names):
    return {k: v for k, v in state.items() if k not in names}


@pytest.mark.parametrize(
    ("state", "depth", "message"),
    [
        (ULTRA, None, "does not hold its depth"),
        (ULTRA, 3, "has 14 rows, expected a multiple of 15"),
        (without(ULTRA, "linear_out.weight"), 2, "missing tensor linear_out.weight"),
        ({**ULTRA, "linear_out.bias": torch.zeros(5)}, 2, "unexpected tensor linear_out.bias"),
        ({**ULTRA, "linear_in.bias": torch.zeros(13)}, 2, r"linear_in.bias has shape \(13,\), expected \(14,\)"),
        (without(FAST, "b2s"), None, "missing tensor b2s"),
        (without(FAST, "node_weights"), None, "missing tensor node_weights"),
        ({**FAST, "node_biases": torch.zeros(3)}, None, r"node_biases has shape \(3,\), expected \(3, 1\)"),
        (FAST, 3, "depth 3 does not match the stored depth 2"),
        ({**FAST, "w2s": torch.zeros(4, 2, 5)}, None, r"w2s has shape \(4, 2, 5\), expected \(4, 3, 5\)"),
        ({"weight": torch.zeros(1)}, 1, "unknown layout"),
    ],
)
def test_bad_published_states_are_named(state, depth, message):
    with pytest.raises(fastff.CheckpointError, match=message):
        fastff.FFF.from_published(state, depth=depth)


def test_published_states_load_in_their_dtype():
    before = torch.get_rng_state()
    fastff.FFF.from_published(FAST)
    assert torch.equal(torch.get_rng_state(), before), "loading must not draw random numbers"
    ultra = fastff.FFF.from_published({k: v.double() for k, v in ULTRA.items()}, depth=2)
    assert ultra.w_in.dtype == torch.float64
    assert (ultra.config.trees, ultra.in_features, ultra.out_features) == (2, 6, 5)
    fast = fastff.FFF.from_published(FAST)
    assert (fast.config.depth, fast.config.leaf_width, fast.config.activation) == (2, 3, "relu")
    lone = {k: v[:1] for k, v in FAST.items() if k in ("w1s", "b1s", "w2s", "b2s")}
    assert fastff.FFF.from_published(lone).config.depth == 0
    assert math.isfinite(fastff.FFF.from_published(lone)(torch.ones(2, 6)).sum().item())


def test_a_layer_without_memory_runs_and_counts_nothing():
    layer, x = fastff.FFF(8, depth=2, device="meta"), torch.empty(3, 8, device="meta")
    assert layer(x).shape == layer.eval()(x).shape == (3, 8)
    assert layer(x).is_meta


def test_counters_are_defined_when_weights_get_memory():
    with torch.device("meta"):
        model = nn.Sequential(fastff.FFF(8, depth=2))
    noise = [torch.full((4,), 2**40) for _ in range(64)]  # what fresh memory may hold
    del noise
    model.to_empty(device="cpu")
    assert model[0].usage().counts.sum() == 0
    layer = fastff.FFF(8, depth=2, device="meta")
    layer.load_state_dict(make_layer(8, depth=2).state_dict(), assign=True)
    assert layer.usage().counts.tolist() == [[0, 0, 0, 0]]
    layer(torch.zeros(3, 8))
    assert layer.usage().counts.sum() == 3
    assert layer.to_empty(device="cpu").usage().counts.sum() == 3, "a move keeps what was counted"


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_rows_once(reentrant):
    layer = make_layer(8, depth=2)
    x = make_rows(10, 8, dtype=torch.float32).requires_grad_()
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert layer.usage().counts.sum() == 10


def test_a_layer_made_in_inference_mode_takes_the_packed_path():
    with torch.inference_mode():
        layer = make_layer(24, depth=4).eval()
        assert not layer.w_in.is_inference()
        layer(make_rows(1, 24, dtype=torch.float32))
        assert layer._packed.bytes > 0
        layer.load_state_dict(make_layer(24, depth=4, seed=3).state_dict(), assign=True)
        y = layer(make_rows(1, 24, dtype=torch.float32))
        assert layer._packed.bytes > 0
    torch.testing.assert_close(y, expected(layer, make_rows(1, 24, dtype=torch.float32)), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_scripting_is_refused_and_a_program_of_standard_operators_is_not():
    layer, x = make_layer(8, depth=2, gate="boundary").eval(), make_rows(3, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match="Unknown type annotation"):
        torch.jit.script(layer)
    with torch.no_grad(), fastff.ops.use_backend("reference"):
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in names if name.startswith("fastff")]
    torch.testing.assert_close(program.module()(x[:2]), expected(layer, x[:2]), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # the exporter's own, of tracing and of its age
@pytest.mark.parametrize("options", [{"depth": 3, "gate": "boundary", "bias": True}, {"depth": 2, "leaf_width": 3}])
def test_onnx_needs_the_reference_as_documented(options, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    layer, x, path = make_layer(16, **options).eval(), make_rows(3, 16, dtype=torch.float32), tmp_path / "layer.onnx"
    form = {"dynamo": False, "input_names": ["x"], "dynamic_axes": {"x": {0: "rows"}}}
    with torch.no_grad():
        with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match="fastff::forward"):
            torch.onnx.export(layer, (x,), path, **form)
        with fastff.ops.use_backend("reference"):
            torch.onnx.export(layer, (x,), path, **form)
    session, other = onnxruntime.InferenceSession(path), make_rows(7, 16, seed=5, dtype=torch.float32)
    got = torch.from_numpy(session.run(None, {"x": other.numpy()})[0])
    torch.testing.assert_close(got, expected(layer, other), rtol=1e-5, atol=1e-5)
