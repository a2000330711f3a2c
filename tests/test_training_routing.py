"""Options of the trees' training: what each does to the weights, and what is reported of the routing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fastff
from conftest import make_layer, make_rows
from fastff import FFF
from fastff.errors import TrainingError
from fastff.models import build_feedforward
from fastff.routers import Usage
from fastff.train.layer_training import (
    LayerTraining,
    RoutingLrScale,
    RoutingStats,
    balance,
    layer_training,
    scale_start,
)
from fastff.train.trainer import parameter_groups


def trained(options, progress=0.5, **layer_options):
    """Weights of a layer before and after one step of plain gradient descent under `options`."""
    layer = make_layer(6, depth=2, trees=2, bias=True, gate="boundary", dtype=torch.float64, **layer_options)
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    if options.scales_routing:
        RoutingLrScale(layer, options, lambda: progress).watch(optimizer)
    layer(make_rows(64, 6)).square().sum().backward()
    optimizer.step()
    return before, dict(layer.named_parameters())


@pytest.mark.parametrize("name", ["w_in", "b_in"])
def test_each_level_learns_at_its_own_pace(name):
    before, plain = trained(LayerTraining())
    _, paced = trained(LayerTraining(level_lr_scale=0.5))
    change, slower = plain[name] - before[name], paced[name] - before[name]
    torch.testing.assert_close(slower[:, 0], change[:, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(slower[:, 1:3], 0.5 * change[:, 1:3], rtol=0, atol=1e-12)
    torch.testing.assert_close(slower[:, 3:], change[:, 3:], rtol=0, atol=1e-12)
    assert change[:, :3].abs().min() > 0


def test_late_in_the_budget_the_turns_freeze_and_the_leaves_do_not():
    before, frozen = trained(LayerTraining(freeze_after=0.4), progress=0.5)
    assert torch.equal(frozen["w_in"][:, :3], before["w_in"][:, :3])
    assert not torch.equal(frozen["w_in"][:, 3:], before["w_in"][:, 3:])
    assert not torch.equal(frozen["w_out"], before["w_out"])
    _, early = trained(LayerTraining(freeze_after=0.4), progress=0.3)
    assert torch.equal(early["w_in"], trained(LayerTraining())[1]["w_in"])


ROUTERS = {
    "tree": lambda: fastff.TreeRouter(6, 3, 2, bias=True),
    "paths": lambda: fastff.TreeRouter(6, 3, 2, paths=3, bias=True),
    "flat": lambda: fastff.FlatRouter(6, 16, 3, bias=True),
    "product_key": lambda: fastff.ProductKeyRouter(6, 4, 4, bias=True),
}


def trained_behind(kind, options, progress=0.5, optimiser=torch.optim.SGD):
    """Weights of a layer behind a router before and after one step under `options`."""
    torch.manual_seed(0)
    layer = fastff.ConditionalFeedforward(6, router=ROUTERS[kind](), leaves=16, leaf_width=2).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    optimizer = optimiser(layer.parameters(), lr=0.1)
    if options.scales_routing:
        RoutingLrScale(layer, options, lambda: progress).watch(optimizer)
    layer(make_rows(64, 6)).square().sum().backward()
    optimizer.step()
    return before, dict(layer.named_parameters())


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("kind", ROUTERS)
def test_late_in_the_budget_routers_freeze_and_their_leaves_do_not(kind, optimiser):
    options = LayerTraining(freeze_after=0.4)
    before, frozen = trained_behind(kind, options, 0.5, optimiser)
    _, plain = trained_behind(kind, LayerTraining(), 0.5, optimiser)
    for name in ("router.weight", "router.bias"):
        assert torch.equal(frozen[name], before[name])
        assert not torch.equal(plain[name], before[name])
    for name in ("w_in", "w_out"):
        assert torch.equal(frozen[name], plain[name])
        assert not torch.equal(frozen[name], before[name])
    _, early = trained_behind(kind, options, 0.3, optimiser)
    assert all(torch.equal(early[name], plain[name]) for name in plain)


@pytest.mark.parametrize("name", ["router.weight", "router.bias"])
@pytest.mark.parametrize("kind", ROUTERS)
def test_each_level_of_a_tree_router_learns_at_its_own_pace(kind, name):
    before, plain = trained_behind(kind, LayerTraining())
    _, paced = trained_behind(kind, LayerTraining(level_lr_scale=0.5))
    change, slower = plain[name] - before[name], paced[name] - before[name]
    assert change.abs().max() > 0
    if kind in ("flat", "product_key"):
        assert torch.equal(paced[name], plain[name]), "routers without trees have no levels"
        return
    for level, scale in enumerate((1.0, 0.5, 0.25)):
        own = slice(2**level - 1, 2 ** (level + 1) - 1)
        assert change[:, own].abs().max() > 0
        torch.testing.assert_close(slower[:, own], scale * change[:, own], rtol=0, atol=1e-12)


def test_balance_moves_a_bias_in_proportion_to_what_its_sides_differ_by():
    layer = make_layer(6, depth=2, bias=True)
    before = layer.b_in.detach().clone()
    balance({"tree": layer}, {"tree": Usage.of(torch.tensor([[30, 30, 40, 0]]))}, 0.1)
    want = torch.tensor([[0.1 * (60 - 40) / 100, 0.0, 0.1]])
    torch.testing.assert_close(layer.b_in[:, :3] - before[:, :3], want)
    assert torch.equal(layer.b_in[:, 3:], before[:, 3:])
    balance({"tree": layer}, {"tree": Usage.of(torch.zeros(1, 4, dtype=torch.int64))}, 0.1)
    torch.testing.assert_close(layer.b_in[:, :3] - before[:, :3], want)


def test_balance_sends_more_rows_to_the_emptier_side():
    layer = make_layer(6, depth=3, bias=True)
    with torch.no_grad():
        layer.b_in[:, 0] = -3.0
    rows = make_rows(400, 6, dtype=torch.float32)
    before = layer.usage(rows)
    for _ in range(100):
        balance({"tree": layer}, {"tree": layer.usage(rows)}, 0.2)
    after = layer.usage(rows)
    assert before.entropy_bits < 2.0
    assert after.entropy_bits > 2.9
    with pytest.raises(TrainingError, match=r"balance needs bias=True .* tree has bias=False"):
        balance({"tree": make_layer(6, depth=1)}, {"tree": after}, 0.05)


def test_stats_counts_what_training_saw_and_begins_anew():
    model = nn.Sequential(make_layer(6, depth=1), make_layer(6, depth=0))
    with torch.no_grad():
        model[0].w_in[:, 0] = torch.tensor([1.0, 0, 0, 0, 0, 0])
    rows = torch.zeros(200, 6)
    rows[:, 0] = 1.0
    rows[:50, 0] = -1.0
    stats = RoutingStats(model)
    model(rows)
    report = stats.report()
    share = torch.tensor([0.25, 0.75])
    assert report["0"]["leaf_entropy_bits"] == pytest.approx(float(-(share * share.log2()).sum()), abs=1e-4)
    assert report["0"]["dead_leaves"] == report["0"]["one_sided_nodes"] == 0.0
    assert report["1"] == {"leaf_entropy_bits": 0.0, "most_bits": 0, "dead_leaves": 0.0, "one_sided_nodes": None}
    model(rows[100:])
    report = stats.report()
    assert report["0"] == {"leaf_entropy_bits": 0.0, "most_bits": 1, "dead_leaves": 0.5, "one_sided_nodes": 1.0}


def test_stats_counts_layers_behind_routers_too():
    torch.manual_seed(0)
    routers = (fastff.FlatRouter(6, leaves=12, k=3), fastff.TreeRouter(6, depth=2, trees=3))
    model = nn.Sequential(
        *(fastff.ConditionalFeedforward(6, router=r, leaves=12, leaf_width=2) for r in routers), nn.LayerNorm(6)
    )
    stats = RoutingStats(model)
    model(torch.randn(500, 6))
    report = stats.report()
    assert set(report) == {"0", "1"}
    assert report["0"]["most_bits"] == pytest.approx(math.log2(12), abs=1e-4)
    assert report["0"]["one_sided_nodes"] is None
    assert report["1"]["most_bits"] == 2
    assert report["1"]["one_sided_nodes"] is not None
    for name, layer in (("0", model[0]), ("1", model[1])):
        assert 0 < report[name]["leaf_entropy_bits"] <= report[name]["most_bits"]
        assert layer.usage().counts.sum() == 0, "counting began anew"
    balance(stats.layers, stats.collect(), 0.05)  # leaves them alone


def test_one_sided_nodes_need_rows_enough_to_tell():
    usage = Usage.of(torch.tensor([[1000, 0, 60, 60], [99, 1, 50, 50]]))
    assert usage.one_sided() == 2 / 6
    assert usage.one_sided(least=101) == 1 / 4
    assert math.isnan(usage.one_sided(least=2000))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["speed=2"], "'speed=2' is not NAME=VALUE with a name of lr_scale"),
        (["lr_scale"], "'lr_scale' is not NAME=VALUE"),
        (["lr_scale=fast"], "lr_scale 'fast' is not a number"),
        (["lr_scale=0"], "lr_scale 0.0 is not a positive finite number"),
        (["freeze_after=2"], r"freeze_after 2.0 is not in \[0, 1\]"),
        (["balance=-1"], "balance -1.0 is not a finite number of at least 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(TrainingError, match=message):
        layer_training(options)


def test_options_by_name():
    want = LayerTraining(lr_scale=0.5, feedforward_init="fan_in")
    assert layer_training(["lr_scale=0.5", "feedforward_init=fan_in"]) == want


def router_model(description, seed=0):
    torch.manual_seed(seed)
    return nn.ModuleDict({"first": nn.Linear(8, 8), "layer": build_feedforward(description, 8)})


FLAT = {"kind": "flat", "leaves": 4, "k": 2, "leaf_width": 3}
GREEDY = {"kind": "fff", "depth": 2, "leaf_width": 3, "node_output": False}


@pytest.mark.parametrize("description", [FLAT, GREEDY], ids=["flat", "greedy"])
def test_the_start_is_scaled_of_routing_and_of_outputs_alone(description):
    before, after = router_model(description).layer, router_model(description).layer
    scale_start(nn.ModuleList([after]), LayerTraining(output_scale=3.0, routing_scale=2.0))
    assert torch.equal(after.w_out, before.w_out * 3)
    if isinstance(after, FFF):
        nodes = after.config.nodes
        assert torch.equal(after.w_in[:, :nodes], before.w_in[:, :nodes] * 2)
        assert torch.equal(after.w_in[:, nodes:], before.w_in[:, nodes:])
    else:
        assert torch.equal(after.router.weight, before.router.weight * 2)
        assert torch.equal(after.w_in, before.w_in)


def test_leaves_and_their_router_learn_at_rates_of_their_own():
    model = router_model(FLAT)
    groups = parameter_groups(model, 1.0, 0.5, 0.1, routing_lr_scale=0.25)
    lr = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    layer = model.layer
    assert [lr[id(p)] for p in (model.first.weight, layer.w_in, layer.router.weight)] == [1.0, 0.5, 0.125]
