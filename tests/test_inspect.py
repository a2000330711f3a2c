"""Routing statistics against counting by hand, and the picture's arithmetic."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

import fastff
from fastff.inspect import collect, conditional_layers, decisions, visited
from fastff.inspect.picture import Box, colour, draw_path, draw_tree, relative_use
from fastff.routers import Usage


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(fastff.FFF(12, depth=4, trees=2), nn.LayerNorm(12), fastff.FFF(12, depth=3)).eval()


def test_visits_of_nodes_sum_children():
    leaves = torch.tensor([[1, 2, 3, 4], [0, 0, 5, 0]])
    assert Usage.of(leaves).visits.tolist() == [[10, 3, 7, 1, 2, 3, 4], [5, 0, 5, 0, 0, 5, 0]]


def test_visits_of_a_lone_leaf():
    assert Usage.of(torch.tensor([[9]])).visits.tolist() == [[9]]


def test_collect_counts_every_visit(model):
    x = torch.randn(50, 12)
    with torch.no_grad():
        found = collect(model, lambda: model(x))
        paths = visited(model, lambda: model(x))
    assert set(found) == {"0", "2"} == set(paths)
    for name, routing in found.items():
        assert routing.rows == 50
        trees, nodes = routing.counts.shape
        for tree in range(trees):
            by_hand = torch.bincount(paths[name][:, tree].flatten(), minlength=nodes)
            assert torch.equal(routing.counts[tree], by_hand)


ROUTERS = {
    "tree": lambda: fastff.TreeRouter(12, 3, 2),
    "paths": lambda: fastff.TreeRouter(12, 4, 2, paths=3),
    "flat": lambda: fastff.FlatRouter(12, 12, 3),
    "product_key": lambda: fastff.ProductKeyRouter(12, 5, 4),
}


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("kind", ROUTERS)
def test_layers_behind_routers_are_counted_too(kind, quantization):
    torch.manual_seed(0)
    router = ROUTERS[kind]()
    layer = fastff.ConditionalFeedforward(12, router=router, leaves=router.leaves, leaf_width=2)
    model = nn.Sequential(nn.LayerNorm(12), layer.quantize(quantization)).eval()
    x = torch.randn(50, 12)
    with torch.no_grad():
        collect(model, lambda: model(x[:7]))
        routing = collect(model, lambda: model(x))["1"]
        path = visited(model, lambda: model(x))["1"]
        leaf = layer.route(model[0](x))
        model(x)
    trees, depth, chosen = router.config.trees, router.config.depth, router.config.chosen
    assert (routing.rows, routing.depth, routing.chosen) == (50, depth, chosen)
    assert torch.equal(routing.usage.counts.flatten(), torch.bincount(leaf.flatten(), minlength=router.leaves))
    assert torch.equal(layer.usage().counts, routing.usage.counts), "counting in evaluation must be off again"
    assert path.shape == (50, router.k, depth + 1)
    of_tree = path.view(50, trees, chosen * (depth + 1))
    for tree in range(trees):
        by_hand = torch.bincount(of_tree[:, tree].flatten(), minlength=routing.counts.shape[1])
        assert torch.equal(routing.counts[tree], by_hand)
    assert routing.as_dict()["rows"] == 50


def test_the_path_of_a_greedy_router_is_that_of_its_scores():
    torch.manual_seed(0)
    router = fastff.TreeRouter(12, 3, 2)
    layer = fastff.ConditionalFeedforward(12, router=router, leaves=16, leaf_width=2).eval()
    x = torch.randn(6, 12)
    path = visited(layer, lambda: layer(x))[""]
    for row in range(6):
        scores = (router.weight[1, path[row, 1, :-1]] @ x[row]).tolist()
        assert decisions(path[row, 1]) == "".join("R" if score > 0 else "L" for score in scores)


def test_a_router_of_ones_own_is_left_alone():
    class Hash(nn.Module):
        def forward(self, x):
            return torch.zeros(*x.shape[:-1], 1, dtype=torch.int64), x.new_ones(*x.shape[:-1], 1)

    layer = fastff.ConditionalFeedforward(12, router=Hash(), leaves=2, leaf_width=2)
    assert collect(layer, lambda: layer(torch.randn(3, 12))) == {}
    assert list(conditional_layers(layer)) == [""]


def test_collect_leaves_no_trace(model):
    x = torch.randn(5, 12)
    with torch.no_grad():
        collect(model, lambda: model(x))
        before = model[0].usage().counts
        model(x)
    assert torch.equal(model[0].usage().counts, before), "counting in evaluation must be off again"


def test_collect_starts_at_zero(model):
    with torch.no_grad():
        collect(model, lambda: model(torch.randn(30, 12)))
        found = collect(model, lambda: model(torch.randn(7, 12)))
    assert {routing.rows for routing in found.values()} == {7}


def test_as_dict_is_plain_and_consistent(model):
    with torch.no_grad():
        found = collect(model, lambda: model(torch.randn(40, 12)))["0"].as_dict()
    assert found["depth"] == 4
    assert found["trees"] == 2
    assert [sum(counts[15:]) for counts in found["counts"]] == [40, 40]
    assert found["dead_leaves"] == [counts[15:].count(0) for counts in found["counts"]]
    for counts, bits in zip(found["counts"], found["entropy_bits"], strict=True):
        share = np.array([c for c in counts[15:] if c]) / 40
        assert bits == pytest.approx(-(share * np.log2(share)).sum(), abs=1e-3)


def test_visited_removes_its_hooks(model):
    visited(model, lambda: model(torch.randn(2, 12)))
    assert not model[0]._forward_pre_hooks


def test_turns_reads_the_scores_signs(model):
    layer = model[0]
    x = torch.randn(6, 12)
    paths = visited(model, lambda: model(x))["0"]
    for row in range(6):
        path = paths[row, 1]
        scores = (layer.w_in[1, path[:-1]] @ x[row]).tolist()
        assert decisions(path) == "".join("R" if score > 0 else "L" for score in scores)


def test_relative_use_is_zero_when_even_and_nan_when_dead():
    grid = relative_use([8, 4, 4, 2, 2, 4, 0], 2)
    assert grid.shape == (3, 4)
    assert grid[0].tolist() == [0, 0, 0, 0]
    assert grid[1].tolist() == [0, 0, 0, 0]
    assert grid[2, :3].tolist() == [0, 0, 1]
    assert np.isnan(grid[2, 3])


def test_a_path_is_drawn_through_the_middle_of_its_nodes():
    line = draw_path([0, 2, 5], 2, Box(10, 100, 40, 30), "c1")
    assert re.search(r'points="([^"]+)"', line)[1] == "30.0,105.0 40.0,115.0 35.0,125.0"


def test_every_node_is_drawn_in_the_colour_of_its_use():
    shapes = list(draw_tree([8, 4, 4, 2, 2, 4, 0], 2, Box(0, 0, 40, 30)))
    kinds = [re.search(r'class="mark (\w+)"', shape)[1] for shape in shapes]
    assert kinds == ["u4", "u4", "u4", "u4", "u4", "u5", "unused"]
    assert 'x="20.0" y="10.0" width="20.0" height="10.0"' in shapes[2]


@pytest.mark.parametrize(("use", "kind"), [(-9.0, "u0"), (-4.0, "u0"), (0.0, "u4"), (4.0, "u8"), (9.0, "u8")])
def test_colours_end_where_use_is_sixteen_times_even_use(use, kind):
    assert colour(use) == kind
