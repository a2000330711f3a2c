"""What changes over the steps of a distillation."""

from __future__ import annotations

import math

import pytest
import torch

from conftest import make_rows
from convert_cases import tiny
from fastff.convert import distil_loss
from fastff.convert.distil import WARMUP, DenseFade, Recipe, averaged, cosine
from fastff.convert.earlier import average_state
from fastff.models import make_converted
from fastff.train.layer_training import RoutingRows

TREE = {"kind": "fff", "depth": 2, "trees": 2, "leaf_width": 3, "gate": "boundary", "bias": True}


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_a_student_faded_to_its_teacher_gives_what_that_gives(model_type):
    teacher = tiny(model_type)
    student = make_converted(teacher, [TREE, None])
    ids = torch.arange(12).view(2, 6)
    fade = DenseFade(student, teacher)
    with torch.no_grad():
        own, want = student(ids)[0], teacher(ids)[0]
        fade.share = 1.0
        with fade:
            assert (student(ids)[0] - want).abs().max() < 1e-5
        assert torch.equal(student(ids)[0], own)
        fade.share = 0.0
        with fade:
            assert torch.equal(student(ids)[0], own)


def test_routing_rows_go_a_part_of_the_way_and_leaves_all_of_it():
    student = make_converted(tiny(), [TREE, None])
    layer = student.encoder.layer[0].intermediate.layer
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    routing = RoutingRows(student)
    routing.remember()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(1.0)
    routing.shorten(0.25)
    nodes = layer.config.nodes
    for name in ("w_in", "b_in"):
        moved = getattr(layer, name).detach() - before[name]
        assert torch.allclose(moved[:, :nodes], torch.tensor(0.25), atol=1e-6)
        assert torch.allclose(moved[:, nodes:], torch.tensor(1.0), atol=1e-6)
    assert torch.allclose(layer.w_out.detach() - before["w_out"], torch.tensor(1.0), atol=1e-6)


def test_the_average_of_equal_weights_is_that_weight_and_lags_behind_a_change():
    module = torch.nn.ParameterList([torch.nn.Parameter(make_rows(5))])
    first = module[0].detach().clone()
    average = averaged(module, 0.9)
    for _ in range(30):
        average.update_parameters(module)
    with torch.no_grad():
        module[0].add_(1.0)
    average.update_parameters(module)
    other = averaged(module, 0.9)
    other.load_state_dict(average_state(average.state_dict()))
    moved = next(other.parameters()).detach() - first
    assert torch.allclose(moved, torch.full_like(moved, 1 - 31 / 41))


def test_an_average_of_the_version_before_goes_on():
    module = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(2))])
    average = averaged(module, 0.9)
    average.load_state_dict(average_state({"values": [torch.tensor([1.0, 2.0])], "count": 4}))
    average.update_parameters(module)  # the fifth: 5 parts of 15 are kept
    assert torch.allclose(next(average.parameters()), torch.tensor([1.0, 2.0]) / 3)


@pytest.mark.parametrize("done", [0, 3, 30])
def test_learning_rates_rise_at_once_fall_to_nearly_zero_and_go_on(done):
    steps = 100
    optimiser = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 2.0}])
    schedule = cosine(optimiser, steps, done=done)
    rise, rates = int(WARMUP * steps), []
    for _ in range(done, steps):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    whole = [2 * (k + 1) / rise for k in range(rise)]
    whole += [1 + math.cos(math.pi * (k + 1 - rise) / (steps + 1 - rise)) for k in range(rise, steps)]
    assert rates == pytest.approx(whole[done:])


@pytest.mark.parametrize("change", [{"dense_fade": 1.0}, {"average": 1.0}])
def test_recipes_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Recipe(steps=1, batch=1, **change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_divergence_and_its_gradient_piece_by_piece_are_those_of_torch(monkeypatch, dtype):
    monkeypatch.setattr(distil_loss, "VALUES_AT_ONCE", 3 * 11)
    logits, wanted = (4 * make_rows(8, 11)).to(dtype), (4 * make_rows(8, 11)).flip(0).to(dtype)
    found = {}
    for name, loss in (("own", distil_loss.Divergence.apply), ("torch", by_torch)):
        given = logits.clone().requires_grad_()
        value = 0.5 * loss(given, wanted)
        value.backward()
        found[name] = value.detach(), given.grad
    assert (found["own"][0] - found["torch"][0]).abs() < 1e-6
    assert (found["own"][1] - found["torch"][1]).abs().max() < (1e-7 if dtype == torch.float32 else 1e-3)


def by_torch(logits, wanted):
    logits, wanted = logits.float().log_softmax(-1), wanted.float().log_softmax(-1)
    return torch.nn.functional.kl_div(logits, wanted, log_target=True, reduction="batchmean")
