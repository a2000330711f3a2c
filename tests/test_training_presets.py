"""Presets and variants: what they describe, and that costs are counted as the layers count them."""

from __future__ import annotations

import pytest
import torch

from fastff.config import TreeConfig
from fastff.errors import TrainingError
from fastff.models import build_feedforward
from fastff.train.presets import NARROW, PRESETS, RECOMMENDED, VARIANTS, cost_of, costs, feedforward_of
from fastff.train.schedule import Budget, rows_at, triangle


def test_base_is_the_paper():
    base = PRESETS["base"]
    assert (base.layers, base.hidden, base.seq_len, base.vocab_size, base.batch) == (16, 768, 128, 32768, 8192)
    cost = cost_of("1x11", base)
    assert (cost.layer, cost.neurons, cost.active_neurons) == ("1x11", 4095, 12)
    assert cost_of("dense-gelu", base).neurons == 3072


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_every_variant_is_a_layer_smaller_than_dense(preset):
    found = {cost.name: cost for cost in costs(preset)}
    assert set(found) == set(VARIANTS)
    dense = found["dense-gelu"]
    assert found["none"].flops == 0
    for name, cost in found.items():
        if name not in ("dense-gelu", "dense-swiglu", "none"):
            assert 0 < cost.flops < dense.flops / 2, name
            most = 4 if name == "18x6-leaf8-swiglu-gate" else 2  # the one that stores more than a dense layer's kind
            assert 0.5 * dense.neurons < cost.neurons < most * dense.neurons, name
    assert abs(found["dense-swiglu"].flops / dense.flops - 1) < 0.01


def test_a_tree_has_one_name_and_its_older_one_is_read():
    for name, variant in VARIANTS.items():
        if "depth" in variant.options:
            assert TreeConfig.parse(name, 8).name == name
    assert feedforward_of("36x5-swiglu4-gate", 512) == feedforward_of("36x5-leaf4-swiglu-gate", 512)


@pytest.mark.parametrize("tree", ["16x7-gate", "8x4-leaf16-swiglu-gate", "32x6"])
def test_the_narrow_baseline_does_the_same_arithmetic(tree):
    for preset in PRESETS.values():
        wide, narrow = cost_of(tree, preset), cost_of(f"{NARROW}{tree}", preset)
        assert abs(narrow.flops - wide.flops) <= 3 * preset.hidden  # half a neuron


def test_the_recommended_layer_is_the_measured_one_at_its_width_and_stays_below_a_tenth_of_the_arithmetic():
    assert cost_of(RECOMMENDED, PRESETS["small"]).layer == "flat-80x36-top3"
    for preset in (PRESETS["small"], PRESETS["base"]):
        assert cost_of(RECOMMENDED, preset).flops < 0.1 * cost_of("dense-swiglu", preset).flops


def test_a_description_may_be_given_whole():
    described = feedforward_of('{"kind": "fff", "depth": 2, "trees": 3}', 8)
    assert build_feedforward(described, 8)(torch.zeros(1, 8)).shape == (1, 8)


@pytest.mark.parametrize("name", ["1x99", "narrow:", "{not json", "narrow:1x99"])
def test_unknown_feedforwards(name):
    with pytest.raises(TrainingError, match=r"is not one of|is not valid JSON"):
        feedforward_of(name, 8)


def test_the_rate_rises_and_falls():
    assert [triangle(p, 0.25) for p in (0.0, 0.125, 0.25, 0.625, 1.0)] == [0.0, 0.5, 1.0, 0.5, 0.0]
    assert triangle(0.0, 0.0) == 1.0


def test_the_batch_grows_to_its_full_size():
    assert [rows_at(p, 160, 0.5) for p in (0.0, 0.25, 0.5, 1.0)] == [10, 85, 160, 160]
    assert rows_at(0.0, 160, 0.0) == 160
    assert rows_at(0.0, 2, 0.5) == 1


def test_a_budget_of_steps_and_one_of_seconds():
    steps = Budget(steps=3, seconds=None)
    assert [steps.progress(step) for step in range(3)] == [0.25, 0.5, 0.75]
    assert [steps.spent(step) for step in (2, 3)] == [False, True]
    seconds = Budget(steps=None, seconds=10.0, used=4.0)
    assert (seconds.progress(99), seconds.spent(99)) == (0.4, False)
    seconds.used = 12.0
    assert (seconds.progress(0), seconds.spent(0)) == (1.0, True)
    before = seconds.used
    seconds.tick()
    assert before <= seconds.used < before + 60


@pytest.mark.parametrize("name", ["flat-96x32-top3", "pk-784x4-top24", "1x8-leaf12-paths8"])
def test_layers_behind_other_routers_are_named_as_they_are(name):
    cost = cost_of(name, PRESETS["small"])
    assert (cost.name, cost.layer, cost.active_neurons) == (name, name, 96)
    assert cost_of(NARROW + name, PRESETS["small"]).flops == pytest.approx(cost.flops, rel=0.01)
