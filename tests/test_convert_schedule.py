"""What changes over the steps of a distillation."""

from __future__ import annotations

import pytest
import torch

from conftest import make_rows
from convert_cases import tiny
from fastff.convert.distil import Recipe
from fastff.convert.schedule import Average, Fade, SlowTurns
from fastff.models import make_converted

TREE = {"kind": "fff", "depth": 2, "trees": 2, "leaf_width": 3, "gate": "boundary", "bias": True}


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_a_student_faded_to_its_teacher_gives_what_that_gives(model_type):
    teacher = tiny(model_type)
    student = make_converted(teacher, [TREE, None])
    ids = torch.arange(12).view(2, 6)
    fade = Fade(student, teacher)
    with torch.no_grad():
        own, want = student(ids)[0], teacher(ids)[0]
        fade.share = 1.0
        with fade:
            assert (student(ids)[0] - want).abs().max() < 1e-5
        assert torch.equal(student(ids)[0], own)
        fade.share = 0.0
        with fade:
            assert torch.equal(student(ids)[0], own)


def test_turns_go_a_part_of_the_way_and_leaves_all_of_it():
    student = make_converted(tiny(), [TREE, None])
    layer = student.encoder.layer[0].intermediate.layer
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    turns = SlowTurns(student, 0.25)
    turns.remember()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(1.0)
    turns.shorten()
    nodes = layer.config.nodes
    for name in ("w_in", "b_in"):
        moved = getattr(layer, name).detach() - before[name]
        assert torch.allclose(moved[:, :nodes], torch.tensor(0.25), atol=1e-6)
        assert torch.allclose(moved[:, nodes:], torch.tensor(1.0), atol=1e-6)
    assert torch.allclose(layer.w_out.detach() - before["w_out"], torch.tensor(1.0), atol=1e-6)


def test_the_average_of_equal_weights_is_that_weight_and_lags_behind_a_change():
    weight = torch.nn.Parameter(make_rows(5))
    first = weight.detach().clone()
    average = Average([weight], 0.9)
    for _ in range(30):
        average.add()
    with torch.no_grad():
        weight.add_(1.0)
    average.add()
    other = Average([weight], 0.9)
    other.restore(average.state)
    other.put()
    moved = weight.detach() - first
    assert torch.allclose(moved, torch.full_like(moved, 1 - 31 / 41))


def test_without_an_average_the_last_weights_stay():
    weight = torch.nn.Parameter(make_rows(5))
    average = Average([weight], 0.0)
    with torch.no_grad():
        weight.add_(1.0)
    average.add()
    average.put()
    assert torch.equal(weight.detach(), make_rows(5) + 1)


@pytest.mark.parametrize("change", [{"mild": 1.0}, {"average": 1.0}])
def test_recipes_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Recipe(steps=1, batch=1, **change)
