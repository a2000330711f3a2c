"""Experts made from a dense layer: every neuron in one place, full groups, routers that find them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import make_rows
from convert_cases import random_dense, tiny
from fastff.convert import distil
from fastff.convert.distil import Recipe, all_of_one_length, parameter_groups, recording
from fastff.convert.experts import balanced, central, fit_router, group_neurons, kept_share, mass_of
from fastff.convert.initialise import features, initialise, prune
from fastff.convert.neurons import contribution, dense_forward
from fastff.convert.student import dense_layers, describe_experts, describe_narrow, flops, stored_neurons
from fastff.models import ConvertedFeedforward
from fastff.models.converted import make_converted
from fastff.models.families import DenseWeights
from fastff.text.examples import TextExamples

GROUPS, WIDTH = 6, 8


def clustered(gated=True):
    """A layer of GROUPS kinds of neurons and rows of as many kinds, each of which moves the neurons of its kind."""
    kinds = make_rows(GROUPS, 24, seed=1, dtype=torch.float32)
    mine = torch.arange(GROUPS * WIDTH) % GROUPS
    noise = make_rows(3, GROUPS * WIDTH, 24, seed=2, dtype=torch.float32) / 5
    w_in = 0.8 * kinds[mine] + noise[0] - 0.2 * kinds.sum(0)
    second = {"v_in": noise[1] + 0.3 * kinds[mine]} if gated else {}
    dense = DenseWeights(w_in, None, noise[2], None, "silu" if gated else "relu", **second)
    kind = torch.arange(1200) % GROUPS
    return dense, kinds[kind] + 0.3 * make_rows(1200, 24, seed=3, dtype=torch.float32), mine, kind


def test_every_neuron_is_in_one_place_and_groups_are_those_that_fire_together():
    dense, x, mine, kind = clustered()
    groups = group_neurons(dense, x, shared=0, leaves=GROUPS, leaf_width=WIDTH, chosen=1)
    assert sorted(groups.leaves.flatten().tolist()) == list(range(GROUPS * WIDTH))
    assert all(len(set(mine[leaf].tolist())) == 1 for leaf in groups.leaves)
    found = mine[groups.leaves[(x @ groups.router.t()).argmax(1), 0]]
    assert (found == kind).float().mean() > 0.95
    kept = kept_share(dense, x, groups, 1)
    assert 0.7 < kept["router"] <= kept["best_leaves"] <= kept["best_neurons"] <= 1


def test_the_shared_core_does_most_and_the_rest_is_grouped():
    dense, x, *_ = clustered()
    groups = group_neurons(dense, x, shared=8, leaves=5, leaf_width=WIDTH, chosen=2)
    strength = contribution(dense, x).square().sum(0)
    assert strength[groups.shared].min() >= strength[groups.leaves].max()
    with pytest.raises(ValueError, match="9 shared and 40 grouped neurons are more than the layer's 48"):
        group_neurons(dense, x, shared=9, leaves=5, leaf_width=WIDTH, chosen=2)


@pytest.mark.parametrize("seed", range(4))
def test_an_assignment_fills_every_group_and_is_near_the_best(seed):
    scipy = pytest.importorskip("scipy.optimize")
    benefit = make_rows(24, 4, seed=seed, dtype=torch.float32)
    place = balanced(benefit, 6)
    assert torch.bincount(place, minlength=4).tolist() == [6] * 4
    rows, columns = scipy.linear_sum_assignment(benefit.repeat_interleave(6, 1).numpy(), maximize=True)
    best = float(benefit.repeat_interleave(6, 1)[rows, columns].sum())
    plain = float(benefit[torch.arange(24), torch.arange(24) % 4].sum())
    found = float(benefit[torch.arange(24), place].sum())
    assert found > plain + 0.9 * (best - plain)


def test_equal_benefits_and_hopeless_ones_are_assigned_too():
    for benefit in (torch.zeros(8, 4), torch.full((8, 4), -1e30)):
        assert torch.bincount(balanced(benefit, 2), minlength=4).tolist() == [2] * 4


def test_a_router_orders_groups_by_what_they_hold():
    x = make_rows(3000, 12, dtype=torch.float32)
    held = F.softmax(3 * x @ make_rows(12, 5, seed=1, dtype=torch.float32), 1)
    start = make_rows(5, 12, seed=2, dtype=torch.float32)
    router = fit_router(x, held, start)
    assert ((x @ router.t()).argmax(1) == held.argmax(1)).float().mean() > 0.9
    assert ((x @ start.t()).argmax(1) == held.argmax(1)).float().mean() < 0.5
    assert (x @ router.t()).std() == pytest.approx(0.25, rel=0.05)


def test_the_central_neuron_goes_with_its_group():
    mass = make_rows(200, 2, dtype=torch.float32).abs()
    share = torch.stack((mass[:, 0], torch.zeros(200), mass[:, 1], 0.1 * mass[:, 0]), 1)
    assert central(share, torch.tensor([[1, 0], [3, 2]])).tolist() == [0, 2]
    assert torch.equal(mass_of(share, torch.tensor([0, 0, 1, 1]), 2)[:, 0], share[:, 0])


@pytest.mark.parametrize("gated", [False, True])
def test_experts_begin_as_the_dense_layer_with_neurons_left_out(gated):
    dense, x, *_ = clustered(gated)
    description = describe_experts(dense, leaves=5, leaf_width=WIDTH, chosen=2, shared=8)
    layer = ConvertedFeedforward(description, 24)
    initialise(layer, dense, x, lambda: iter([(x, x)]))
    layer.eval()
    want = dense_forward(dense, x)
    error = (layer(x) - want).square().mean() / want.var()
    narrow = ConvertedFeedforward(describe_narrow(dense, int(flops(dense, description) * 48 / dense.flops_per_row)), 24)
    initialise(narrow, dense, x, lambda: iter([(x, x)]))
    assert error < 0.7 * (narrow.eval()(x) - want).square().mean() / want.var()
    assert (features(layer, x) != 0).sum(1).max() <= 8 + 2 * WIDTH + 1  # and no others
    assert layer.layer.router(x).gate.sub(1).abs().mean() < 0.15  # gates begin near 1
    assert stored_neurons(description) == 48
    with torch.no_grad():
        plain = layer.train()(x)
        layer.masked_training = True
        assert (layer(x) - plain).abs().max() < 1e-4


def test_experts_may_begin_as_the_dense_neurons_are():
    """Only gates and what no leaf holds are new; the bias makes up for it on average."""
    dense = random_dense(neurons=48, width=24)
    description = describe_experts(dense, leaves=5, leaf_width=8, chosen=2, shared=8)
    layer = ConvertedFeedforward(description, 24)
    x = make_rows(600, 24, dtype=torch.float32)
    prune(layer, dense, x)
    own = {tuple(row.tolist()) for row in dense.w_out}
    stored = torch.cat((layer.layer.w_out.flatten(0, 1), layer.shared.linear_out.weight.t()))
    assert {tuple(row.tolist()) for row in stored} == own
    assert (layer.eval()(x) - dense_forward(dense, x)).mean(0).abs().max() < 1e-4


def test_experts_with_other_routers_are_refused():
    dense = random_dense(width=24)
    layer = ConvertedFeedforward({"kind": "paths", "depth": 2, "paths": 2, "leaf_width": 4}, 24)
    x = make_rows(50, 24, dtype=torch.float32)
    with pytest.raises(TypeError, match="TreeRouter cannot be initialised"):
        initialise(layer, dense, x, lambda: iter([(x, x)]))


def test_routers_learn_at_a_rate_of_their_own_and_hidden_states_are_a_warm_up_for_words():
    dense = random_dense(width=24)
    layer = ConvertedFeedforward(describe_experts(dense, leaves=4, leaf_width=8, chosen=2), 24)
    new, others, routers = parameter_groups(layer)
    assert [p.shape for p in routers] == [(4, 24)]
    assert others == []
    assert not any(p is routers[0] for p in new)
    recipe = Recipe(steps=20, batch=1, hidden_share=0.1)
    assert [recipe.learns_hidden_states(step, "causal") for step in (0, 1, 2)] == [True, True, False]
    assert recipe.learns_hidden_states(19, "embedding")


def test_the_decay_of_squared_gradients_is_the_recipes():
    seen = []

    class Spy(torch.optim.AdamW):
        def __init__(self, *args, **options):
            seen.append(options["betas"])
            super().__init__(*args, **options)

    student, teacher, blocks = decoder_and_blocks()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Spy)
        distil.distil(student, teacher, blocks, Recipe(1, 2, beta2=0.999), kind="causal")
    assert seen == [(0.9, 0.999)]


def decoder_and_blocks():
    teacher = tiny("llama").requires_grad_(False)
    torch.manual_seed(1)
    student = make_converted(teacher, [describe_narrow(layer, 32) for layer in dense_layers(teacher)])
    ids = np.random.default_rng(0).integers(0, 62, 25 * 8).astype(np.uint32)
    return student, teacher, TextExamples(ids, np.arange(0, 25 * 8 + 1, 8), 0)


@pytest.mark.parametrize("works", [True, False])
def test_recorded_steps_teach_what_plain_ones_do(works, monkeypatch):
    """Passes of 25 blocks have a batch of one, which is another work; "recorded" work is run again as it is."""
    recorded = []

    def record(work):
        if not works:
            raise RuntimeError("operation not permitted when stream is capturing")
        recorded.append(work)
        return work

    monkeypatch.setattr(distil, "recording", lambda *_: record)
    taught = []
    for asked in (False, True):
        student, teacher, blocks = decoder_and_blocks()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            distil.distil(student, teacher, blocks, Recipe(20, 4, hidden_share=0.4), kind="causal", recorded=asked)
        said = [str(one.message) for one in seen if "not recorded" in str(one.message)]
        taught.append(student.state_dict())
    refusal = "steps are not recorded as a CUDA graph: operation not permitted when stream is capturing"
    assert said == ([] if works else [refusal])
    assert len(recorded) >= 2 * works, "once for each loss, and again after a smaller batch"
    for name, value in taught[0].items():
        torch.testing.assert_close(taught[1][name], value, rtol=0, atol=1e-6)


def test_only_steps_that_are_all_alike_are_recorded():
    _, teacher, blocks = decoder_and_blocks()
    assert all_of_one_length(blocks)
    assert not all_of_one_length(TextExamples(blocks.ids, np.array([0, 8, 15, 23]), 0))
    assert recording(teacher, blocks, Recipe(4, 2), "causal") is None, "there is no GPU here to record"
